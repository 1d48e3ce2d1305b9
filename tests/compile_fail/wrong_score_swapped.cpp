// first: the layer's view comes second, the observation after it
#include "scorer.hpp"

const ckv::Plan plan{shape, ckv::score::Tova{}, ckv::select::SharedTopK{}, uniform};

void score(const ckv::StridedKv<float>& kv, const ckv::AttentionSums& sums) {
  ckv::Compressor compressor{plan};
  compressor.score(0, sums, kv);
}
