// first: this scorer reads keys and values: give it the layer's view
#include "scorer.hpp"

const ckv::Plan plan{shape, ckv::score::Cur{}, ckv::select::GroupedTopK{}, uniform};

void score(const ckv::AttentionMatrix<float>& attention) {
  ckv::Compressor compressor{plan};
  compressor.score(0, attention);
}
