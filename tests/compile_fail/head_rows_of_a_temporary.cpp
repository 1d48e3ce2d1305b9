// expect: the elements are kept, not copied: give a variable that outlives this, not a temporary
#include <compresskv/compresskv.hpp>
#include <vector>

const compresskv::KvShape shape{
    .kv_heads = 2, .head_dim = 8, .allocated_rows = 16, .head_rows = std::vector<std::size_t>{7, 9}};
