// first: the block table comes fourth
#include <compresskv/compresskv.hpp>
#include <vector>

namespace ckv = compresskv;

void view(float* keys, float* values, const ckv::PagedShape& shape, const std::vector<std::int32_t>& table) {
  ckv::PagedKv kv{keys, values, shape, ckv::layout::head_token_dim, table};
}
