#include <gtest/gtest.h>

#include <compresskv/score/tri_attention.hpp>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "reference/errors.hpp"
#include "reference/statistics_methods.hpp"

namespace compresskv {
namespace {

using reference::expect_error;
using reference::Layer;
using reference::LayerCase;

std::vector<std::size_t> first_positions(std::size_t count) {
  std::vector<std::size_t> out(count);
  std::iota(out.begin(), out.end(), std::size_t{0});
  return out;
}

TEST(TriAttention, IsTheReferenceOverGeneratedLayers) {
  std::size_t tried = 0;
  for (const LayerCase& c : reference::layer_cases(24, 97)) {
    if (c.head_dim % 4 != 0 || c.rows > 600) {
      continue;
    }
    SCOPED_TRACE(c);
    Layer<float> layer(c);
    const auto rotaries = reference::rotary_kinds(c.head_dim);
    const Rotary rotary = rotaries[c.seed % rotaries.size()];
    const QueryStatistics statistics = reference::query_statistics(layer.shape, c.seed, rotary);
    const score::TriAttention::Options options{
        .window = c.window,
        .distances = c.seed % 3 == 0 ? std::size_t{17} : c.seed % 5 + 1,
        .normalise = c.seed % 2 == 0};
    const auto expected = reference::tri_attention(layer, statistics, 0, first_positions(c.rows), c.rows,
                                                   options.distances, options.normalise);
    // One token has no deviation but what rounding gives it.
    if (options.normalise && c.rows - c.observed() < 3) {
      continue;
    }
    reference::expect_scores(score::TriAttention{statistics, options}, layer, expected, 1e-5,
                             1e-5 * static_cast<double>(c.head_dim));
    ++tried;
  }
  EXPECT_GT(tried, 15U);
}

TEST(TriAttention, CountsDistancesByTruePositions) {
  for (const Rotary& rotary : reference::rotary_kinds(16)) {
    Layer<float> layer({.group = 2, .kv_heads = 2, .head_dim = 16, .rows = 200, .window = 8, .capacity = 30});
    const ModelShape shape{.layers = 3, .query_heads = 4, .kv_heads = 2, .head_dim = 16};
    const QueryStatistics statistics = reference::query_statistics(shape, 5, rotary);
    const Plan plan{shape, score::TriAttention{statistics}, select::GroupedTopK{},
                    budget::Uniform{Budget::tokens_per_layer(30)}};
    Compressor compressor{plan};
    compressor.begin(200);
    const std::vector<std::uint32_t> kept{0, 3, 7, 50, 51, 90, 120, 121, 122, 150, 198, 199};
    compressor.compact(2, layer.cache.view(), Selection::shared_by_heads(kept));
    compressor.begin_turn(240);
    layer.cache.shape.rows = kept.size() + 40;
    layer.sizes.rows = layer.cache.shape.rows;
    std::vector<std::size_t> positions(kept.begin(), kept.end());
    for (std::size_t i = 0; i < 40; ++i) {
      positions.push_back(200 + i);
    }
    const auto expected = reference::tri_attention(layer, statistics, 2, positions, 240, 17, false);
    const auto scores = compressor.score(2, layer.cache.view());
    for (std::size_t head = 0; head < 2; ++head) {
      ASSERT_EQ(scores.tokens(head), expected[head].size());
      for (std::size_t t = 0; t < expected[head].size(); ++t) {
        ASSERT_NEAR(static_cast<double>(scores.row(head)[t]), expected[head][t], 2e-5) << head << ", " << t;
      }
    }
  }
}

TEST(TriAttention, NormalisesByEachHead) {
  // Keys that are all alike: no deviation, and all scores 0.
  Layer<float> layer({.head_dim = 8, .rows = 20, .window = 2, .capacity = 4});
  std::fill(layer.cache.keys.begin(), layer.cache.keys.end(), 0.0F);
  const QueryStatistics statistics = reference::query_statistics(layer.shape);
  const Plan plan{layer.shape, score::TriAttention{statistics, {.window = 2, .normalise = true}},
                  select::GroupedTopK{}, budget::Uniform{Budget::tokens_per_layer(4)}};
  Compressor compressor{plan};
  compressor.begin(20);
  for (const float score : compressor.score(0, layer.cache.view()).row(0)) {
    EXPECT_EQ(score, 0.0F);
  }
}

TEST(TriAttention, NamesTheKeyThatIsNotFiniteAndTakesLongOnes) {
  for (const bool normalise : {false, true}) {
    Layer<float> layer({.group = 2, .head_dim = 8, .rows = 20, .window = 2, .capacity = 4});
    const Plan plan{
        layer.shape,
        score::TriAttention{reference::query_statistics(layer.shape), {.window = 2, .normalise = normalise}},
        select::GroupedTopK{}, budget::Uniform{Budget::tokens_per_layer(4)}};
    Compressor compressor{plan};
    compressor.begin(20);
    for (std::size_t e = 0; e < 8; ++e) {
      layer.cache.keys[layer.cache.at(0, 7, e)] = 3e38F;
    }
    EXPECT_TRUE(std::isfinite(compressor.score(0, layer.cache.view()).row(0)[7]));
    for (const float poison :
         {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
      layer.cache.keys[layer.cache.at(0, 7, 2)] = poison;
      expect_error<ScoreError>([&] { compressor.compress(0, layer.cache.view()); }, {"row 0 token 7 is "});
    }
  }
}

TEST(TriAttention, RefusesWhatItCannotUse) {
  const ModelShape shape{.layers = 1, .query_heads = 2, .kv_heads = 1, .head_dim = 8};
  const QueryStatistics statistics = reference::query_statistics(shape);
  expect_error<ArgumentError>([&] { score::TriAttention(statistics, {.window = 0}); }, {"window is 0"});
  for (const std::size_t distances : {0U, 42U}) {
    expect_error<ArgumentError>([&] { score::TriAttention(statistics, {.distances = distances}); },
                                {"distances is ", "must be 1 to 41"});
  }
  const ModelShape other{.layers = 1, .query_heads = 2, .kv_heads = 1, .head_dim = 16};
  expect_error<ArgumentError>(
      [&] {
        Plan(other, score::TriAttention{statistics}, select::GroupedTopK{},
             budget::Uniform{Budget::tokens_per_layer(9)});
      },
      {"query statistics are of 1 layers of 2 heads of 8 elements, the model has 1 of 2 of 16"});
}

}  // namespace
}  // namespace compresskv
