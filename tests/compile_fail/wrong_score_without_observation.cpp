// first: this scorer needs the window's attention: give it a QueryWindow
#include "scorer.hpp"

const ckv::Plan plan{shape, ckv::score::Tova{}, ckv::select::SharedTopK{}, uniform};

void score(const ckv::StridedKv<float>& kv) {
  ckv::Compressor compressor{plan};
  compressor.score(0, kv);
}
