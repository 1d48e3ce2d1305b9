// expect: the elements are kept, not copied: give a variable that outlives this, not a temporary
#include <compresskv/compresskv.hpp>
#include <vector>

const std::vector<std::size_t> both{7, 9};

// A const temporary is one too.
const compresskv::PagedShape shape{.kv_heads = 2,
                                   .head_dim = 8,
                                   .block_rows = 4,
                                   .pool_blocks = 8,
                                   .head_rows = static_cast<const std::vector<std::size_t>&&>(both)};
