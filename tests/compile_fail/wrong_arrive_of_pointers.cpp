// first: the layer's view is missing
#include "scorer.hpp"

const ckv::Plan plan{shape, ckv::score::Cake{}, ckv::select::GroupedTopK{},
                     ckv::budget::Cake{ckv::Budget::tokens_per_layer(16)}};

void arrive(float* keys, const ckv::QueryWindow<float>& queries) {
  ckv::Compressor compressor{plan};
  compressor.arrive(
      0, [&](std::size_t) { return keys; }, queries);
}
