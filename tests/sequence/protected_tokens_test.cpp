#include <gtest/gtest.h>

#include <algorithm>
#include <compresskv/compresskv.hpp>
#include <compresskv/sequence/compaction.hpp>
#include <compresskv/sequence/protected_tokens.hpp>
#include <compresskv/sequence/state.hpp>
#include <cstdint>
#include <limits>
#include <vector>

#include "reference/errors.hpp"
#include "reference/random.hpp"

namespace compresskv::sequence {
namespace {

using reference::expect_error;
using reference::Random;
using Rows = std::vector<std::uint32_t>;

/// A layer of a sequence, whole.
State whole(std::size_t tokens) {
  State state(1, 1);
  state.prepare_sequence(tokens, {});
  state.start_sequence(tokens, {});
  return state;
}

TEST(ProtectedTokens, TheFirstTheLastAndAnyListedAreMarkedAndNoOthers) {
  Random random(72);
  for (int round = 0; round < 300; ++round) {
    const std::size_t tokens = random.between(1, 80);
    const std::size_t window = random.between(1, tokens);
    Protection protection{.keep_first = random.below(10), .keep_last = random.below(20)};
    Rows listed;
    for (std::uint32_t position = 0; position < tokens; ++position) {
      if (random.below(9) == 0) {
        listed.push_back(position);
      }
    }
    protection.positions = listed;
    ProtectedTokens protects;
    protects.prepare(tokens, protection);
    protects.start(tokens, protection);

    const std::size_t evictable = tokens - window;
    std::vector<float> values(evictable, 0.5F);
    const std::vector<std::size_t> ends{evictable};
    const std::vector<std::size_t> windows{window};
    const Scores<Granularity::layer> scores{values, ends, windows};
    Rows expected;
    for (std::uint32_t t = 0; t < evictable; ++t) {
      if (t < protection.keep_first || t + protection.keep_last >= tokens ||
          std::find(listed.begin(), listed.end(), t) != listed.end()) {
        expected.push_back(t);
      }
    }
    const State state = whole(tokens);
    ASSERT_EQ(protects.count(state.layer(0), scores, 0), expected.size());
    protects.mark(0, state.layer(0), scores, window + expected.size());
    for (std::uint32_t t = 0; t < evictable; ++t) {
      const bool marked = std::binary_search(expected.begin(), expected.end(), t);
      ASSERT_EQ(values[t], marked ? (std::numeric_limits<float>::max)() : 0.5F) << t;
    }
    if (!expected.empty()) {
      std::fill(values.begin(), values.end(), 0.5F);
      expect_error<ArgumentError>(
          [&] { protects.mark(0, state.layer(0), scores, window + expected.size() - 1); },
          {"layer 0 has room for " + std::to_string(expected.size() - 1),
           std::to_string(expected.size()) + " are protected", "raise the budget"});
      EXPECT_EQ(std::count(values.begin(), values.end(), 0.5F), static_cast<std::ptrdiff_t>(evictable))
          << "an error marks none";
    }
  }
}

TEST(ProtectedTokens, WhatIsPreparedHoldsOnlyOnceItIsStarted) {
  ProtectedTokens protects;
  const Rows listed{4, 6};
  protects.prepare(10, {.positions = listed});
  std::vector<float> values(9, 0.5F);
  const std::vector<std::size_t> ends{9};
  const std::vector<std::size_t> windows{1};
  const Scores<Granularity::layer> scores{values, ends, windows};
  const State state = whole(10);
  EXPECT_EQ(protects.count(state.layer(0), scores, 0), 0U);
  protects.start(10, {.positions = listed});
  EXPECT_EQ(protects.count(state.layer(0), scores, 0), 2U);
}

/// One set of rows for KV heads that hold different positions, as an engine may have chosen them.
TEST(ProtectedTokens, StayInTheKvHeadThatHoldsThem) {
  const ModelShape shape{.layers = 1, .query_heads = 2, .kv_heads = 2, .head_dim = 4};
  std::vector<float> keys(2 * 40 * 4, 1.0F);
  std::vector<float> values = keys;
  const auto view = [&](std::size_t rows) {
    return StridedKv<float>{keys.data(), values.data(),
                            KvShape{.kv_heads = 2, .rows = rows, .head_dim = 4, .allocated_rows = 40},
                            layout::head_token_dim};
  };
  const Plan plan{shape, score::StreamingLlm{{.sinks = 0, .window = 2}}, select::SharedTopK{},
                  budget::Uniform{Budget::tokens_per_layer(8)}};
  Compressor compressor{plan};
  compressor.begin(20);
  std::vector<Rows> chosen(2);
  for (std::uint32_t row = 0; row < 20; ++row) {
    chosen[row % 2].push_back(row);
  }
  compressor.compact(0, view(20), Selection::per_head(chosen));
  const Rows listed{4, 7};  // one of each head
  compressor.begin_turn(30, {.positions = listed});
  const Retained& kept = compressor.compress(0, view(20));
  EXPECT_TRUE(kept.row(4, 0).has_value());
  EXPECT_TRUE(kept.row(7, 1).has_value());
  EXPECT_EQ(kept.rows(0), 8U);
  EXPECT_EQ(kept.rows(1), 8U);
}

TEST(ProtectedTokens, RefusesPositionsThatDoNotAscendOrAreNot) {
  ProtectedTokens protects;
  const Rows twice{4, 4};
  const Rows behind{4, 10};
  expect_error<ArgumentError>([&] { protects.prepare(10, {.positions = twice}); },
                              {"protected position 4 comes after 4", "ascend"});
  expect_error<ArgumentError>([&] { protects.prepare(10, {.positions = behind}); },
                              {"protected position is 10", "0 to 9"});
}

}  // namespace
}  // namespace compresskv::sequence
