// first: keys are turned in place
#include "scorer.hpp"

const ckv::Plan plan{shape, ckv::score::Tova{}, ckv::select::SharedTopK{}, uniform};

void rerotate(const ckv::StridedKv<const float>& kv) {
  ckv::Compressor compressor{plan};
  compressor.rerotate(0, kv, ckv::kernel::Rotary{});
}
