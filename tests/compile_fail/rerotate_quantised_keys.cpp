// first: quantised rows are never re-quantised
#include <compresskv/compresskv.hpp>

namespace ckv = compresskv;

const ckv::Plan plan{ckv::ModelShape{.layers = 1, .query_heads = 2, .kv_heads = 1, .head_dim = 32},
                     ckv::score::SemanticRetrieval{ckv::HeadRanking{{{0, 1}}}, {.heads_per_layer = 1}},
                     ckv::select::SharedTopK{}, ckv::budget::Uniform{ckv::Budget::tokens_per_layer(16)}};

void rerotate(const ckv::StridedKv<ckv::BlockQ8_0>& kv) {
  ckv::Compressor compressor{plan};
  compressor.rerotate(0, kv, ckv::kernel::Rotary{});
}
