// first: the layer's view is missing
#include "scorer.hpp"

const ckv::Plan plan{shape, ckv::score::Tova{}, ckv::select::SharedTopK{}, uniform};

void compact(const ckv::StridedKv<float>& kv, const ckv::Selection& selection) {
  ckv::Compressor compressor{plan};
  compressor.compact(0, selection, kv);
}
