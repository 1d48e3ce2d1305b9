// first: select\(\) takes the scores that score\(\) filled
#include "scorer.hpp"

const ckv::Plan plan{shape, ckv::score::Tova{}, ckv::select::SharedTopK{}, uniform};

void select(const ckv::StridedKv<float>& kv) {
  ckv::Compressor compressor{plan};
  compressor.select(0, kv);
}
