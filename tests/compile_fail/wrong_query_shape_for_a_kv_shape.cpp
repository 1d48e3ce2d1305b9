// first: the third argument is a KvShape
#include <compresskv/compresskv.hpp>
#include <vector>

namespace ckv = compresskv;

void view(float* keys, float* values, const ckv::QueryShape& shape) {
  ckv::StridedKv kv{keys, values, shape, ckv::layout::head_token_dim};
}
