// first: this composition shrinks each layer on its own: call compress\(\), not arrive\(\)
#include "scorer.hpp"

using CaseScorer = Scorer<ckv::Granularity::layer, ckv::Needs::nothing, ckv::Reach::own_layer>;

const ckv::Plan plan{shape, CaseScorer{}, ckv::select::SharedTopK{}, uniform};

void arrive(const ckv::StridedKv<float>& kv) {
  ckv::Compressor compressor{plan};
  compressor.arrive(0, [&](std::size_t) { return kv; });
}
