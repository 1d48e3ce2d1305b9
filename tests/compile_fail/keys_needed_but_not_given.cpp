// first: this scorer reads the keys: give it the layer's view
#include "scorer.hpp"

using CaseScorer = Scorer<ckv::Granularity::layer, ckv::Needs::keys, ckv::Reach::own_layer>;

const ckv::Plan plan{shape, CaseScorer{}, ckv::select::SharedTopK{}, uniform};

void score(const ckv::AttentionMatrix<float>& attention) {
  ckv::Compressor compressor{plan};
  compressor.score(0, attention);
}
