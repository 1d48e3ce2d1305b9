// first: the views are given as a function
#include "scorer.hpp"

const ckv::Plan plan{shape, ckv::score::Cake{}, ckv::select::GroupedTopK{},
                     ckv::budget::Cake{ckv::Budget::tokens_per_layer(16)}};

void arrive(const ckv::StridedKv<float>& kv, const ckv::QueryWindow<float>& queries) {
  ckv::Compressor compressor{plan};
  compressor.arrive(0, queries, [&](std::size_t) { return kv; });
}
