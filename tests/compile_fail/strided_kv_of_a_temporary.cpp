// expect: keys and values are not copied: give variables that outlive the view
#include <compresskv/compresskv.hpp>
#include <vector>

namespace ckv = compresskv;

void view(std::vector<float>& values, const ckv::KvShape& shape) {
  ckv::StridedKv kv{std::vector<float>(64), values, shape, ckv::layout::head_token_dim};
}
