// first: the second argument is a QueryShape
#include <compresskv/compresskv.hpp>
#include <vector>

namespace ckv = compresskv;

void view(const float* queries, const ckv::KvShape& shape) { ckv::QueryWindow window{queries, shape}; }
