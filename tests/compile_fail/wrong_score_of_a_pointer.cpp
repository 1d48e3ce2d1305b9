// first: the layer's view is missing
#include "scorer.hpp"

const ckv::Plan plan{shape, ckv::score::Tova{}, ckv::select::SharedTopK{}, uniform};

void score(float* keys, const ckv::QueryWindow<float>& queries) {
  ckv::Compressor compressor{plan};
  compressor.score(0, keys, queries);
}
