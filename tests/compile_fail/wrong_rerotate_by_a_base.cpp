// first: how keys turn is a kernel::Rotary
#include "scorer.hpp"

const ckv::Plan plan{shape, ckv::score::Tova{}, ckv::select::SharedTopK{}, uniform};

void rerotate(const ckv::StridedKv<float>& kv) {
  ckv::Compressor compressor{plan};
  compressor.rerotate(0, kv, 10000.0);
}
