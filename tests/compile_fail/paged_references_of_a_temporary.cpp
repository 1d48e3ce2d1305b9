// expect: the elements are kept, not copied: give a variable that outlives this, not a temporary
#include <compresskv/compresskv.hpp>
#include <vector>

namespace ckv = compresskv;

std::vector<std::int32_t> references();

void view(float* keys, float* values, const ckv::PagedShape& shape, const std::vector<std::int32_t>& table) {
  ckv::PagedKv kv{keys, values, shape, table, ckv::layout::head_token_dim, references()};
}
