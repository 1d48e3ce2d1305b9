#include <gtest/gtest.h>

#include <cmath>
#include <compresskv/view/attention_matrix.hpp>
#include <compresskv/view/hidden_states.hpp>
#include <compresskv/view/observation.hpp>
#include <compresskv/view/query_window.hpp>
#include <compresskv/view/recent_queries.hpp>
#include <cstddef>
#include <initializer_list>
#include <limits>
#include <string_view>
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
  std::vector<half> queries(4 * 3 * 5);
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

constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr float nan_value = std::numeric_limits<float>::quiet_NaN();

TEST(QueryWindow, RejectsNumbersThatGiveNoAttention) {
  std::vector<float> queries(64);
  std::vector<float> sinks{0.5F, -infinity, -3.0F, 1e30F};
  QueryShape good{.query_heads = 4, .queries = 2, .head_dim = 8, .soft_cap = 30.0F, .sinks = sinks};
  const auto both = [&](const QueryShape& shape, std::initializer_list<std::string_view> says) {
    expect_error<ArgumentError>([&] { QueryWindow(queries.data(), shape); }, says);
    expect_error<ArgumentError>([&] { RecentQueries<float>{shape}; }, says);
  };
  EXPECT_NO_THROW(QueryWindow(queries.data(), good));
  EXPECT_NO_THROW(RecentQueries<float>{good});
  for (const float bad : {nan_value, -nan_value, infinity, -infinity, -1.0F}) {
    QueryShape shape = good;
    shape.soft_cap = bad;
    both(shape, {"soft_cap is ", "finite and above 0 (0 stands for none)"});
    shape = good;
    shape.scale = bad;
    both(shape, {"scale is ", "finite and above 0"});
  }
  for (const float bad : {nan_value, -nan_value, infinity}) {
    sinks[2] = bad;
    both(good, {"sink of query head 2 is ", "-infinity for none"});
  }
}

TEST(QueryWindow, RejectsStridesThatLayQueriesOverEachOther) {
  std::vector<float> queries(64);
  const QueryShape shape{.query_heads = 4, .queries = 2, .head_dim = 8};
  const auto both = [&](const QueryStrides& strides, std::initializer_list<std::string_view> says) {
    expect_error<ArgumentError>([&] { QueryWindow(queries.data(), shape, strides); }, says);
    RecentQueries<float> recent(shape);
    expect_error<ArgumentError>([&] { recent.append(queries.data(), 2, strides); }, says);
    EXPECT_EQ(recent.size(), 0U);
  };
  both({}, {"stride is 0", "covers 8 units"});
  both({.head = 16}, {"query stride is 0"});
  both({.head = 15, .query = 8}, {"head stride is 15", "covers 16"});
  both({.head = 8, .query = 31}, {"query stride is 31", "covers 32"});
  const std::size_t huge = std::size_t{1} << 62U;
  both({.head = huge, .query = 8}, {"head stride 4611686018427387904 times 4", "does not fit in memory"});
  both({.head = 8, .query = huge}, {"query stride 4611686018427387904 times 2"});
  // Of one head the stride is never used.
  EXPECT_NO_THROW(
      QueryWindow(queries.data(), {.query_heads = 1, .queries = 8, .head_dim = 8}, {.head = 0, .query = 8}));
}

// Each product wraps to 0 or to a size that could be.
TEST(Observation, RejectsSizesWhoseProductWraps) {
  std::vector<float> memory(64);
  constexpr std::size_t half = std::size_t{1} << 32U;
  for (const QueryShape& shape :
       {QueryShape{.query_heads = half, .queries = half, .head_dim = 8},
        QueryShape{.query_heads = 4, .queries = half, .head_dim = half},
        QueryShape{.query_heads = half, .queries = 8, .head_dim = half + 1},
        QueryShape{.query_heads = 1, .queries = 1, .head_dim = std::size_t{1} << 61U}}) {
    expect_error<ArgumentError>([&] { QueryWindow(memory.data(), shape); },
                                {"QueryWindow: ", " heads of ", " queries of ", "do not fit in memory"});
    expect_error<ArgumentError>([&] { RecentQueries<float>{shape}; },
                                {"RecentQueries: ", " heads of ", " queries of ", "do not fit in memory"});
  }
  constexpr std::size_t most = half - 1;
  expect_error<ArgumentError>(
      [&] { AttentionMatrix(memory.data(), {.query_heads = half, .queries = half, .tokens = 10}); },
      {"AttentionMatrix: 4294967296 heads of 4294967296 queries of 10 tokens do not fit in memory"});
  expect_error<ArgumentError>(
      [&] { AttentionMatrix(memory.data(), {.query_heads = 1, .queries = half, .tokens = most}); },
      {"AttentionMatrix: 1 heads of 4294967296 queries of 4294967295 tokens"});
  expect_error<ArgumentError>(
      [&] { AttentionSums(memory.data(), {.query_heads = half, .queries = 8, .tokens = most}); },
      {"AttentionSums: 4294967296 heads"});
  EXPECT_NO_THROW(AttentionSums(memory.data(), {.query_heads = 8, .queries = most * most, .tokens = most}))
      << "queries of sums take no room";
}

TEST(Observation, RejectsMoreTokensThanPositionsCount) {
  std::vector<float> memory(64);
  const AttentionShape shape{.query_heads = 1, .queries = 1, .tokens = std::size_t{1} << 32U};
  expect_error<ArgumentError>([&] { AttentionMatrix(memory.data(), shape); },
                              {"AttentionMatrix: shape has 4294967296 tokens", "at most 4294967295"});
  expect_error<ArgumentError>([&] { AttentionSums(memory.data(), shape); },
                              {"AttentionSums: shape has 4294967296 tokens", "at most 4294967295"});
}

/// An observation of a user's own, which no constructor of ours has checked.
struct OwnQueries {
  using element = float;
  float scale_is = 1.0F;
  float cap = 0.0F;
  float sink = -infinity;
  std::size_t query_heads() const { return 4; }
  std::size_t queries() const { return 8; }
  std::size_t head_dim() const { return 8; }
  float scale() const { return scale_is; }
  float soft_cap() const { return cap; }
  float sink_logit(std::size_t head) const { return head == 3 ? sink : 0.0F; }
  Run<const float> query_run(std::size_t) const { return {}; }
};

TEST(Observation, OfAUsersOwnIsCheckedToo) {
  const ModelShape shape{.layers = 1, .query_heads = 4, .kv_heads = 2, .head_dim = 8};
  const auto check = [&](const OwnQueries& queries) { detail::check_observation(queries, shape, 20, 8); };
  EXPECT_NO_THROW(check({}));
  for (const float bad : {nan_value, -nan_value, infinity}) {
    expect_error<ArgumentError>([&] { check({.scale_is = bad}); }, {"observation: scale is ", "finite"});
    expect_error<ArgumentError>([&] { check({.cap = bad}); }, {"observation: soft_cap is ", "finite"});
    expect_error<ArgumentError>([&] { check({.sink = bad}); }, {"observation: sink of query head 3 is "});
  }
  expect_error<ArgumentError>([&] { check({.scale_is = 0.0F}); }, {"observation: scale is 0"});
}

TEST(HiddenStates, RunIsTheTokensRows) {
  std::vector<half> states(4 * 7);
  const HiddenStates beside{states.data(), {.tokens = 4, .hidden_size = 7}};
  EXPECT_EQ(beside.tokens(), 4U);
  EXPECT_EQ(beside.hidden_size(), 7U);
  EXPECT_EQ(beside.hidden_run().row(3), states.data() + 21);
  EXPECT_EQ(beside.hidden_run().rows, 4U);
  EXPECT_GE(beside.hidden_run().chunk, 7U) << "elements lie side by side";
  const HiddenStates apart{states.data(), {.tokens = 3, .hidden_size = 7, .token_stride = 10}};
  EXPECT_EQ(apart.hidden_run().row(2), states.data() + 20);
}

TEST(HiddenStates, RejectsWhatItCannotRead) {
  std::vector<float> states(10);
  const float* null = nullptr;
  expect_error<ArgumentError>([&] { HiddenStates(null, {.tokens = 1, .hidden_size = 1}); },
                              {"HiddenStates: states is null"});
  const auto make = [&](const HiddenShape& shape) { HiddenStates(states.data(), shape); };
  expect_error<ArgumentError>([&] { make({.tokens = 0, .hidden_size = 5}); },
                              {"shape has 0 tokens of 5 elements", "at least 1"});
  expect_error<ArgumentError>([&] { make({.tokens = 5, .hidden_size = 0}); }, {"5 tokens of 0 elements"});
  expect_error<ArgumentError>([&] { make({.tokens = 2, .hidden_size = 5, .token_stride = 4}); },
                              {"HiddenStates: token stride is 4", "rows would overlap"});
  const std::size_t huge = std::numeric_limits<std::size_t>::max() / 2;
  expect_error<ArgumentError>([&] { make({.tokens = huge, .hidden_size = 5}); }, {"does not fit in memory"});
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
