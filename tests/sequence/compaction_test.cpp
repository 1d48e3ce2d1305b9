// Staging checks and changes nothing; committing moves rows as a plain copy to a new cache would.

#include <gtest/gtest.h>

#include <algorithm>
#include <compresskv/sequence/compaction.hpp>
#include <compresskv/sequence/state.hpp>
#include <compresskv/view/strided_kv.hpp>
#include <cstdint>
#include <vector>

#include "reference/allocations.hpp"
#include "reference/errors.hpp"
#include "reference/random.hpp"

namespace compresskv::sequence {
namespace {

using reference::expect_error;
using reference::Random;
using Rows = std::vector<std::uint32_t>;

constexpr std::size_t head_dim = 3;

/// Caches of some layers; the first element of a row names its token.
struct Caches {
  std::size_t layers;
  std::size_t kv_heads;
  std::size_t tokens;
  std::vector<std::vector<float>> keys;
  std::vector<std::vector<float>> values;
  State state;
  Workspace workspace;
  SerialExecutor executor;

  Caches(std::size_t layer_count, std::size_t heads, std::size_t count)
      : layers(layer_count), kv_heads(heads), tokens(count), state(layer_count, heads) {
    for (std::size_t l = 0; l < layers; ++l) {
      keys.emplace_back(kv_heads * tokens * head_dim);
      for (std::size_t i = 0; i < keys[l].size(); ++i) {
        keys[l][i] = static_cast<float>(i + 1000 * l);
      }
      values.push_back(keys[l]);
    }
    state.prepare_sequence(tokens, {});
    state.start_sequence(tokens, {});
  }
  ModelShape shape() const {
    return {.layers = layers, .query_heads = kv_heads, .kv_heads = kv_heads, .head_dim = head_dim};
  }
  StridedKv<float> view(std::size_t layer) {
    return {std::span(keys[layer]), std::span(values[layer]),
            KvShape{.kv_heads = kv_heads, .rows = tokens, .head_dim = head_dim}, layout::head_token_dim};
  }
};

Selection some_selection(Random& random, std::size_t kv_heads, std::size_t rows) {
  const auto list = [&] {
    Rows kept;
    const std::size_t share = random.between(1, 4);
    for (std::uint32_t row = 0; row < rows; ++row) {
      if (random.below(4) < share) {
        kept.push_back(row);
      }
    }
    if (kept.empty()) {
      kept.push_back(static_cast<std::uint32_t>(random.below(rows)));
    }
    return kept;
  };
  if (random.coin()) {
    return Selection::shared_by_heads(list());
  }
  std::vector<Rows> heads;
  for (std::size_t head = 0; head < kv_heads; ++head) {
    heads.push_back(list());
  }
  return Selection::per_head(heads);
}

TEST(Compaction, LayersStagedTogetherMoveAfterwardsEachByItsOwnSelection) {
  Random random(73);
  for (int round = 0; round < 150; ++round) {
    const std::size_t tokens = random.between(1, 200);
    Caches caches(random.between(2, 4), random.between(1, 3), tokens);
    const Caches before = caches;
    Compaction compaction{caches.layers};
    std::vector<Selection> selections;
    compaction.start();
    for (std::size_t l = 0; l < caches.layers; ++l) {
      selections.push_back(some_selection(random, caches.kv_heads, tokens));
      const auto kv = caches.view(l);
      compaction.stage(caches.state, caches.shape(), l, kv, kv, selections[l], caches.workspace);
    }
    ASSERT_EQ(caches.keys, before.keys) << "staging moves nothing";
    Selection again;
    compaction.reserve(again, caches.kv_heads);
    std::vector<std::size_t> rows(caches.kv_heads);
    for (std::size_t l = 0; l < caches.layers; ++l) {
      ASSERT_EQ(caches.state.layer(l).rows(0), tokens) << "and says nothing";
      const auto kv = caches.view(l);
      const std::size_t made = reference::allocations;
      compaction.selection_of(caches.state, l, kv, rows, again);
      compaction.commit(caches.state, l, kv, kv, again, caches.workspace, caches.executor);
      ASSERT_EQ(reference::allocations, made) << "nothing that may fail is left to do";
      for (std::size_t head = 0; head < caches.kv_heads; ++head) {
        const auto expected = selections[l].rows(head);
        ASSERT_TRUE(std::ranges::equal(again.rows(head), expected));
        ASSERT_TRUE(std::ranges::equal(caches.state.layer(l).positions(head), expected));
        for (std::size_t row = 0; row < expected.size(); ++row) {
          for (std::size_t e = 0; e < head_dim; ++e) {
            const std::size_t to = (head * tokens + row) * head_dim + e;
            const std::size_t from = (head * tokens + expected[row]) * head_dim + e;
            ASSERT_EQ(caches.keys[l][to], before.keys[l][from]);
            ASSERT_EQ(caches.values[l][to], before.values[l][from]);
          }
        }
      }
    }
  }
}

TEST(Compaction, WhatDoesNotFitIsNamedWhenItIsStaged) {
  Caches caches(1, 2, 10);
  Compaction compaction{1};
  const auto kv = caches.view(0);
  const auto stage = [&](const Selection& selection, const auto& target) {
    compaction.start();
    compaction.stage(caches.state, caches.shape(), 0, kv, target, selection, caches.workspace);
  };
  expect_error<ArgumentError>(
      [&] {
        stage(Selection::shared_by_heads(Rows{3, 10}), kv);
      },
      {"keeps row 10", "rows 0 to 9"});
  expect_error<ArgumentError>(
      [&] {
        stage(Selection::shared_by_heads(Rows{3, 3}), kv);
      },
      {"row 3 after row 3", "ascend"});
  Caches small(1, 2, 2);
  expect_error<ArgumentError>(
      [&] {
        stage(Selection::shared_by_heads(Rows{1, 2, 3}), small.view(0));
      },
      {"target has 2 rows of KV head 0", "keeps 3", "give it room"});
  EXPECT_EQ(caches.state.layer(0).rows(), 10U);
}

}  // namespace
}  // namespace compresskv::sequence
