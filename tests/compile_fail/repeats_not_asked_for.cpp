// first: this scorer does not ask for the context to be repeated: call compress\(\) or arrive\(\)
#include "scorer.hpp"

const ckv::Plan plan{shape, ckv::score::SnapKv{}, ckv::select::GroupedTopK{}, uniform};

void observe(const ckv::StridedKv<float>& kv, const ckv::QueryWindow<float>& queries) {
  ckv::Compressor compressor{plan};
  compressor.observe(0, kv, {.first = 0, .last = 8}, queries);
}
