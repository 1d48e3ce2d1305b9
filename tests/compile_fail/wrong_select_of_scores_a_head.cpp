// first: with this plan's granularity
#include "scorer.hpp"

const ckv::Plan plan{shape, ckv::score::Tova{}, ckv::select::SharedTopK{}, uniform};

void select(const ckv::Scores<ckv::Granularity::kv_head>& scores) {
  ckv::Compressor compressor{plan};
  compressor.select(0, scores);
}
