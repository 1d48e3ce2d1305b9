#include <gtest/gtest.h>

#include <cmath>
#include <compresskv/view/attention_matrix.hpp>
#include <compresskv/view/observation.hpp>
#include <compresskv/view/query_window.hpp>
#include <limits>
#include <vector>

#include "reference/errors.hpp"

namespace compresskv {
namespace {

using reference::expect_error;

TEST(QueryWindow, RunsAreTheHeadsQueries) {
  std::vector<float> queries(3 * 4 * 5);
  const QueryWindow window{queries.data(), {.query_heads = 3, .queries = 4, .head_dim = 5}};
  EXPECT_EQ(window.query_heads(), 3U);
  EXPECT_EQ(window.queries(), 4U);
  EXPECT_EQ(window.head_dim(), 5U);
  const auto run = window.query_run(2);
  EXPECT_EQ(run.base, queries.data() + 40);
  EXPECT_EQ(run.rows, 4U);
  EXPECT_EQ(run.row(3), queries.data() + 55);
  EXPECT_GE(run.chunk, 5U) << "elements lie side by side";
}

TEST(QueryWindow, StridesReachTheProjectionsOwnOrder) {
  // [query][head][dim]
  std::vector<Eigen::half> queries(4 * 3 * 5);
  const QueryWindow window{
      queries.data(), {.query_heads = 3, .queries = 4, .head_dim = 5}, {.head = 5, .query = 15}};
  EXPECT_EQ(window.query_run(2).row(3), queries.data() + 3 * 15 + 2 * 5);
}

TEST(QueryWindow, ScaleDefaultsToOneOverTheRoot) {
  std::vector<float> queries(64);
  EXPECT_EQ(QueryWindow(queries.data(), {.query_heads = 1, .queries = 1, .head_dim = 64}).scale(), 0.125F);
  EXPECT_EQ(
      QueryWindow(queries.data(), {.query_heads = 1, .queries = 1, .head_dim = 64, .scale = 0.5F}).scale(),
      0.5F);
}

TEST(QueryWindow, RejectsWhatItCannotRead) {
  std::vector<float> queries(64);
  const float* null = nullptr;
  expect_error<ArgumentError>([&] { QueryWindow(null, {.query_heads = 1, .queries = 1, .head_dim = 8}); },
                              {"QueryWindow: queries is null"});
  const auto make = [&](const QueryShape& shape) { QueryWindow(queries.data(), shape); };
  expect_error<ArgumentError>([&] { make({.query_heads = 0, .queries = 2, .head_dim = 8}); },
                              {"shape has 0 heads, 2 queries, head_dim 8", "at least 1"});
  expect_error<ArgumentError>([&] { make({.query_heads = 3, .queries = 0, .head_dim = 8}); },
                              {"shape has 3 heads, 0 queries, head_dim 8"});
  expect_error<ArgumentError>([&] { make({.query_heads = 3, .queries = 2, .head_dim = 0}); },
                              {"shape has 3 heads, 2 queries, head_dim 0"});
  for (const float scale :
       {-1.0F, std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
    expect_error<ArgumentError>(
        [&] { make({.query_heads = 1, .queries = 1, .head_dim = 8, .scale = scale}); },
        {"QueryWindow: scale is ", "finite and above 0"});
  }
}

TEST(AttentionMatrix, RunsAreTheHeadsRows) {
  std::vector<float> weights(2 * 3 * 10);
  const AttentionMatrix matrix{weights.data(), {.query_heads = 2, .queries = 3, .tokens = 10}};
  EXPECT_EQ(matrix.query_heads(), 2U);
  EXPECT_EQ(matrix.queries(), 3U);
  EXPECT_EQ(matrix.tokens(), 10U);
  const auto run = matrix.attention_run(1);
  EXPECT_EQ(run.rows, 3U);
  EXPECT_EQ(run.row(2), weights.data() + 30 + 20);
}

TEST(AttentionMatrix, RejectsWhatItCannotRead) {
  std::vector<float> weights(10);
  const float* null = nullptr;
  expect_error<ArgumentError>([&] { AttentionMatrix(null, {.query_heads = 1, .queries = 1, .tokens = 10}); },
                              {"AttentionMatrix: probabilities is null"});
  const auto make = [&](const AttentionShape& shape) { AttentionMatrix(weights.data(), shape); };
  expect_error<ArgumentError>([&] { make({.query_heads = 0, .queries = 1, .tokens = 10}); },
                              {"shape has 0 heads, 1 queries, 10 tokens", "at least 1"});
  expect_error<ArgumentError>([&] { make({.query_heads = 1, .queries = 0, .tokens = 10}); },
                              {"shape has 1 heads, 0 queries"});
  expect_error<ArgumentError>([&] { make({.query_heads = 1, .queries = 1, .tokens = 0}); },
                              {"1 queries, 0 tokens"});
}

TEST(Observation, IsCheckedAgainstTheModelAndTheCache) {
  std::vector<float> memory(1000);
  const ModelShape shape{.layers = 1, .query_heads = 4, .kv_heads = 2, .head_dim = 8};
  const auto queries = [&](const QueryShape& query) {
    detail::check_observation(QueryWindow(memory.data(), query), shape, 20, 8);
  };
  EXPECT_NO_THROW(queries({.query_heads = 4, .queries = 8, .head_dim = 8}));
  EXPECT_NO_THROW(queries({.query_heads = 4, .queries = 12, .head_dim = 8}))
      << "more than the window is fine";
  expect_error<ArgumentError>([&] { queries({.query_heads = 2, .queries = 8, .head_dim = 8}); },
                              {"observation has 2 query heads", "model has 4"});
  expect_error<ArgumentError>([&] { queries({.query_heads = 4, .queries = 7, .head_dim = 8}); },
                              {"observation shows 7 queries", "needs the last 8"});
  expect_error<ArgumentError>([&] { queries({.query_heads = 4, .queries = 8, .head_dim = 4}); },
                              {"queries have 4 elements", "head_dim is 8"});
  const auto attention = [&](std::size_t heads, std::size_t shown, std::size_t tokens) {
    const AttentionMatrix matrix{memory.data(), {.query_heads = heads, .queries = shown, .tokens = tokens}};
    detail::check_observation(matrix, shape, 20, 8);
  };
  EXPECT_NO_THROW(attention(4, 8, 20));
  expect_error<ArgumentError>([&] { attention(4, 8, 19); },
                              {"attention has 19 columns", "20 rows", "one column a cached row"});
  expect_error<ArgumentError>([&] { attention(4, 3, 20); }, {"observation shows 3 queries"});
  expect_error<ArgumentError>([&] { attention(5, 8, 20); }, {"observation has 5 query heads"});
}

}  // namespace
}  // namespace compresskv
