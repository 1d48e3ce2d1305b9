// A sequence over many turns: chunks of a prompt, new user turns, tokens taken back, tokens that must stay.

#include <gtest/gtest.h>

#include <algorithm>
#include <compresskv/compresskv.hpp>
#include <cstdint>
#include <numeric>
#include <vector>

#include "reference/cache.hpp"
#include "reference/errors.hpp"
#include "reference/layer_case.hpp"

namespace compresskv {
namespace {

using reference::expect_error;
using reference::Random;
using reference::SemanticPlan;
using Rows = std::vector<std::uint32_t>;

constexpr std::size_t window = 4;
constexpr ModelShape shape{.layers = 1, .query_heads = 4, .kv_heads = 2, .head_dim = 8};

SemanticPlan plan_of(Budget budget) {
  return {shape,
          score::SemanticRetrieval{HeadRanking{{{1, 2, 0, 3}}}, {.heads_per_layer = 2, .window = window}},
          select::SharedTopK{}, budget::Uniform{budget}};
}

Rows positions_of(const Retained& retained) {
  return {retained.positions().begin(), retained.positions().end()};
}

/// One layer as an engine holds it. The first element of a value row is the position of its token, and
/// `positions` says the same: what a compressor remembers is held against both.
struct Sequence {
  Random random;
  reference::Cache<float> cache{{.kv_heads = 2, .rows = 1, .head_dim = 8, .allocated_rows = 400},
                                reference::Arrangement::token_head_dim};
  std::vector<float> queries = std::vector<float>(4 * window * 8);
  Rows positions;
  std::size_t next = 0;

  Sequence(std::size_t prompt, std::uint64_t seed) : random(seed) { append(prompt); }

  void append(std::size_t count) {
    const std::size_t rows = positions.size();
    cache.fill_rows(random, rows, rows + count, 1.5F);
    for (std::size_t i = 0; i < count; ++i, ++next) {
      for (std::size_t head = 0; head < 2; ++head) {
        cache.values[cache.at(head, rows + i, 0)] = static_cast<float>(next);
      }
      positions.push_back(static_cast<std::uint32_t>(next));
    }
    for (float& x : queries) {
      x = random.gaussian();
    }
  }

  StridedKv<float> view() {
    cache.shape.rows = positions.size();
    return cache.view();
  }
  QueryWindow<float> observation() const {
    return {queries.data(), {.query_heads = 4, .queries = window, .head_dim = 8}};
  }

  template <class C>
  const Retained& compress(C& compressor) {
    const Rows before = positions;
    const Retained& kept = compressor.compress(0, view(), observation());
    positions = positions_of(kept);
    EXPECT_TRUE(std::includes(before.begin(), before.end(), positions.begin(), positions.end()));
    EXPECT_TRUE(std::is_sorted(positions.begin(), positions.end()));
    EXPECT_EQ(kept.next_position(), next);
    for (std::size_t row = 0; row < positions.size(); ++row) {
      for (std::size_t head = 0; head < 2; ++head) {
        EXPECT_EQ(cache.values[cache.at(head, row, 0)], static_cast<float>(positions[row]));
      }
    }
    for (std::size_t i = 1; i <= std::min(window, before.size()); ++i) {
      EXPECT_EQ(positions[positions.size() - i], before[before.size() - i]) << "the window is whole";
    }
    return kept;
  }

  /// The engine drops what a truncated compressor no longer holds.
  void truncate(std::size_t position) {
    std::erase_if(positions, [&](std::uint32_t p) { return p >= position; });
    next = position;
  }
};

// ---- begin_turn ----

TEST(Turns, PositionsStayTrueOverManyTurns) {
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    SCOPED_TRACE(seed);
    const auto plan = plan_of(seed % 2 == 0 ? Budget::tokens_per_layer(30) : Budget::kept_ratio(0.25));
    Sequence sequence(50 + seed, seed);
    Compressor compressor{plan};
    compressor.begin(sequence.next);
    sequence.compress(compressor);
    for (int turn = 0; turn < 8; ++turn) {
      sequence.append(sequence.random.between(1, 25));
      compressor.begin_turn(sequence.next);
      const std::size_t capacity = seed % 2 == 0 ? std::min<std::size_t>(30, sequence.next)
                                                 : std::max<std::size_t>(window, sequence.next / 4);
      EXPECT_EQ(compressor.capacities()[0], capacity) << "budgets resolve anew";
      const std::size_t rows = sequence.positions.size();
      EXPECT_EQ(sequence.compress(compressor).rows(), std::min(rows, capacity));
    }
  }
}

TEST(Turns, APromptInChunksNeverHoldsMoreThanItsWorkingRowsAndAChunk) {
  const auto plan = plan_of(Budget::tokens_per_layer(40));
  Sequence sequence(60, 3);
  Compressor compressor{plan};
  compressor.begin(60);
  sequence.compress(compressor);
  for (int chunk = 0; chunk < 12; ++chunk) {
    sequence.append(60);
    EXPECT_LE(sequence.positions.size(), 100U);
    compressor.begin_turn(sequence.next);
    EXPECT_EQ(sequence.compress(compressor).rows(), 40U);
  }
  EXPECT_EQ(compressor.retained(0).next_position(), 780U);
  EXPECT_LT(sequence.positions[0], 720U) << "the last chunk does not take all rows";
}

TEST(Turns, AFailedTurnChangesNothing) {
  const auto plan = plan_of(Budget::tokens_per_layer(20));
  Compressor compressor{plan};
  expect_error<ArgumentError>([&] { compressor.begin_turn(60); },
                              {"begin() was not called", "not begin_turn()"});
  expect_error<ArgumentError>([&] { compressor.truncate(5); }, {"begin() was not called"});
  compressor.begin(60);
  Sequence sequence(60, 4);
  sequence.compress(compressor);
  expect_error<ArgumentError>([&] { compressor.begin_turn(59); },
                              {"total_tokens is 59", "layer 0 has seen 60", "truncate()"});
  EXPECT_EQ(compressor.retained(0).rows(), 20U);
  EXPECT_EQ(compressor.capacities()[0], 20U);
  sequence.append(7);
  compressor.begin_turn(67);
  EXPECT_EQ(sequence.compress(compressor).rows(), 20U);
}

// ---- truncate ----

TEST(Turns, TokensTakenBackAreAsIfTheyHadNeverBeen) {
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    SCOPED_TRACE(seed);
    const auto plan = plan_of(Budget::tokens_per_layer(20));
    Sequence sequence(60, seed);
    Compressor compressor{plan};
    compressor.begin(60);
    sequence.compress(compressor);
    for (int round = 0; round < 5; ++round) {
      const std::size_t drafted = sequence.random.between(1, 9);
      sequence.append(drafted);
      if (sequence.random.coin()) {
        compressor.begin_turn(sequence.next);
        sequence.compress(compressor);  // the draft is in the compressed rows
      }
      const std::size_t position = sequence.next - sequence.random.between(0, drafted);
      const Held held = compressor.truncate(position);
      sequence.truncate(position);
      EXPECT_EQ(held.rows(0), sequence.positions.size()) << "what the engine shortens its cache to";
      EXPECT_EQ(held.next_position(), position);
      const Retained& left = compressor.retained(0);
      EXPECT_LE(left.next_position(), position);
      // Rows that the compressor has not seen yet stand behind those it knows.
      for (std::size_t row = 0; row < sequence.positions.size(); ++row) {
        ASSERT_EQ(left.position(row), sequence.positions[row]) << "row " << row;
      }
      for (std::size_t i = 0; i < drafted; ++i) {
        EXPECT_EQ(left.row(position + i), std::nullopt);
      }
      sequence.append(3);
      compressor.begin_turn(sequence.next);
      sequence.compress(compressor);
    }
  }
}

TEST(Turns, TruncateReachesLayersThatAreWholeAndHeadsThatDiffer) {
  const auto plan = plan_of(Budget::tokens_per_layer(20));
  Sequence sequence(60, 5);
  Compressor compressor{plan};
  compressor.begin(60);
  compressor.truncate(50);
  EXPECT_EQ(compressor.retained(0).rows(), 50U);
  EXPECT_EQ(compressor.retained(0).next_position(), 50U);
  sequence.truncate(50);
  compressor.compact(0, sequence.view(), Selection::per_head(std::vector<Rows>{{1, 5, 49}, {2, 40, 41, 48}}));
  Compressor beam = compressor;
  compressor.truncate(41);
  const Retained& left = compressor.retained(0);
  EXPECT_EQ(Rows(left.positions(0).begin(), left.positions(0).end()), (Rows{1, 5}));
  EXPECT_EQ(Rows(left.positions(1).begin(), left.positions(1).end()), (Rows{2, 40}));
  EXPECT_EQ(left.next_position(), 41U);
  EXPECT_EQ(left.position(2, 0), 41U) << "the next row appended";
  EXPECT_EQ(beam.retained(0).rows(1), 4U) << "a copy goes its own way";
  EXPECT_EQ(beam.retained(0).next_position(), 50U);
  compressor.truncate(1000);
  EXPECT_EQ(left.next_position(), 41U) << "what lies ahead is not there to take back";
  expect_error<ArgumentError>([&] { compressor.truncate(0); },
                              {"truncate position is 0", "begin() starts a new sequence"});
}

// ---- protection ----

TEST(Protection, ProtectedTokensStayAndTheBestOfTheRest) {
  for (std::uint64_t seed = 0; seed < 60; ++seed) {
    SCOPED_TRACE(seed);
    Random random(seed);
    Protection protection{.keep_first = random.below(6), .keep_last = random.below(12)};
    Rows listed;
    for (std::uint32_t position = 0; position < 60; ++position) {
      if (random.below(15) == 0) {
        listed.push_back(position);
      }
    }
    protection.positions = listed;
    const auto plan = plan_of(Budget::tokens_per_layer(32));
    Sequence sequence(60, seed);
    Compressor compressor{plan};
    compressor.begin(60);
    const auto scores = compressor.score(0, sequence.view(), sequence.observation());
    std::vector<float> marked(scores.values().begin(), scores.values().end());
    for (std::uint32_t position = 0; position < marked.size(); ++position) {
      if (position < protection.keep_first || position + protection.keep_last >= 60 ||
          std::binary_search(listed.begin(), listed.end(), position)) {
        marked[position] = 1e30F;
      }
    }
    compressor.begin(60, protection);
    listed.clear();  // the positions were copied
    const auto original = sequence.cache;
    const Retained& kept = sequence.compress(compressor);
    const Rows expected = reference::rows_to_keep(marked, window, 32);
    EXPECT_EQ(positions_of(kept), expected) << "and the capacity stays exact";
    auto compacted = original.compacted([&](std::size_t) { return expected; });
    EXPECT_EQ(sequence.cache, compacted);
  }
}

TEST(Protection, HoldsByPositionOverTurns) {
  const Rows listed{10, 33, 70};
  const auto plan = plan_of(Budget::tokens_per_layer(16));
  Sequence sequence(60, 6);
  Compressor compressor{plan};
  const Rows first{10, 33};
  compressor.begin(60, {.keep_first = 3, .positions = first});
  sequence.compress(compressor);
  for (int turn = 0; turn < 4; ++turn) {
    sequence.append(20);
    compressor.begin_turn(sequence.next, {.keep_first = 3, .positions = listed});
    const Retained& kept = sequence.compress(compressor);
    EXPECT_EQ(kept.rows(), 16U);
    for (const std::size_t position : {0U, 1U, 2U, 10U, 33U, 70U}) {
      EXPECT_TRUE(kept.row(position).has_value()) << position;
    }
  }
  // A turn without protection lets them go, or keeps them on their merits.
  sequence.append(20);
  compressor.begin_turn(sequence.next);
  EXPECT_EQ(sequence.compress(compressor).rows(), 16U);
}

TEST(Protection, EachKvHeadKeepsItsOwn) {
  const Plan plan{shape,
                  score::GroupedRetrieval{HeadRanking{{{1, 2}}}, {.heads_per_layer = 2, .window = window}},
                  select::GroupedTopK{}, budget::Uniform{Budget::tokens_per_layer(12)}};
  Sequence sequence(60, 7);
  Compressor compressor{plan};
  const Rows listed{20, 21};
  compressor.begin(60, {.keep_first = 2, .keep_last = 6, .positions = listed});
  const Retained& kept = compressor.compress(0, sequence.view(), sequence.observation());
  for (std::size_t head = 0; head < 2; ++head) {
    EXPECT_EQ(kept.rows(head), 12U);
    for (const std::size_t position : {0U, 1U, 20U, 21U, 54U, 55U, 59U}) {
      EXPECT_TRUE(kept.row(position, head).has_value()) << "KV head " << head << " position " << position;
    }
  }
}

TEST(Protection, TooManyTokensAreRefusedBeforeAnythingMoves) {
  const auto plan = plan_of(Budget::tokens_per_layer(16));
  Sequence sequence(60, 8);
  Compressor compressor{plan};
  compressor.begin(60, {.keep_first = 13});
  const auto before = sequence.cache;
  expect_error<ArgumentError>(
      [&] { compressor.compress(0, sequence.view(), sequence.observation()); },
      {"layer 0 has room for 12 tokens beside the window, 13 are protected", "protect fewer"});
  EXPECT_TRUE(reference::same_bytes(sequence.cache.keys, before.keys) &&
              reference::same_bytes(sequence.cache.values, before.values));
  EXPECT_EQ(compressor.retained(0).rows(), 60U);
  compressor.begin(60, {.keep_first = 12});
  const Retained& kept = sequence.compress(compressor);
  EXPECT_EQ(positions_of(kept), (Rows{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 56, 57, 58, 59}));
}

TEST(Protection, RejectsPositionsThatAreNot) {
  const auto plan = plan_of(Budget::tokens_per_layer(16));
  Compressor compressor{plan};
  compressor.begin(60);
  const auto begin = [&](const Rows& positions) { compressor.begin(50, {.positions = positions}); };
  expect_error<ArgumentError>(
      [&] {
        begin({5, 5});
      },
      {"protected position 5 comes after 5", "ascend, each once"});
  expect_error<ArgumentError>([&] { begin({7, 3}); }, {"protected position 3 comes after 7"});
  expect_error<ArgumentError>([&] { begin({7, 50}); }, {"protected position is 50", "positions 0 to 49"});
  EXPECT_EQ(compressor.retained(0).rows(), 60U) << "the sequence before is as it was";
}

}  // namespace
}  // namespace compresskv
