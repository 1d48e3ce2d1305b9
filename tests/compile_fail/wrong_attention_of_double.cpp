// first: the weights come first
#include <compresskv/compresskv.hpp>
#include <vector>

namespace ckv = compresskv;

void view(const double* weights, const ckv::AttentionShape& shape) {
  ckv::AttentionMatrix matrix{weights, shape};
}
