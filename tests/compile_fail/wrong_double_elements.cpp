// first: keys and values come first, as pointers or spans
#include <compresskv/compresskv.hpp>
#include <vector>

namespace ckv = compresskv;

void view(double* keys, double* values, const ckv::KvShape& shape) {
  ckv::StridedKv kv{keys, values, shape, ckv::layout::head_token_dim};
}
