// first: keys and values come first
#include <compresskv/compresskv.hpp>
#include <vector>

namespace ckv = compresskv;

void view(float* keys, float* values, const ckv::KvShape& shape) {
  ckv::StridedKv kv{keys, shape, values, ckv::layout::head_token_dim};
}
