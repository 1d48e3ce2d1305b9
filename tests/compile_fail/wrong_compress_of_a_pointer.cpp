// first: the layer's view is missing
#include "scorer.hpp"

const ckv::Plan plan{shape, ckv::score::Tova{}, ckv::select::SharedTopK{}, uniform};

void compress(float* keys, const ckv::QueryWindow<float>& queries) {
  ckv::Compressor compressor{plan};
  compressor.compress(0, keys, queries);
}
