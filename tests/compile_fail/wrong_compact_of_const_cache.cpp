// first: rows move as they are
#include "scorer.hpp"

const ckv::Plan plan{shape, ckv::score::Tova{}, ckv::select::SharedTopK{}, uniform};

void compact(const ckv::StridedKv<const float>& kv, const ckv::Selection& selection) {
  ckv::Compressor compressor{plan};
  compressor.compact(0, kv, selection);
}
