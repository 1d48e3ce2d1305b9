// first: what repeats the context is shown by its queries: give a QueryWindow
#include "scorer.hpp"

const ckv::Plan plan{shape, ckv::score::KvZip{}, ckv::select::WholeModel{}, uniform};

void observe(const ckv::StridedKv<float>& kv, const ckv::AttentionMatrix<float>& attention) {
  ckv::Compressor compressor{plan};
  compressor.observe(0, kv, {.first = 0, .last = 8}, attention);
}
