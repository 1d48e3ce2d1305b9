// first: the layout is missing
#include <compresskv/compresskv.hpp>
#include <vector>

namespace ckv = compresskv;

void view(float* keys, float* values, const ckv::KvShape& shape) { ckv::StridedKv kv{keys, values, shape}; }
