// How the parts meet; the sums of all methods: compressor_cases_test.cpp.

#include <gtest/gtest.h>

#include <cmath>
#include <compresskv/kernel/window_attention.hpp>
#include <cstdint>
#include <limits>
#include <vector>

#include "kernel/window_inputs.hpp"
#include "reference/scores.hpp"

namespace compresskv::kernel {
namespace {

TEST(WindowAttention, HeadsOfOneKvHeadReadItsKeysAndNoOthers) {
  WindowInputs inputs(1, 2, 50, 4);
  Workspace workspace;
  const auto before = inputs.sums({0, 1}, workspace);
  for (std::size_t row = 0; row < 50; ++row) {
    inputs.cache.keys[inputs.cache.at(1, row, 5)] = std::numeric_limits<float>::quiet_NaN();
  }
  EXPECT_EQ(inputs.sums({0, 1}, workspace), before) << "query heads 0 and 1 read KV head 0";
  EXPECT_THROW(inputs.sums({1, 2}, workspace), ScoreError);
}

TEST(WindowAttention, EachRowSeesTheWindowUpToItself) {
  WindowInputs inputs(1, 1, 20, 4);
  // Only the last query may see the last token: give it all the weight there is.
  for (std::size_t e = 0; e < head_dim; ++e) {
    inputs.cache.keys[inputs.cache.at(0, 19, e)] = 50.0F;
    for (std::size_t i = 0; i < 4; ++i) {
      inputs.queries[i * head_dim + e] = 1.0F;
    }
  }
  Workspace workspace;
  const auto sums = inputs.sums({0}, workspace);
  double total = 0.0;
  for (const float sum : sums[0]) {
    total += static_cast<double>(sum);
  }
  EXPECT_GT(total, 1.0) << "the first three rows do not see the last token";
  EXPECT_LT(total, 3.0) << "nor do they lose what goes to the window";
}

/// Against plain code in double, over more tokens than a tile has.
TEST(WindowAttention, OfManyTilesIsOneSoftmax) {
  constexpr std::size_t rows = 2100;
  WindowInputs inputs(1, 1, rows, 4);
  const std::vector<float> sinks(2, 2.5F);
  const auto key = [&](std::size_t row, std::size_t e) {
    return static_cast<double>(inputs.cache.keys[inputs.cache.at(1, row, e)]);
  };
  const auto query = [&](std::size_t i, std::size_t e) {
    return static_cast<double>(inputs.queries[(4 + i) * head_dim + e]);
  };
  constexpr double no_sink = -std::numeric_limits<double>::infinity();
  for (const double sink : {no_sink, 2.5}) {
    for (const std::size_t sliding : {0U, 300U, 1500U}) {
      QueryShape observed{.sliding_window = sliding};
      if (sink != no_sink) {
        observed.sinks = sinks;
      }
      Workspace workspace;
      const auto sums = inputs.sums({1}, workspace, observed);
      const std::vector<double> expected =
          reference::window_sums(reference::window_attention(key, query, rows, 4, head_dim, 0.125,
                                                             sliding == 0 ? rows : sliding, sink)
                                     .weights);
      for (std::size_t t = 0; t < expected.size(); ++t) {
        ASSERT_NEAR(sums[0][t], expected[t], 3e-6 * expected[t]) << t << " sliding " << sliding;
      }
    }
  }
}

TEST(WindowAttention, MinusInfinityIsAMaskAndLegal) {
  WindowInputs inputs(1, 1, 20, 4);
  for (float& x : inputs.queries) {
    x = std::abs(x) + 0.1F;
  }
  inputs.cache.keys[inputs.cache.at(0, 5, 0)] = -std::numeric_limits<float>::infinity();
  Workspace workspace;
  const auto sums = inputs.sums({0}, workspace);
  EXPECT_EQ(sums[0][5], 0.0F);
  EXPECT_GT(sums[0][6], 0.0F);

  // Where nothing is left to look at, a sink takes all; without one there is no attention.
  for (std::size_t row = 0; row < 20; ++row) {
    inputs.cache.keys[inputs.cache.at(0, row, 0)] = -std::numeric_limits<float>::infinity();
  }
  const std::vector<float> sinks(2, 1.0F);
  EXPECT_EQ(inputs.sums({0}, workspace, {.sinks = sinks})[0], std::vector<float>(16, 0.0F));
  EXPECT_THROW(inputs.sums({0}, workspace), ScoreError);
}

}  // namespace
}  // namespace compresskv::kernel
