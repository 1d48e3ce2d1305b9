// first: the rows to keep are a Selection
#include <vector>

#include "scorer.hpp"

const ckv::Plan plan{shape, ckv::score::Tova{}, ckv::select::SharedTopK{}, uniform};

void compact(const ckv::StridedKv<float>& kv, const std::vector<std::uint32_t>& rows) {
  ckv::Compressor compressor{plan};
  compressor.compact(0, kv, rows);
}
