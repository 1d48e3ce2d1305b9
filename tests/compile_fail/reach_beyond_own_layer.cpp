// first: this composition must see more than one layer before it can shrink any
#include "scorer.hpp"

using CaseScorer = Scorer<ckv::Granularity::layer, ckv::Needs::nothing, ckv::Reach::all_layers>;

const ckv::Plan plan{shape, CaseScorer{}, ckv::select::SharedTopK{}, uniform};

void compress(const ckv::StridedKv<float>& kv) {
  ckv::Compressor compressor{plan};
  compressor.compress(0, kv);
}
