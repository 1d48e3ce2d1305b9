// first: this scorer needs the window's attention: give it a QueryWindow
#include <vector>

#include "scorer.hpp"

const ckv::Plan plan{shape, ckv::score::Tova{}, ckv::select::SharedTopK{}, uniform};

void compress(const ckv::StridedKv<float>& kv, const std::vector<float>& queries) {
  ckv::Compressor compressor{plan};
  compressor.compress(0, kv, queries);
}
