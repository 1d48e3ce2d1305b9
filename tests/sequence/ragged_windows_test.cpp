// KV heads of different lengths: each keeps its own window, however short another is, and is scored as if the
// others were not there.

#include <gtest/gtest.h>

#include <algorithm>
#include <compresskv/compresskv.hpp>
#include <compresskv/methods.hpp>
#include <cstdint>
#include <numeric>
#include <string>
#include <vector>

#include "reference/arriving_methods.hpp"
#include "reference/output_norms.hpp"
#include "reference/queries.hpp"
#include "reference/random.hpp"

namespace compresskv {
namespace {

using reference::Random;
using Rows = std::vector<std::uint32_t>;

constexpr std::size_t kv_heads = 2;
constexpr std::size_t query_heads = 4;
constexpr std::size_t head_dim = 16;
constexpr std::size_t window = 8;
constexpr std::size_t prompt = 90;
constexpr std::size_t capacity = 24;
constexpr ModelShape shape{
    .layers = 1, .query_heads = query_heads, .kv_heads = kv_heads, .head_dim = head_dim};

MethodSettings settings() {
  MethodSettings out{.budget = Budget::tokens_per_layer(capacity),
                     // Of group 0 none: its KV head falls back to the other's.
                     .heads = HeadRanking({{3, 2, 1, 0}}),
                     .scores = HeadScores(1, query_heads, {{0.2}, {0.1}, {0.4}, {0.3}}),
                     .statistics = reference::query_statistics(shape),
                     .output_weights = reference::output_weights(shape),
                     .kv_scores = HeadScores(1, kv_heads, {{0.1}, {0.2}}),
                     .window = window};
  out.heads_per_layer = 2;
  return out;
}

/// Positions that each head holds once a cache whose head 0 kept `kept_of_head_0` rows of the prompt has
/// grown by `appended` tokens and is compressed.
template <class P>
std::vector<Rows> compressed(const P& plan, std::size_t kept_of_head_0, std::size_t appended,
                             std::uint64_t seed) {
  const std::size_t room = prompt + appended;
  Random random(seed);
  std::vector<float> keys(kv_heads * room * head_dim);
  std::vector<float> queries(query_heads * room * head_dim);
  for (std::vector<float>* buffer : {&keys, &queries}) {
    for (float& x : *buffer) {
      x = random.gaussian();
    }
  }
  std::vector<float> values = keys;
  std::vector<std::size_t> rows(kv_heads, prompt);
  const auto view = [&] {
    return StridedKv<float>(
        std::span(keys), std::span(values),
        {.kv_heads = kv_heads, .head_dim = head_dim, .allocated_rows = room, .head_rows = rows},
        layout::head_token_dim);
  };
  Compressor compressor{plan};
  compressor.begin(prompt);
  Rows all(prompt);
  std::iota(all.begin(), all.end(), 0U);
  const Rows last(all.end() - static_cast<std::ptrdiff_t>(kept_of_head_0), all.end());
  compressor.compact(0, view(), Selection::per_head(std::vector<Rows>{last, all}));
  // Rows appended to head 0 are those that stood behind its kept ones: the same tokens in either case.
  std::copy_n(keys.begin() + prompt * head_dim, appended * head_dim,
              keys.begin() + static_cast<std::ptrdiff_t>(kept_of_head_0 * head_dim));
  rows = {kept_of_head_0 + appended, prompt + appended};
  compressor.begin_turn(prompt + appended);
  const QueryWindow<float> observation(queries.data(),
                                       {.query_heads = query_heads, .queries = room, .head_dim = head_dim});
  if constexpr (P::reach == Reach::own_layer) {
    compressor.compress(0, view(), observation);
  } else {
    compressor.arrive(
        0, [&](std::size_t) { return view(); }, observation);
  }
  std::vector<Rows> held;
  for (std::size_t head = 0; head < kv_heads; ++head) {
    const auto& positions = compressor.retained(0).positions(head);
    held.emplace_back(positions.begin(), positions.end());
  }
  return held;
}

TEST(RaggedWindows, EachHeadKeepsItsOwn) {
  std::size_t tried = 0;
  for (const MethodInfo& method : methods) {
    if (!method.per_head || method.repeats) {
      continue;
    }
    SCOPED_TRACE(std::string(method.name));
    reference::with_arriving_method(
        method.method, settings(), [&](auto scorer, auto selector, auto allocator) {
          const Plan plan{shape, scorer, selector, allocator};
          for (const std::size_t appended : {1U, 3U, 6U}) {
            for (std::uint64_t seed = 1; seed <= 5; ++seed) {
              const auto held = compressed(plan, 1, appended, seed);
              Rows window_of_prompt(window);
              std::iota(window_of_prompt.begin(), window_of_prompt.end(),
                        static_cast<std::uint32_t>(prompt + appended - window));
              ASSERT_EQ(held[0].size(), 1 + appended) << "a head shorter than the window keeps all";
              ASSERT_TRUE(std::includes(held[1].begin(), held[1].end(), window_of_prompt.begin(),
                                        window_of_prompt.end()))
                  << "appended " << appended;
              ++tried;
            }
          }
        });
  }
  EXPECT_GT(tried, 100U);
}

/// Scorers that look at one head at a time choose for it what they choose beside a longer head.
TEST(RaggedWindows, AShortHeadChangesNothingForTheOthers) {
  const auto check = [](const auto& scorer) {
    const Plan plan{shape, scorer, select::GroupedTopK{},
                    budget::Uniform{Budget::tokens_per_layer(capacity)}};
    for (std::uint64_t seed = 1; seed <= 10; ++seed) {
      const auto beside_short = compressed(plan, 2, 3, seed);
      const auto beside_long = compressed(plan, 40, 3, seed);
      EXPECT_EQ(beside_short[0].size(), 5U);
      EXPECT_EQ(beside_short[1].size(), capacity);
      EXPECT_EQ(beside_short[1], beside_long[1]) << "seed " << seed;
    }
  };
  check(score::SnapKv{{.window = window}});
  check(score::Cake{{.window = window}});
  check(score::H2O{{.window = window}});
  check(score::Knorm{{.window = window}});
  check(score::KeyDiff{{.window = window}});
  check(score::LagKv{{.lag = 6, .window = window}});
  check(score::Cur{{.window = window}});
  check(score::ChunkKv{score::SnapKv{{.window = window}}, {.chunk = 5}});
  check(score::RKv{{.window = window}});
  check(score::Random{{.window = window}});
  check(score::ExpectedAttention{reference::query_statistics(shape), {.window = window}});
  check(score::QFilter{reference::query_statistics(shape), {.window = window}});
  check(score::TriAttention{reference::query_statistics(shape), {.window = window}});
  check(score::GroupedRetrieval{HeadRanking{{{3, 2, 1, 0}}}, {.heads_per_layer = 2, .window = window}});
}

/// What a short head leaves of the layer's rows goes to the others.
TEST(RaggedWindows, AdaptiveKeepsAsManyRowsAsTheLayerMay) {
  const Plan plan{shape, score::SnapKv{{.window = window}}, select::Adaptive{},
                  budget::Uniform{Budget::tokens_per_layer(capacity)}};
  const auto held = compressed(plan, 1, 3, 7);
  EXPECT_EQ(held[0].size() + held[1].size(), kv_heads * capacity);
}

}  // namespace
}  // namespace compresskv
