// Where the heads meet the memory bound, and what is said of NaN; the sums themselves:
// compressor_cases_test.cpp.

#include <gtest/gtest.h>

#include <bit>
#include <compresskv/kernel/window_attention.hpp>
#include <compresskv/view/attention_matrix.hpp>
#include <compresskv/view/query_window.hpp>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "reference/cache.hpp"
#include "reference/errors.hpp"
#include "reference/random.hpp"
#include "reference/scores.hpp"

namespace compresskv::kernel {
namespace {

using reference::expect_error;

constexpr std::size_t head_dim = 64;

struct Inputs {
  ModelShape shape;
  reference::Cache<float> cache;
  std::vector<float> queries;  // [query_head][window][dim]
  std::size_t window;

  Inputs(std::size_t layers, std::size_t group, std::size_t rows, std::size_t window_size)
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

TEST(WindowAttention, HowManyHeadsAreHeldAtOnceDecidesNoBit) {
  // One layer has no memory to spare, so one head goes at a time; 1000 layers have it for all.
  Inputs frugal(1, 4, 200, 8);
  Inputs lavish(1000, 4, 200, 8);
  std::vector<std::uint32_t> heads(8);
  std::iota(heads.begin(), heads.end(), 0U);
  Workspace small;
  Workspace large;
  const auto one_by_one = frugal.sums(heads, small);
  const auto together = lavish.sums(heads, large);
  ASSERT_EQ(one_by_one.size(), 8U);
  EXPECT_EQ(one_by_one, together);
  EXPECT_LT(small.bytes() * 3, large.bytes()) << "the two must have gone different ways";
}

TEST(WindowAttention, HeadsOfOneKvHeadReadItsKeysAndNoOthers) {
  Inputs inputs(1, 2, 50, 4);
  Workspace workspace;
  const auto before = inputs.sums({0, 1}, workspace);
  for (std::size_t row = 0; row < 50; ++row) {
    inputs.cache.keys[inputs.cache.at(1, row, 5)] = std::numeric_limits<float>::quiet_NaN();
  }
  EXPECT_EQ(inputs.sums({0, 1}, workspace), before) << "query heads 0 and 1 read KV head 0";
  EXPECT_THROW(inputs.sums({1, 2}, workspace), ScoreError);
}

TEST(WindowAttention, EachRowSeesTheWindowUpToItself) {
  Inputs inputs(1, 1, 20, 4);
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

TEST(WindowAttention, NamesLayerHeadAndTokenOfWhatIsNotFinite) {
  const std::vector<float> poisons{std::numeric_limits<float>::quiet_NaN(),
                                   std::numeric_limits<float>::infinity(), std::bit_cast<float>(0xFFFFFFFFU)};
  for (const float poison : poisons) {
    for (const std::size_t token : {0U, 7U, 16U, 19U}) {
      Inputs inputs(1, 2, 20, 4);
      for (float& x : inputs.queries) {
        x = std::abs(x) + 0.1F;  // so that an infinite key gives +inf, not -inf, which is legal
      }
      inputs.cache.keys[inputs.cache.at(1, token, 2)] = poison;
      Workspace workspace;
      EXPECT_NO_THROW(inputs.sums({0, 1}, workspace));
      expect_error<ScoreError>(
          [&] {
            inputs.sums({0, 3}, workspace);
          },
          {"score of layer 3 query head 3 token " + std::to_string(token) + " ", "is not finite",
           "NaN or infinite"});
    }
  }
  Inputs inputs(1, 2, 20, 4);
  inputs.queries[(2 * 4 + 1) * head_dim] = std::numeric_limits<float>::quiet_NaN();
  Workspace workspace;
  expect_error<ScoreError>([&] { inputs.sums({1, 2, 3}, workspace); }, {"layer 3 query head 2 token 0 "});
}

TEST(WindowAttention, NaNsThatAreAllOfATileAreNamedToo) {
  for (const std::size_t rows : {1025U, 2100U}) {
    Inputs inputs(1, 2, rows, 4);
    for (std::size_t row = 1024; row < std::min(rows, std::size_t{2048}); ++row) {
      inputs.cache.keys[inputs.cache.at(1, row, 2)] = std::numeric_limits<float>::quiet_NaN();
    }
    Workspace workspace;
    EXPECT_NO_THROW(inputs.sums({0, 1}, workspace));
    expect_error<ScoreError>([&] { inputs.sums({2}, workspace); },
                             {"layer 3 query head 2 token 1024 ", "is not finite"});
  }
}

/// Against plain code in double, over more tokens than are worked on at a time.
TEST(WindowAttention, OfManyTilesIsOneSoftmax) {
  constexpr std::size_t rows = 2100;
  Inputs inputs(1, 1, rows, 4);
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
  Inputs inputs(1, 1, 20, 4);
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

TEST(WindowAttention, AttentionThatIsNotFiniteIsNamedToo) {
  const ModelShape shape{.layers = 9, .query_heads = 2, .kv_heads = 1, .head_dim = 4};
  std::vector<float> weights(2 * 3 * 10, 0.1F);
  weights[(1 * 3 + 2) * 10 + 6] = std::numeric_limits<float>::quiet_NaN();
  weights[(0 * 3 + 2) * 10 + 9] = std::numeric_limits<float>::quiet_NaN();  // a window column: dropped
  const AttentionMatrix<float> matrix(weights.data(), {.query_heads = 2, .queries = 3, .tokens = 10});
  const int no_keys = 0;
  const std::vector<std::size_t> rows{10};
  const Retained retained;
  const LayerInput<int, AttentionMatrix<float>> input{.shape = shape,
                                                      .layer = 8,
                                                      .rows = rows,
                                                      .window = 3,
                                                      .retained = retained,
                                                      .kv = no_keys,
                                                      .observation = matrix};
  Workspace workspace;
  SerialExecutor executor;
  const auto sums_of = [&](std::uint32_t head) {
    const std::vector<std::uint32_t> heads{head};
    window_attention(input, heads, workspace, executor, [](std::uint32_t, std::span<const float>) {});
  };
  EXPECT_NO_THROW(sums_of(0));
  expect_error<ScoreError>([&] { sums_of(1); }, {"score of layer 8 query head 1 token 6 ", "is not finite"});
}

/// Numbers, but too large ones: what is said must not send the user to look for NaN.
TEST(WindowAttention, SaysThatProductsOfFiniteNumbersAreTooLarge) {
  Inputs inputs(1, 2, 20, 4);
  for (float& x : inputs.queries) {
    x = 1e20F;
  }
  for (std::size_t dim = 0; dim < head_dim; ++dim) {
    inputs.cache.keys[inputs.cache.at(1, 7, dim)] = 1e20F;
  }
  Workspace workspace;
  expect_error<ScoreError>([&] { inputs.sums({2}, workspace); },
                           {"score of layer 3 query head 2 token 7 is not finite",
                            "keys and queries are finite", "beyond float32", "check the scale"});
}

}  // namespace
}  // namespace compresskv::kernel
