// first: the rows to keep are a Selection
#include "scorer.hpp"

const ckv::Plan plan{shape, ckv::score::Tova{}, ckv::select::SharedTopK{}, uniform};

void gather(const ckv::StridedKv<float>& kv, const ckv::Selection& selection,
            const ckv::StridedKv<float>& target) {
  ckv::Compressor compressor{plan};
  compressor.gather(0, kv, target, selection);
}
