// expect: keys, values and the block table are not copied: give variables that outlive the view
#include <compresskv/compresskv.hpp>
#include <vector>

namespace ckv = compresskv;

std::vector<std::int32_t> table();

void view(float* keys, float* values, const ckv::PagedShape& shape) {
  ckv::PagedKv kv{keys, values, shape, table(), ckv::layout::head_token_dim};
}
