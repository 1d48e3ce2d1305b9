// first: rows move as they are
#include <compresskv/compresskv.hpp>

namespace ckv = compresskv;

const ckv::Plan plan{ckv::ModelShape{.layers = 1, .query_heads = 2, .kv_heads = 1, .head_dim = 8},
                     ckv::score::SemanticRetrieval{ckv::HeadRanking{{{0, 1}}}, {.heads_per_layer = 1}},
                     ckv::select::SharedTopK{}, ckv::budget::Uniform{ckv::Budget::tokens_per_layer(16)}};

void gather(const ckv::StridedKv<float>& source, const ckv::Selection& selection,
            const ckv::StridedKv<ckv::half>& target) {
  ckv::Compressor compressor{plan};
  compressor.gather(0, source, selection, target);
}
