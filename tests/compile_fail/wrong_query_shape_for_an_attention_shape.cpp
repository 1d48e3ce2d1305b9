// first: the second argument is an AttentionShape
#include <compresskv/compresskv.hpp>
#include <vector>

namespace ckv = compresskv;

void view(const float* weights, const ckv::QueryShape& shape) { ckv::AttentionMatrix matrix{weights, shape}; }
