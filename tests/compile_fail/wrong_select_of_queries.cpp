// first: queries need the keys
#include "scorer.hpp"

const ckv::Plan plan{shape, ckv::score::Tova{}, ckv::select::SharedTopK{}, uniform};

void select(const ckv::QueryWindow<float>& queries) {
  ckv::Compressor compressor{plan};
  compressor.select(0, queries);
}
