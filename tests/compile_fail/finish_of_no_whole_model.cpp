// first: this composition need not see the whole model: there is nothing to finish
#include "scorer.hpp"

const ckv::Plan plan{shape, ckv::score::Cake{}, ckv::select::GroupedTopK{},
                     ckv::budget::Cake{ckv::Budget::tokens_per_layer(16)}};

void finish(const ckv::StridedKv<float>& kv) {
  ckv::Compressor compressor{plan};
  compressor.finish([&](std::size_t) { return kv; });
}
