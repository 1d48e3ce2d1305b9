#include <gtest/gtest.h>

#include <algorithm>
#include <compresskv/score/h2o.hpp>
#include <vector>

#include "reference/errors.hpp"
#include "reference/methods.hpp"

namespace compresskv {
namespace {

using reference::expect_error;
using reference::Layer;
using reference::LayerCase;

/// Cases small enough for attention of all queries, every one of which is shown.
std::vector<LayerCase> cases() {
  std::vector<LayerCase> out;
  for (LayerCase c : reference::layer_cases(40, 72)) {
    if (c.rows * c.query_heads() > 800) {
      c.rows = std::max<std::size_t>(2, 800 / c.query_heads());
    }
    c.extra_queries = c.rows - c.observed();
    out.push_back(c);
  }
  return out;
}

TEST(H2O, IsTheReferenceOverGeneratedLayers) {
  for (const LayerCase& c : cases()) {
    SCOPED_TRACE(c);
    Layer<float> layer(c);
    // Any query may observe: the bound on a logit is that of a query and a key of any row.
    double mass = 0.0;
    for (std::size_t q = 0; q < layer.queries.size(); q += c.head_dim) {
      const std::size_t head = q / c.head_dim / layer.shown() / c.group;
      for (std::size_t row = 0; row < c.rows; ++row) {
        double sum = 0.0;
        for (std::size_t dim = 0; dim < c.head_dim; ++dim) {
          sum += std::abs(static_cast<double>(layer.queries[q + dim]) * layer.key(head, row, dim));
        }
        mass = std::max(mass, sum * layer.scale());
      }
    }
    const double relative = reference::score_tolerance(c.head_dim, c.rows, c.rows, 1, c.group, mass);
    reference::expect_scores(score::H2O{{.window = c.window}}, layer, reference::h2o(layer), relative,
                             reference::score_underflow(c.rows));
  }
}

TEST(H2O, WantsEveryQueryOfThePromptAndThenThoseSince) {
  Layer<float> layer({.group = 2, .rows = 40, .extra_queries = 32});
  const Plan plan{layer.shape, score::H2O{}, select::GroupedTopK{},
                  budget::Uniform{Budget::tokens_per_layer(12)}};
  Compressor compressor{plan};
  compressor.begin(40);
  const QueryWindow<float> few(layer.queries.data(), {.query_heads = 2, .queries = 39, .head_dim = 8});
  expect_error<ArgumentError>([&] { compressor.compress(0, layer.cache.view(), few); },
                              {"observation shows 39 queries", "the last 40"});
  EXPECT_EQ(compressor.compress(0, layer.cache.view(), layer.observation()).rows(), 12U);
  compressor.begin_turn(60);
  KvShape grown = layer.cache.shape;
  grown.rows = 32;
  const StridedKv<float> view(layer.cache.keys.data(), layer.cache.values.data(), grown, layer.cache.strides);
  const QueryWindow<float> turn(layer.queries.data(), {.query_heads = 2, .queries = 20, .head_dim = 8});
  EXPECT_EQ(compressor.compress(0, view, turn).rows(), 12U);
}

TEST(H2O, SumsOfTheEngineServeAsWell) {
  // Four tokens: the first drew the most attention, the third none.
  const std::vector<float> sums{2.0F, 0.5F, 0.0F, 0.4F, 0.1F};
  const Plan plan{ModelShape{.layers = 1, .query_heads = 1, .kv_heads = 1, .head_dim = 4},
                  score::H2O{{.window = 1}}, select::GroupedTopK{},
                  budget::Uniform{Budget::tokens_per_layer(3)}};
  Compressor compressor{plan};
  compressor.begin(5);
  const auto rows =
      compressor.select(0, AttentionSums(sums.data(), {.query_heads = 1, .queries = 5, .tokens = 5})).rows();
  EXPECT_EQ(std::vector<std::uint32_t>(rows.begin(), rows.end()), (std::vector<std::uint32_t>{0, 1, 4}));
}

TEST(H2O, RejectsNoWindow) {
  expect_error<ArgumentError>([] { score::H2O{{.window = 0}}; }, {"window is 0"});
}

}  // namespace
}  // namespace compresskv
