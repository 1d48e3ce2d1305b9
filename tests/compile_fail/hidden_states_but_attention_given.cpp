// first: this scorer looks at hidden states, not at attention: give them with the layer's view
#include "scorer.hpp"

const ckv::Plan plan{shape, ckv::score::KvZap{ckv::Surrogate(1, 1, 1, {1.0F}, {0.0F})},
                     ckv::select::Threshold{-4.0F}, uniform};

void select(const ckv::AttentionMatrix<float>& attention) {
  ckv::Compressor compressor{plan};
  compressor.select(0, attention);
}
