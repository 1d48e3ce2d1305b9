// expect: deleted
#include <compresskv/compresskv.hpp>

namespace ckv = compresskv;

void compress() {
  ckv::Compressor compressor{
      ckv::Plan{ckv::ModelShape{.layers = 1, .query_heads = 2, .kv_heads = 1, .head_dim = 8},
                ckv::score::Knorm{{.window = 8}}, ckv::select::GroupedTopK{},
                ckv::budget::Uniform{ckv::Budget::tokens_per_layer(16)}}};
}
