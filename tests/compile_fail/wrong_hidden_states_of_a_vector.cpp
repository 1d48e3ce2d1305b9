// first: hidden states come first
#include <compresskv/compresskv.hpp>
#include <vector>

namespace ckv = compresskv;

void view(const std::vector<float>& states, const ckv::HiddenShape& shape) {
  ckv::HiddenStates hidden{states, shape};
}
