// first: queries come first
#include <compresskv/compresskv.hpp>
#include <vector>

namespace ckv = compresskv;

void view(const float* queries, const ckv::QueryShape& shape) { ckv::QueryWindow window{shape, queries}; }
