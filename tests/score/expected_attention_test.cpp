#include <gtest/gtest.h>

#include <algorithm>
#include <compresskv/score/expected_attention.hpp>
#include <cstdint>
#include <limits>
#include <vector>

#include "reference/errors.hpp"
#include "reference/statistics_methods.hpp"

namespace compresskv {
namespace {

using reference::expect_error;
using reference::Layer;
using reference::LayerCase;
using reference::Standing;

/// Each score within `relative` of the reference, and sinks above all others.
void expect_expected(const Scores<Granularity::kv_head>& scores, const reference::ScoreRows& expected,
                     const Standing& at, double relative) {
  ASSERT_EQ(scores.rows(), expected.size());
  for (std::size_t row = 0; row < expected.size(); ++row) {
    ASSERT_EQ(scores.tokens(row), expected[row].size());
    for (std::size_t t = 0; t < expected[row].size(); ++t) {
      const auto score = static_cast<double>(scores.row(row)[t]);
      if (t < at.sink_rows) {
        ASSERT_GT(score, 1e38) << "row " << row << " token " << t;
        ASSERT_LT(score, 3e38) << "protected tokens come first";
      } else {
        // Weights below 2^-126 are 0.
        ASSERT_NEAR(score, expected[row][t], relative * expected[row][t] + 1e-30)
            << "row " << row << " token " << t;
      }
    }
  }
}

/// Logits round 2^-23 of their terms' sum for each step of the longest sum, which exp carries on.
double slack_of(double largest_mass, std::size_t head_dim) {
  return 0x1p-23 * (largest_mass * (2.0 * static_cast<double>(head_dim) + 8.0) + 64.0);
}

TEST(ExpectedAttention, IsTheReferenceOverGeneratedLayers) {
  std::size_t tried = 0;
  for (const LayerCase& c : reference::layer_cases(24, 91)) {
    if (c.head_dim % 4 != 0 || c.head_dim > 64 || c.rows > 600) {
      continue;  // the reference takes head_dim^3 for each position to come
    }
    SCOPED_TRACE(c);
    Layer<float> layer(c);
    const auto rotaries = reference::rotary_kinds(c.head_dim);
    const Rotary rotary = rotaries[c.seed % rotaries.size()];
    const QueryStatistics statistics = reference::query_statistics(layer.shape, c.seed, rotary);
    const score::ExpectedAttention::Options options{
        .window = c.window, .future = 1 + c.seed % 20, .epsilon = c.seed % 2 == 0 ? 0.0 : 0.01};
    const Standing at{.sink_rows = std::min<std::size_t>(4, c.rows), .next_position = c.rows};
    double mass = 0.0;
    const auto expected =
        reference::expected_attention(layer, statistics, 0, at, options.future, options.epsilon, mass);
    const Plan plan{layer.shape, score::ExpectedAttention{statistics, options}, select::GroupedTopK{},
                    budget::Uniform{Budget::tokens_per_layer(c.capacity)}};
    Compressor compressor{plan};
    compressor.begin(c.rows);
    expect_expected(compressor.score(0, layer.cache.view()), expected, at, slack_of(mass, c.head_dim));
    ++tried;
  }
  EXPECT_GT(tried, 15U);
}

TEST(ExpectedAttention, LooksFromWhereTheSequenceGoesOn) {
  // A second turn: rows are no positions any more, and some rows came since.
  for (const Rotary& rotary : reference::rotary_kinds(16)) {
    Layer<float> layer({.group = 2, .kv_heads = 2, .head_dim = 16, .rows = 200, .window = 8, .capacity = 30});
    const QueryStatistics statistics = reference::query_statistics(
        {.layers = 3, .query_heads = 4, .kv_heads = 2, .head_dim = 16}, 5, rotary);
    const ModelShape shape{.layers = 3, .query_heads = 4, .kv_heads = 2, .head_dim = 16};
    const Plan plan{shape, score::ExpectedAttention{statistics}, select::GroupedTopK{},
                    budget::Uniform{Budget::tokens_per_layer(30)}};
    Compressor compressor{plan};
    compressor.begin(200);
    const std::vector<std::uint32_t> kept{0, 3, 7, 50, 51, 90, 120, 121, 122, 150, 198, 199};
    compressor.compact(2, layer.cache.view(), Selection::shared_by_heads(kept));
    compressor.begin_turn(240);
    layer.cache.shape.rows = kept.size() + 40;
    layer.sizes.rows = layer.cache.shape.rows;
    const Standing at{.sink_rows = 2, .next_position = 240};  // positions 0 and 3
    double mass = 0.0;
    const auto expected = reference::expected_attention(layer, statistics, 2, at, 512, 0.0, mass);
    expect_expected(compressor.score(2, layer.cache.view()), expected, at, slack_of(mass, 16));
  }
}

TEST(ExpectedAttention, KeepsSinksWindowAndWhatIsExpectedToBeSeen) {
  Layer<float> layer({.head_dim = 8, .rows = 60, .window = 4, .capacity = 10});
  const QueryStatistics statistics = reference::query_statistics(layer.shape);
  const Plan plan{layer.shape, score::ExpectedAttention{statistics, {.window = 4}}, select::GroupedTopK{},
                  budget::Uniform{Budget::tokens_per_layer(10)}};
  Compressor compressor{plan};
  compressor.begin(60);
  const auto row = compressor.score(0, layer.cache.view()).row(0);
  const auto best = static_cast<std::uint32_t>(std::max_element(row.begin() + 4, row.end()) - row.begin());
  const Retained& retained = compressor.compress(0, layer.cache.view());
  const std::vector<std::uint32_t> kept(retained.positions().begin(), retained.positions().end());
  for (const std::uint32_t position : {0U, 1U, 2U, 3U, best, 56U, 57U, 58U, 59U}) {
    EXPECT_TRUE(std::binary_search(kept.begin(), kept.end(), position)) << position;
  }
}

TEST(ExpectedAttention, ProtectedTokensComeBeforeSinks) {
  Layer<float> layer({.head_dim = 8, .rows = 60, .window = 4, .capacity = 6});
  const Plan plan{layer.shape,
                  score::ExpectedAttention{reference::query_statistics(layer.shape), {.window = 4}},
                  select::GroupedTopK{}, budget::Uniform{Budget::tokens_per_layer(6)}};
  Compressor compressor{plan};
  const std::vector<std::uint32_t> positions{20, 30};
  compressor.begin(60, {.positions = positions});
  const Retained& retained = compressor.compress(0, layer.cache.view());
  EXPECT_EQ(std::vector<std::uint32_t>(retained.positions().begin(), retained.positions().end()),
            (std::vector<std::uint32_t>{20, 30, 56, 57, 58, 59}));
}

TEST(ExpectedAttention, LongFiniteKeysAndValuesHaveScores) {
  Layer<float> layer({.head_dim = 8, .rows = 30, .window = 2, .capacity = 8});
  const Plan plan{layer.shape,
                  score::ExpectedAttention{reference::query_statistics(layer.shape), {.window = 2}},
                  select::GroupedTopK{}, budget::Uniform{Budget::tokens_per_layer(8)}};
  for (std::size_t e = 0; e < 8; ++e) {
    layer.cache.keys[layer.cache.at(0, 9, e)] = 3e38F;
    layer.cache.values[layer.cache.at(0, 9, e)] = 3e38F;
    layer.cache.values[layer.cache.at(0, 12, e)] = 3e38F;
  }
  Compressor compressor{plan};
  compressor.begin(30);
  const auto row = compressor.score(0, layer.cache.view()).row(0);
  for (std::size_t t = 0; t < row.size(); ++t) {
    EXPECT_TRUE(std::isfinite(row[t])) << t;
  }
  compressor.compress(0, layer.cache.view());
}

TEST(ExpectedAttention, NamesWhatIsNotFinite) {
  for (const float poison :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    const Layer<float> clean(
        {.group = 2, .kv_heads = 2, .head_dim = 8, .rows = 40, .window = 2, .capacity = 8});
    const Plan plan{clean.shape,
                    score::ExpectedAttention{reference::query_statistics(clean.shape), {.window = 2}},
                    select::GroupedTopK{}, budget::Uniform{Budget::tokens_per_layer(8)}};
    Compressor compressor{plan};
    compressor.begin(40);
    Layer<float> layer = clean;
    layer.cache.keys[layer.cache.at(1, 27, 3)] = poison;
    expect_error<ScoreError>([&] { compressor.compress(0, layer.cache.view()); }, {"row 1 token 27 is "});
    layer = clean;
    layer.cache.values[layer.cache.at(1, 27, 3)] = poison;
    expect_error<ScoreError>([&] { compressor.compress(0, layer.cache.view()); }, {"row 1 token 27 is "});
    layer = clean;
    layer.cache.keys[layer.cache.at(1, 39, 3)] = poison;  // of the window: all are weighed against it
    expect_error<ScoreError>([&] { compressor.compress(0, layer.cache.view()); },
                             {"row 1 token ", "scores must be finite"});
  }
}

TEST(ExpectedAttention, RefusesWhatItCannotUse) {
  const ModelShape shape{.layers = 1, .query_heads = 2, .kv_heads = 1, .head_dim = 8};
  const QueryStatistics statistics = reference::query_statistics(shape);
  const auto refused = [&](const score::ExpectedAttention::Options& options,
                           std::initializer_list<std::string_view> parts) {
    expect_error<ArgumentError>([&] { score::ExpectedAttention(statistics, options); }, parts);
  };
  refused({.window = 0}, {"window is 0"});
  refused({.future = 0}, {"future is 0"});
  refused({.epsilon = -0.1}, {"epsilon is -0.1"});
  refused({.epsilon = std::numeric_limits<double>::quiet_NaN()}, {"epsilon is nan"});
  refused({.scale = -1.0F}, {"scale is -1"});
  refused({.scale = std::numeric_limits<float>::infinity()}, {"scale is inf"});
  const ModelShape other{.layers = 2, .query_heads = 2, .kv_heads = 1, .head_dim = 8};
  expect_error<ArgumentError>(
      [&] {
        Plan(other, score::ExpectedAttention{statistics}, select::GroupedTopK{},
             budget::Uniform{Budget::tokens_per_layer(9)});
      },
      {"query statistics are of 1 layers of 2 heads of 8 elements, the model has 2 of 2 of 8"});
}

}  // namespace
}  // namespace compresskv
