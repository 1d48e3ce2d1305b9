// first: this scorer compares logits, which attention no longer shows: give it the window's queries
#include "scorer.hpp"

const ckv::Plan plan{shape, ckv::score::RKv{}, ckv::select::GroupedTopK{}, uniform};

void compress(const ckv::StridedKv<float>& kv, const ckv::AttentionMatrix<float>& attention) {
  ckv::Compressor compressor{plan};
  compressor.compress(0, kv, attention);
}
