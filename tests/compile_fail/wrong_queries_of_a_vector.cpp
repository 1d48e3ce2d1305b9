// first: queries come first
#include <compresskv/compresskv.hpp>
#include <vector>

namespace ckv = compresskv;

void view(const std::vector<float>& queries, const ckv::QueryShape& shape) {
  ckv::QueryWindow window{queries, shape};
}
