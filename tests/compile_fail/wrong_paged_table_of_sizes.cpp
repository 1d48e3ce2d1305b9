// first: the block table comes fourth, as std::int32_t
#include <compresskv/compresskv.hpp>
#include <vector>

namespace ckv = compresskv;

void view(float* keys, float* values, const ckv::PagedShape& shape, const std::vector<std::size_t>& table) {
  ckv::PagedKv kv{keys, values, shape, table, ckv::layout::head_token_dim};
}
