// first: the views are given as a function
#include "scorer.hpp"

using CaseScorer = Scorer<ckv::Granularity::layer, ckv::Needs::nothing, ckv::Reach::all_layers>;

struct CarriedScorer : CaseScorer {
  float decay() const { return 1.0F; }
};

const ckv::Plan plan{shape, CarriedScorer{}, ckv::select::SharedTopK{}, uniform};

void finish(const ckv::StridedKv<float>& kv) {
  ckv::Compressor compressor{plan};
  compressor.finish(kv);
}
