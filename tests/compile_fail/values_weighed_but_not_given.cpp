// first: this scorer reads keys and values: give it the layer's view
#include "scorer.hpp"

void score(const ckv::AttentionMatrix<float>& attention, const ckv::OutputWeights& weights) {
  const ckv::Plan plan{shape, ckv::score::CriticalKv{ckv::score::SnapKv{}, weights},
                       ckv::select::GroupedTopK{}, uniform};
  ckv::Compressor compressor{plan};
  compressor.score(0, attention);
}
