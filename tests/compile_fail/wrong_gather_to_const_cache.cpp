// first: rows move as they are
#include "scorer.hpp"

const ckv::Plan plan{shape, ckv::score::Tova{}, ckv::select::SharedTopK{}, uniform};

void gather(const ckv::StridedKv<float>& kv, const ckv::Selection& selection,
            const ckv::StridedKv<const float>& target) {
  ckv::Compressor compressor{plan};
  compressor.gather(0, kv, selection, target);
}
