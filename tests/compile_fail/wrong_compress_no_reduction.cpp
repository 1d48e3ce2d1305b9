// first: reduce is called with the scores
#include "scorer.hpp"

const ckv::Plan plan{shape, ckv::score::Tova{}, ckv::select::SharedTopK{}, uniform};

void compress(const ckv::StridedKv<float>& kv, const ckv::QueryWindow<float>& queries) {
  ckv::Compressor compressor{plan};
  compressor.compress(0, kv, queries, 3);
}
