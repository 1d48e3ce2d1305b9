// first: this scorer looks at what goes into the layer's attention: give it HiddenStates
#include "scorer.hpp"

const ckv::Plan plan{shape, ckv::score::KvZap{ckv::Surrogate(1, 1, 1, {1.0F}, {0.0F})},
                     ckv::select::Threshold{-4.0F}, uniform};

void compress(const ckv::StridedKv<float>& kv, const ckv::QueryWindow<float>& queries) {
  ckv::Compressor compressor{plan};
  compressor.compress(0, kv, queries);
}
