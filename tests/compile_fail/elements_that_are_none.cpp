// expect: StridedKv<Key, Value> holds float, half, bfloat16, BlockQ8_0 or BlockQ4_0
#include <compresskv/compresskv.hpp>

std::size_t heads(const compresskv::StridedKv<double>& kv) { return kv.kv_heads(); }
