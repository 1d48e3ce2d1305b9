// expect: the elements are kept, not copied: give a variable that outlives this, not a temporary
#include <compresskv/compresskv.hpp>
#include <vector>

const compresskv::QueryShape shape{
    .query_heads = 2, .queries = 8, .head_dim = 8, .sinks = std::vector<float>{0.5F, 1.0F}};
