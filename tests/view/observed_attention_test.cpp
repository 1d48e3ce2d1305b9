// What the window's attention is made of: soft cap, sliding window and sinks against plain code in double;
// attention as rows or as sums in place of queries and keys.

#include <gtest/gtest.h>

#include <cmath>
#include <compresskv/compresskv.hpp>
#include <cstdint>
#include <limits>
#include <string_view>
#include <vector>

#include "reference/errors.hpp"
#include "reference/forced_path.hpp"
#include "reference/layer_case.hpp"

namespace compresskv {
namespace {

using reference::expect_error;
using reference::Layer;
using reference::LayerCase;
using reference::Random;
using Rows = std::vector<std::uint32_t>;

struct Options {
  float scale;
  float soft_cap;
  std::size_t sliding_window;
  bool sinks;
};

std::vector<float> copy_of(const Scores<Granularity::layer>& scores) {
  return {scores.values().begin(), scores.values().end()};
}

/// Scores of what is left of the layer: rows at `positions`, the last of them the window's.
class Reference {
 public:
  std::vector<double> scores;
  double tolerance = 0.0;

  Reference(const Layer<float>& layer, const Rows& positions, const Options& options,
            const std::vector<float>& sinks) {
    const LayerCase& c = layer.sizes;
    const std::size_t rows = positions.size();
    const double cap = static_cast<double>(options.soft_cap);
    double mass = 0.0;
    std::vector<std::vector<double>> sums;
    for (std::size_t k = 0; k < c.heads_per_layer; ++k) {
      const std::size_t head = layer.ranking[0][k];
      sums.emplace_back(rows - c.window, 0.0);
      for (std::size_t i = 0; i < c.window; ++i) {
        const std::size_t own = rows - c.window + i;
        std::vector<double> weights;
        double total = options.sinks ? std::exp(static_cast<double>(sinks[head])) : 0.0;
        for (std::size_t row = 0; row <= own; ++row) {
          double logit = 0.0;
          double absolute = 0.0;
          for (std::size_t dim = 0; dim < c.head_dim; ++dim) {
            const double product = layer.query(head, i, dim) * layer.key(head / c.group, row, dim) *
                                   static_cast<double>(options.scale);
            logit += product;
            absolute += std::abs(product);
          }
          mass = std::max(mass, absolute);
          if (cap > 0.0) {
            logit = cap * std::tanh(logit / cap);
          }
          const bool seen =
              options.sliding_window == 0 || positions[own] - positions[row] < options.sliding_window;
          weights.push_back(seen ? std::exp(logit) : 0.0);
          total += weights.back();
        }
        for (std::size_t t = 0; t < sums.back().size(); ++t) {
          sums.back()[t] += weights[t] / total;
        }
      }
    }
    scores = reference::layer_scores(sums, c.pool, c.pool_width);
    // soft_cap_row promises 2e-7 of the cap, above and below the fraction bar.
    tolerance =
        reference::score_tolerance(c.head_dim, rows, c.window, c.pool_width, c.heads_per_layer, mass) +
        4.0 * 2e-7 * cap;
  }
};

TEST(ObservedAttention, SoftCapSlidingWindowAndSinksAreTheReferences) {
  std::vector<Options> options;
  for (const float cap : {0.0F, 2.0F, 30.0F}) {
    for (const std::size_t sliding : {0U, 1U, 9U, 40U, 1000U}) {
      for (const bool sinks : {false, true}) {
        options.push_back({cap == 2.0F ? 0.3F : 0.125F, cap, sliding, sinks});
      }
    }
  }
  std::uint64_t seed = 0;
  for (const Options& chosen : options) {
    for (const bool evicted : {false, true}) {
      const LayerCase c{.group = 2,
                        .kv_heads = 2,
                        .head_dim = seed % 2 == 0 ? 64U : 20U,
                        .rows = 150,
                        .capacity = 40,
                        .heads_per_layer = 3,
                        .extra_queries = seed % 3,
                        .seed = ++seed};
      SCOPED_TRACE(testing::Message()
                   << c << " cap " << chosen.soft_cap << " sliding " << chosen.sliding_window << " sinks "
                   << chosen.sinks << " evicted " << evicted);
      Layer<float> layer(c);
      Random random(seed);
      std::vector<float> sinks(c.query_heads());
      for (float& sink : sinks) {
        sink = 4.0F * random.gaussian();
      }
      Rows positions;
      for (std::uint32_t row = 0; row < c.rows; ++row) {
        if (!evicted || row == 0 || row + 3 > c.rows || random.below(3) == 0) {
          positions.push_back(row);
        }
      }
      Compressor compressor{layer.plan};
      compressor.begin(c.rows);
      compressor.compact(0, layer.cache.view(), Selection::shared_by_heads(positions));
      KvShape now = layer.cache.shape;
      now.rows = positions.size();
      const StridedKv<float> view(layer.cache.keys.data(), layer.cache.values.data(), now,
                                  layer.cache.strides);
      const QueryWindow<float> observation(
          layer.queries.data(),
          QueryShape{.query_heads = c.query_heads(),
                     .queries = layer.shown(),
                     .head_dim = c.head_dim,
                     .scale = chosen.scale,
                     .soft_cap = chosen.soft_cap,
                     .sliding_window = chosen.sliding_window,
                     .sinks = chosen.sinks ? std::span<const float>(sinks) : std::span<const float>()});
      const auto scores = copy_of(compressor.score(0, view, observation));
      const Reference expected(layer, positions, chosen, sinks);
      ASSERT_EQ(scores.size(), expected.scores.size());
      for (std::size_t t = 0; t < scores.size(); ++t) {
        ASSERT_NEAR(static_cast<double>(scores[t]), expected.scores[t],
                    expected.tolerance * expected.scores[t] + 1e-36)
            << "row " << t;
      }
      const reference::ForcedPath portable(kernel::CodePath::portable);
      EXPECT_TRUE(reference::same_bytes(copy_of(compressor.score(0, view, observation)), scores))
          << "code path";
    }
  }
}

TEST(ObservedAttention, TokensBehindTheSlidingWindowGoFirst) {
  Layer<float> layer({.rows = 100, .window = 4, .capacity = 30, .pool_width = 1});
  Compressor compressor{layer.plan};
  compressor.begin(100);
  const QueryWindow<float> observation(layer.queries.data(),
                                       {.query_heads = 1, .queries = 4, .head_dim = 8, .sliding_window = 20});
  const Retained& kept = compressor.compress(0, layer.cache.view(), observation);
  // Queries 96 .. 99 see positions 77 .. 99; seven rows more have no attention, and the lowest of them stay.
  Rows expected{0, 1, 2, 3, 4, 5, 6};
  for (std::uint32_t position = 77; position < 100; ++position) {
    expected.push_back(position);
  }
  EXPECT_EQ(Rows(kept.positions().begin(), kept.positions().end()), expected);
}

TEST(ObservedAttention, RejectsOptionsByName) {
  std::vector<float> queries(100);
  const std::vector<float> sinks(3);
  const auto make = [&](const QueryShape& shape) { QueryWindow<float>(queries.data(), shape); };
  for (const float cap :
       {-1.0F, std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
    expect_error<ArgumentError>(
        [&] { make({.query_heads = 2, .queries = 2, .head_dim = 8, .soft_cap = cap}); },
        {"QueryWindow: soft_cap is ", "finite and above 0"});
  }
  expect_error<ArgumentError>([&] { make({.query_heads = 2, .queries = 2, .head_dim = 8, .sinks = sinks}); },
                              {"QueryWindow: 3 sinks for 2 query heads", "one a head"});
}

/// Float weights of every query head's window over all rows: [query_head][query][row].
std::vector<float> weights_of(const Layer<float>& layer) {
  std::vector<float> out;
  for (std::size_t head = 0; head < layer.sizes.query_heads(); ++head) {
    for (const auto& row : layer.attention(head).weights) {
      for (const double weight : row) {
        out.push_back(static_cast<float>(weight));
      }
    }
  }
  return out;
}

TEST(ObservedAttention, SumsSelectAsTheRowsThatTheyAreSumsOf) {
  for (const LayerCase& c : reference::layer_cases(20, 41)) {
    SCOPED_TRACE(c);
    LayerCase plain = c;
    plain.extra_queries = 0;
    Layer<float> layer(plain);
    const std::vector<float> weights = weights_of(layer);
    const std::size_t window = plain.observed();
    std::vector<float> sums(c.query_heads() * c.rows, 0.0F);
    for (std::size_t head = 0; head < c.query_heads(); ++head) {
      for (std::size_t i = 0; i < window; ++i) {
        for (std::size_t t = 0; t < c.rows; ++t) {
          // The window's own columns are not read: what stands there must not matter.
          sums[head * c.rows + t] = t + window < c.rows
                                        ? sums[head * c.rows + t] + weights[(head * window + i) * c.rows + t]
                                        : std::numeric_limits<float>::quiet_NaN();
        }
      }
    }
    const AttentionShape shape{.query_heads = c.query_heads(), .queries = window, .tokens = c.rows};
    const AttentionMatrix<float> matrix(weights.data(), shape);
    const AttentionSums summed(sums.data(), shape);
    Compressor compressor{layer.plan};
    compressor.begin(c.rows);
    const auto expected = copy_of(compressor.score(0, matrix));
    const auto scores = compressor.score(0, summed);
    EXPECT_TRUE(reference::same_bytes(copy_of(scores), expected)) << "bit for bit";
    const Selection alone = compressor.select(0, scores);
    EXPECT_EQ(compressor.select(0, matrix), alone) << "in one call";
    EXPECT_EQ(compressor.select(0, summed), alone);
    const Retained& kept = compressor.compress(0, layer.cache.view(), summed);
    EXPECT_EQ(Rows(kept.positions().begin(), kept.positions().end()),
              Rows(alone.rows().begin(), alone.rows().end()));
  }
}

TEST(ObservedAttention, SumsOfAnotherShapeAreRefused) {
  Layer<float> layer({.group = 2, .rows = 40});
  Compressor compressor{layer.plan};
  compressor.begin(40);
  std::vector<float> sums(2 * 40, 0.1F);
  const auto compress = [&](const AttentionShape& shape) {
    compressor.compress(0, layer.cache.view(), AttentionSums(sums.data(), shape));
  };
  expect_error<ArgumentError>([&] { compress({.query_heads = 2, .queries = 9, .tokens = 40}); },
                              {"attention sums are over 9 queries", "window has 8", "sum over the last 8"});
  expect_error<ArgumentError>([&] { compress({.query_heads = 2, .queries = 8, .tokens = 39}); },
                              {"attention has 39 columns", "40 rows"});
  expect_error<ArgumentError>([&] { compress({.query_heads = 1, .queries = 8, .tokens = 40}); },
                              {"observation has 1 query heads", "model has 2"});
  expect_error<ArgumentError>([&] { compress({.query_heads = 2, .queries = 8, .tokens = 0}); },
                              {"AttentionSums: shape has 2 heads, 8 queries, 0 tokens"});
  const float* null = nullptr;
  expect_error<ArgumentError>([&] { AttentionSums(null, {.query_heads = 1, .queries = 1, .tokens = 1}); },
                              {"AttentionSums: sums is null"});
  sums[layer.ranking[0][0] * 40 + 5] = std::numeric_limits<float>::infinity();
  expect_error<ScoreError>([&] { compress({.query_heads = 2, .queries = 8, .tokens = 40}); },
                           {"token 5 ", "is not finite"});
}

TEST(ObservedAttention, TellsNaNFromWeightsThatAreNone) {
  Layer<float> layer({.group = 1, .rows = 40});
  std::vector<float> weights(8 * 40, 0.01F);
  const auto compress = [&](const auto& scorer) {
    const Plan plan{layer.shape, scorer, select::GroupedTopK{},
                    budget::Uniform{Budget::tokens_per_layer(16)}};
    Compressor compressor{plan};
    compressor.begin(40);
    compressor.compress(0, layer.cache.view(),
                        AttentionMatrix(weights.data(), {.query_heads = 1, .queries = 8, .tokens = 40}));
  };
  weights[3 * 40 + 5] = std::numeric_limits<float>::quiet_NaN();
  const auto nan = {std::string_view("query head 0 token 5 is not finite"),
                    std::string_view("the attention given holds NaN or infinite values")};
  expect_error<ScoreError>([&] { compress(score::SnapKv{}); }, nan);
  expect_error<ScoreError>([&] { compress(score::Cake{}); }, nan);
  weights[3 * 40 + 5] = std::numeric_limits<float>::max();
  weights[4 * 40 + 5] = std::numeric_limits<float>::max();
  const auto large = {std::string_view("query head 0 token 5 is not finite"),
                      std::string_view("the attention given is finite"),
                      std::string_view("give probabilities")};
  expect_error<ScoreError>([&] { compress(score::SnapKv{}); }, large);
  expect_error<ScoreError>([&] { compress(score::Cake{}); }, large);
}

}  // namespace
}  // namespace compresskv
