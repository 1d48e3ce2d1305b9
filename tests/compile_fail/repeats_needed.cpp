// first: this scorer is shown tokens that repeat the context: call observe\(\) for each stretch
#include "scorer.hpp"

const ckv::Plan plan{shape, ckv::score::KvZip{}, ckv::select::WholeModel{}, uniform};

void arrive(const ckv::StridedKv<float>& kv, const ckv::QueryWindow<float>& queries) {
  ckv::Compressor compressor{plan};
  compressor.arrive(
      0, [&](std::size_t) { return kv; }, queries);
}
