// expect: this scorer needs the window's rows apart: give queries or an attention matrix, not sums
#include "scorer.hpp"

const ckv::Plan plan{shape, ckv::score::Cake{}, ckv::select::GroupedTopK{}, uniform};

void select(const ckv::AttentionSums& sums) {
  ckv::Compressor compressor{plan};
  compressor.select(0, sums);
}
