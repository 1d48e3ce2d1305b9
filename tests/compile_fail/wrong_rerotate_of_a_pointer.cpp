// first: the layer's view is missing
#include "scorer.hpp"

const ckv::Plan plan{shape, ckv::score::Tova{}, ckv::select::SharedTopK{}, uniform};

void rerotate(float* keys) {
  ckv::Compressor compressor{plan};
  compressor.rerotate(0, keys, ckv::kernel::Rotary{});
}
