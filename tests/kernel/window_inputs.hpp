#pragma once

#include <gtest/gtest.h>

#include <compresskv/kernel/window_attention.hpp>
#include <compresskv/view/query_window.hpp>
#include <cstdint>
#include <vector>

#include "reference/cache.hpp"
#include "reference/random.hpp"

namespace compresskv::kernel {

inline constexpr std::size_t head_dim = 64;

/// A layer of two KV heads and the queries of its window.
struct WindowInputs {
  ModelShape shape;
  reference::Cache<float> cache;
  std::vector<float> queries;  // [query_head][window][dim]
  std::size_t window;

  WindowInputs(std::size_t layers, std::size_t group, std::size_t rows, std::size_t window_size)
      : shape{.layers = layers, .query_heads = 2 * group, .kv_heads = 2, .head_dim = head_dim},
        cache({.kv_heads = 2, .rows = rows, .head_dim = head_dim}, reference::Arrangement::head_token_dim),
        queries(2 * group * window_size * head_dim),
        window(window_size) {
    reference::Random random(101);
    cache.fill(random);
    for (float& x : queries) {
      x = random.gaussian();
    }
  }

  /// The sums of each of `heads`; `observed` says what queries look like beside their numbers.
  std::vector<std::vector<float>> sums(const std::vector<std::uint32_t>& heads, Workspace& workspace,
                                       QueryShape observed = {}) {
    const auto kv = cache.view();
    observed.query_heads = shape.query_heads;
    observed.queries = window;
    observed.head_dim = head_dim;
    const QueryWindow<float> observation(queries.data(), observed);
    const std::vector<std::size_t> rows(2, cache.shape.rows);
    const Retained retained;  // of a sequence that nothing was evicted from
    const LayerInput<StridedKv<float>, QueryWindow<float>> input{.shape = shape,
                                                                 .layer = 3,
                                                                 .rows = rows,
                                                                 .window = window,
                                                                 .retained = retained,
                                                                 .kv = kv,
                                                                 .observation = observation};
    SerialExecutor executor;
    std::vector<std::vector<float>> out;
    window_attention(input, heads, workspace, executor,
                     [&](std::uint32_t head, std::span<const float> values) {
                       EXPECT_EQ(head, heads[out.size()]) << "ascending, each once";
                       out.emplace_back(values.begin(), values.end());
                     });
    return out;
  }
};

}  // namespace compresskv::kernel
