// first: the layer's view is missing
#include "scorer.hpp"

using CaseScorer = Scorer<ckv::Granularity::layer, ckv::Needs::nothing, ckv::Reach::all_layers>;

struct CarriedScorer : CaseScorer {
  float decay() const { return 1.0F; }
};

const ckv::Plan plan{shape, CarriedScorer{}, ckv::select::SharedTopK{}, uniform};

void finish(float* keys) {
  ckv::Compressor compressor{plan};
  compressor.finish([&](std::size_t) { return keys; });
}
