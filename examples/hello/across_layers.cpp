// examples/hello/across_layers.cpp: a method whose layers shrink together, with arrive() and finish().
#include <compresskv/compresskv.hpp>
#include <cstdio>
#include <span>
#include <vector>

namespace ckv = compresskv;

struct LayerCache {
  std::vector<ckv::bfloat16> keys, values;  // [kv_head][token][dim]
  std::size_t rows = 0;                     // in use now
};

int main() {
  const ckv::ModelShape model{.layers = 3, .query_heads = 4, .kv_heads = 2, .head_dim = 64};
  const std::size_t dim = model.head_dim, tokens = 1000, window = 16;
  // A real model's scores come from a file: ckv::io::load_head_scores.
  const ckv::HeadScores scores{3, 4, {{0}, {0}, {0.2}, {0}, {0}, {0.9}, {0}, {0}, {0}, {0}, {0}, {0.1}}};
  const ckv::Plan plan{model, ckv::score::Blend{scores, {.heads = 2, .window = window}},
                       ckv::select::SharedTopK{}, ckv::budget::Uniform{ckv::Budget::kept_ratio(0.1)}};
  ckv::Compressor compressor{plan};
  compressor.begin(tokens);

  std::vector<LayerCache> cache(model.layers);
  // views(l) is the view of layer l as it is now, all its rows. Asked for layers that have arrived.
  const auto views = [&](std::size_t l) {
    const ckv::KvShape shape{
        .kv_heads = model.kv_heads, .rows = cache[l].rows, .head_dim = dim, .allocated_rows = tokens};
    return ckv::StridedKv{cache[l].keys.data(), cache[l].values.data(), shape, ckv::layout::head_token_dim};
  };
  // The calls return the layers that shrank: shorten those caches, and no others.
  const auto shorten = [&](std::span<const std::size_t> shrunk) {
    for (const std::size_t l : shrunk) {
      cache[l].rows = compressor.retained(l).rows();
      std::printf("layer %zu: %zu rows\n", l, cache[l].rows);
    }
  };

  for (std::size_t layer = 0; layer < model.layers; ++layer) {
    // Stands for your prefill.
    cache[layer] = {.keys = std::vector<ckv::bfloat16>(model.kv_heads * tokens * dim),
                    .values = std::vector<ckv::bfloat16>(model.kv_heads * tokens * dim),
                    .rows = tokens};
    const std::vector<ckv::bfloat16> queries(model.query_heads * window * dim, ckv::bfloat16(1.0F));
    const ckv::QueryShape shown{.query_heads = model.query_heads, .queries = window, .head_dim = dim};
    shorten(compressor.arrive(layer, views, ckv::QueryWindow{queries.data(), shown}));
  }
  shorten(compressor.finish(views));  // Blend shrinks nothing before all layers have arrived
  std::printf("next position %zu\n", compressor.retained(0).next_position());
}
