// examples/hello/main.cpp: what an engine does at the end of each layer's prefill.
#include <compresskv/compresskv.hpp>
#include <cstdio>
#include <vector>

namespace ckv = compresskv;

int main() {
  const ckv::ModelShape model{.layers = 2, .query_heads = 4, .kv_heads = 2, .head_dim = 64};
  const std::size_t dim = model.head_dim, tokens = 1000, needle = 333;
  const ckv::Plan plan{model, ckv::score::SnapKv{}, ckv::select::GroupedTopK{},
                       ckv::budget::Uniform{ckv::Budget::kept_ratio(0.1)}};  // once per model
  ckv::Compressor compressor{plan};                                          // once per sequence
  compressor.begin(tokens);

  for (std::size_t layer = 0; layer < model.layers; ++layer) {
    // Stands for your prefill: keys and values as [kv_head][token][dim], bfloat16, and the last 8 queries.
    std::vector<ckv::bfloat16> keys(model.kv_heads * tokens * dim), values(keys.size());
    const std::vector<ckv::bfloat16> queries(model.query_heads * 8 * dim, ckv::bfloat16(1.0F));
    for (std::size_t i = 0; i < dim; ++i) keys[needle * dim + i] = ckv::bfloat16(1.0F);

    const ckv::KvShape cached{.kv_heads = model.kv_heads, .rows = tokens, .head_dim = dim};
    const ckv::StridedKv kv{keys.data(), values.data(), cached, ckv::layout::head_token_dim};
    const ckv::QueryShape shown{.query_heads = model.query_heads, .queries = 8, .head_dim = dim};
    const ckv::Retained& kept = compressor.compress(layer, kv, ckv::QueryWindow{queries.data(), shown});

    std::printf("layer %zu: %zu of %zu rows, token %zu %s; next position %zu\n", layer, kept.rows(), tokens,
                needle, kept.row(needle) ? "stayed" : "went", kept.next_position());
  }
}
