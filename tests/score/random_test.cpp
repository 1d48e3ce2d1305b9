#include <gtest/gtest.h>

#include <algorithm>
#include <compresskv/score/random.hpp>
#include <set>
#include <vector>

#include "reference/errors.hpp"
#include "reference/methods.hpp"

namespace compresskv {
namespace {

using reference::expect_error;

const ModelShape shape{.layers = 2, .query_heads = 4, .kv_heads = 2, .head_dim = 8};

std::vector<float> scores_of(std::uint64_t seed, std::size_t layer, std::size_t tokens) {
  const Plan plan{shape, score::Random{{.seed = seed, .window = 1}}, select::GroupedTopK{},
                  budget::Uniform{Budget::tokens_per_layer(10)}};
  Compressor compressor{plan};
  compressor.begin(tokens);
  const std::vector<float> none(4 * tokens, 0.0F);
  const auto values = compressor
                          .score(layer, AttentionMatrix<float>(
                                            none.data(), {.query_heads = 4, .queries = 1, .tokens = tokens}))
                          .values();
  return {values.begin(), values.end()};
}

TEST(Random, IsUniformAndDependsOnSeedLayerHeadAndPosition) {
  const auto scores = scores_of(1, 0, 10001);
  double mean = 0.0;
  double square = 0.0;
  for (const float score : scores) {
    ASSERT_TRUE(score >= 0.0F && score < 1.0F);
    mean += static_cast<double>(score) / static_cast<double>(scores.size());
    square += static_cast<double>(score * score) / static_cast<double>(scores.size());
  }
  // 20,000 draws: four standard deviations.
  EXPECT_NEAR(mean, 0.5, 4.0 * 0.2887 / 141.0);
  EXPECT_NEAR(square, 1.0 / 3.0, 4.0 * 0.298 / 141.0);
  EXPECT_GT(std::set<float>(scores.begin(), scores.end()).size(), 19900U);
  EXPECT_NE(scores, scores_of(2, 0, 10001));
  EXPECT_NE(scores, scores_of(1, 1, 10001));
  EXPECT_EQ(scores, scores_of(1, 0, 10001));
  const auto shorter = scores_of(1, 0, 501);
  EXPECT_TRUE(std::equal(shorter.begin(), shorter.begin() + 500, scores.begin()))
      << "a token's score does not depend on the prompt's length";
}

TEST(Random, ATokenKeepsItsScoreWhenItsRowChanges) {
  reference::Layer<float> layer({.group = 1, .kv_heads = 2, .rows = 100});
  const Plan plan{layer.shape, score::Random{}, select::GroupedTopK{},
                  budget::Uniform{Budget::tokens_per_layer(40)}};
  Compressor compressor{plan};
  compressor.begin(100);
  const auto before = compressor.score(0, layer.cache.view());
  const std::vector<float> first(before.row(1).begin(), before.row(1).end());
  const Retained& kept = compressor.compress(0, layer.cache.view());
  KvShape now = layer.cache.shape;
  now.rows = kept.rows();
  const StridedKv<float> view(layer.cache.keys.data(), layer.cache.values.data(), now, layer.cache.strides);
  const auto after = compressor.score(0, view);
  for (std::size_t row = 0; row < after.tokens(1); ++row) {
    ASSERT_EQ(after.row(1)[row], first[kept.position(row, 1)]) << "row " << row;
  }
}

TEST(Random, RejectsNoWindow) {
  expect_error<ArgumentError>([] { score::Random{{.window = 0}}; }, {"window is 0"});
}

}  // namespace
}  // namespace compresskv
