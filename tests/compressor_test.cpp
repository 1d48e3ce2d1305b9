// What a compressor remembers over a sequence, and what it refuses. What it computes:
// compressor_cases_test.cpp.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <compresskv/compresskv.hpp>
#include <cstdint>
#include <functional>
#include <limits>
#include <numeric>
#include <vector>

#include "reference/cache.hpp"
#include "reference/errors.hpp"
#include "reference/layer_case.hpp"
#include "reference/random.hpp"

namespace compresskv {
namespace {

using reference::Cache;
using reference::expect_error;
using reference::Random;
using reference::SemanticPlan;
using Rows = std::vector<std::uint32_t>;

constexpr ModelShape shape{.layers = 2, .query_heads = 4, .kv_heads = 2, .head_dim = 8};
constexpr std::size_t window = 4;

SemanticPlan plan_of(Budget budget) {
  return {shape,
          score::SemanticRetrieval{HeadRanking{{{1, 2, 0, 3}, {3, 0, 1, 2}}},
                                   {.heads_per_layer = 2, .window = window}},
          select::SharedTopK{}, budget::Uniform{budget}};
}

Rows positions_of(const Retained& retained, std::size_t head = 0) {
  const auto positions = retained.positions(head);
  return {positions.begin(), positions.end()};
}

Rows first_rows(std::size_t count) {
  Rows rows(count);
  std::iota(rows.begin(), rows.end(), 0U);
  return rows;
}

/// One layer of a running sequence. Each row's value holds the true position of its token, so that what the
/// compressor says can be held against what lies there.
class Running {
 public:
  explicit Running(std::size_t prompt, std::uint64_t seed = 1)
      : random_(seed),
        cache_({.kv_heads = 2, .rows = 1, .head_dim = 8, .allocated_rows = 200},
               reference::Arrangement::token_head_dim) {
    rows_ = 0;
    append(prompt);
  }

  /// Decodes: rows behind those that are there, the last window's queries with them.
  void append(std::size_t count) {
    cache_.shape.rows = rows_ + count;
    cache_.fill_rows(random_, rows_, rows_ + count, 1.5F);
    for (std::size_t head = 0; head < 2; ++head) {
      for (std::size_t i = 0; i < count; ++i) {
        cache_.values[cache_.at(head, rows_ + i, 0)] = static_cast<float>(next_position_ + i);
      }
    }
    rows_ += count;
    next_position_ += count;
    queries_.resize(4 * window * 8);
    for (float& x : queries_) {
      x = random_.gaussian();
    }
  }

  StridedKv<float> view() { return cache_.view(); }
  QueryWindow<float> observation() const {
    return {queries_.data(), {.query_heads = 4, .queries = window, .head_dim = 8}};
  }
  void shrink(std::size_t rows) {
    rows_ = rows;
    cache_.shape.rows = rows;
  }
  std::size_t rows() const { return rows_; }
  std::size_t next_position() const { return next_position_; }
  std::size_t position_at(std::size_t head, std::size_t row) const {
    return static_cast<std::size_t>(cache_.values[cache_.at(head, row, 0)]);
  }
  Cache<float>& cache() { return cache_; }
  std::vector<float>& queries() { return queries_; }

 private:
  Random random_;
  Cache<float> cache_;
  std::vector<float> queries_;
  std::size_t rows_ = 0;
  std::size_t next_position_ = 0;
};

// ---- row is not position ----

TEST(Compressor, PositionsStayTrueOverRepeatedCompression) {
  const auto plan = plan_of(Budget::tokens_per_layer(20));
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    Random random(seed);
    Running sequence(60, seed);
    Compressor compressor{plan};
    compressor.begin(60);
    for (int round = 0; round < 8; ++round) {
      // What the engine asks while it decodes: rows appended since stand at the next positions.
      const Retained& before = compressor.retained(0);
      for (std::size_t row = 0; row < sequence.rows(); ++row) {
        ASSERT_EQ(before.position(row), sequence.position_at(0, row));
      }
      const Retained& kept = compressor.compress(0, sequence.view(), sequence.observation());
      sequence.shrink(kept.rows());
      ASSERT_EQ(kept.rows(), 20U);
      ASSERT_EQ(kept.next_position(), sequence.next_position());
      for (std::size_t row = 0; row < kept.rows(); ++row) {
        for (std::size_t head = 0; head < 2; ++head) {
          ASSERT_EQ(kept.position(row, head), sequence.position_at(head, row));
        }
        ASSERT_EQ(kept.row(kept.position(row)), row);
      }
      for (std::size_t i = 0; i < window; ++i) {
        ASSERT_EQ(kept.position(19 - i), sequence.next_position() - 1 - i) << "the window is whole";
      }
      sequence.append(random.below(15));
      compressor.begin_turn(sequence.next_position());
    }
    EXPECT_EQ(compressor.retained(1).rows(), 60U) << "the other layer knows nothing of it";
    EXPECT_EQ(compressor.retained(1).next_position(), 60U);
  }
}

TEST(Compressor, RowOfAPositionIsNothingWhereItWasEvicted) {
  const auto plan = plan_of(Budget::tokens_per_layer(20));
  Compressor compressor{plan};
  compressor.begin(60);
  Running sequence(60);
  const Retained& kept = compressor.compact(0, sequence.view(), Selection::shared_by_heads(Rows{3, 7, 59}));
  EXPECT_EQ(kept.row(7), 1U);
  EXPECT_EQ(kept.row(59), 2U);
  EXPECT_EQ(kept.row(8), std::nullopt) << "evicted";
  EXPECT_EQ(kept.row(60), std::nullopt) << "ahead";
  EXPECT_EQ(kept.position(2), 59U);
  EXPECT_EQ(kept.position(3), 60U) << "the first row appended";
  EXPECT_EQ(kept.position(5), 62U);
}

TEST(Compressor, KvHeadsMayKeepDifferentRows) {
  const auto plan = plan_of(Budget::tokens_per_layer(20));
  Compressor compressor{plan};
  compressor.begin(30);
  Running sequence(30);
  const auto original = sequence.cache();
  const std::vector<Rows> lists{{0, 4, 5, 29}, {2, 29}};
  const Retained& kept = compressor.compact(0, sequence.view(), Selection::per_head(lists));
  EXPECT_FALSE(kept.shared());
  EXPECT_EQ(kept.rows(0), 4U);
  EXPECT_EQ(kept.rows(1), 2U);
  EXPECT_EQ(positions_of(kept, 0), lists[0]);
  EXPECT_EQ(positions_of(kept, 1), lists[1]);
  EXPECT_EQ(kept.bytes_freed(), (26U + 28U) * 8 * 2 * sizeof(float));
  EXPECT_EQ(sequence.cache(), original.compacted([&](std::size_t head) { return lists[head]; }));
  expect_error<ArgumentError>([&] { return kept.rows(); },
                              {"KV head 1 keeps 2 rows, KV head 0 4", "ask rows(kv_head)"});
}

/// A cache whose KV heads hold different numbers of rows.
struct UnevenKv : StridedKv<float> {
  std::vector<std::size_t> counts;

  UnevenKv(const StridedKv<float>& kv, std::vector<std::size_t> rows)
      : StridedKv<float>(kv), counts(std::move(rows)) {}
  std::size_t rows(std::size_t head) const { return counts[head]; }
  Run<float> key_run(std::size_t head, std::size_t i) const { return cut(StridedKv::key_run(head, i), head); }
  Run<float> value_run(std::size_t head, std::size_t i) const {
    return cut(StridedKv::value_run(head, i), head);
  }

 private:
  Run<float> cut(Run<float> run, std::size_t head) const {
    run.rows = counts[head];
    return run;
  }
};
static_assert(KvView<UnevenKv>);

TEST(Compressor, UnevenHeadsGoOnAtTheSamePosition) {
  const auto plan = plan_of(Budget::tokens_per_layer(20));
  Compressor compressor{plan};
  compressor.begin(30);
  Running sequence(30);
  compressor.compact(0, sequence.view(), Selection::per_head(std::vector<Rows>{{0, 4, 5, 29}, {2, 29}}));
  // Two tokens more for each head; then the oldest row of each goes.
  compressor.begin_turn(32);
  const UnevenKv kv(sequence.view(), {6, 4});
  const Retained& kept =
      compressor.compact(0, kv, Selection::per_head(std::vector<Rows>{{1, 2, 3, 4, 5}, {1, 2, 3}}));
  EXPECT_EQ(positions_of(kept, 0), (Rows{4, 5, 29, 30, 31}));
  EXPECT_EQ(positions_of(kept, 1), (Rows{29, 30, 31}));
  EXPECT_EQ(kept.next_position(), 32U);

  const UnevenKv astray(sequence.view(), {7, 3});
  expect_error<ArgumentError>(
      [&] {
        compressor.compact(0, astray, Selection::shared_by_heads(Rows{0, 1}));
      },
      {"layer 0 KV head 1 has 0 rows appended, KV head 0 has 2", "append every token to all heads"});
  EXPECT_EQ(kept.next_position(), 32U);
}

// ---- short prompts ----

TEST(Compressor, WhatFitsStaysWhole) {
  const auto plan = plan_of(Budget::tokens_per_layer(20));
  for (const std::size_t tokens : {1U, 3U, 4U, 19U, 20U}) {
    Compressor compressor{plan};
    compressor.begin(tokens);
    Running sequence(tokens);
    const auto original = sequence.cache();
    const Retained& kept = compressor.compress(0, sequence.view(), sequence.observation());
    EXPECT_EQ(kept.rows(), tokens);
    EXPECT_EQ(positions_of(kept), first_rows(tokens));
    EXPECT_EQ(kept.next_position(), tokens);
    EXPECT_EQ(kept.bytes_freed(), 0U);
    EXPECT_TRUE(kept.shared());
    EXPECT_EQ(sequence.cache(), original);
  }
}

TEST(Compressor, APromptShorterThanTheWindowGrowsIntoIt) {
  const auto plan = plan_of(Budget::tokens_per_layer(window));
  for (const std::size_t prompt : {1U, 2U, 3U, 4U}) {
    Compressor compressor{plan};
    compressor.begin(prompt);
    Running sequence(prompt);
    EXPECT_EQ(compressor.compress(0, sequence.view(), sequence.observation()).rows(), prompt);
    sequence.append(window - prompt);
    compressor.begin_turn(window);
    EXPECT_EQ(compressor.compress(0, sequence.view(), sequence.observation()).rows(), window);
    sequence.append(9);
    compressor.begin_turn(13);
    const Retained& kept = compressor.compress(0, sequence.view(), sequence.observation());
    EXPECT_EQ(positions_of(kept), (Rows{9, 10, 11, 12})) << "the window alone, and whole";
    EXPECT_EQ(kept.next_position(), 13U);
  }
}

TEST(Compressor, EqualScoresKeepTheLowerPositions) {
  const auto plan = plan_of(Budget::tokens_per_layer(10));
  Compressor compressor{plan};
  compressor.begin(40);
  Running sequence(40);
  std::fill(sequence.queries().begin(), sequence.queries().end(), 0.0F);
  const Retained& kept = compressor.compress(0, sequence.view(), sequence.observation());
  // Average pooling takes the two tokens at either border down: they see padding.
  EXPECT_EQ(positions_of(kept), (Rows{2, 3, 4, 5, 6, 7, 36, 37, 38, 39}));
}

// ---- budgets ----

TEST(Compressor, BudgetsResolveWhenAPromptBegins) {
  ModelShape with_bytes = shape;
  with_bytes.kv_row_bytes = 64;
  const LayerErrors errors({0.75, 0.25}, {});
  const score::SemanticRetrieval scorer{HeadRanking{{{0, 1}, {0, 1}}},
                                        {.heads_per_layer = 1, .window = window}};
  const auto capacities = [&](Budget budget, std::size_t tokens) {
    const Plan plan{with_bytes, scorer, select::SharedTopK{}, budget::ErrorAware{errors, budget}};
    Compressor compressor{plan};
    compressor.begin(tokens);
    return std::vector<std::size_t>(compressor.capacities().begin(), compressor.capacities().end());
  };
  using Capacities = std::vector<std::size_t>;
  // m = 32, 36 rows beyond it: 32 + 27 and 32 + 9.
  EXPECT_EQ(capacities(Budget::tokens_per_layer(50), 1000), (Capacities{59, 41}));
  EXPECT_EQ(capacities(Budget::kept_ratio(0.05), 1000), (Capacities{59, 41}));
  EXPECT_EQ(capacities(Budget::bytes(50 * 2 * 2 * 64), 1000), (Capacities{59, 41}));
  EXPECT_EQ(capacities(Budget::tokens_per_layer(50), 50), (Capacities{50, 50})) << "nothing is evicted";
  EXPECT_EQ(capacities(Budget::tokens_per_layer(50), 51), (Capacities{51, 49}))
      << "no layer needs more than S";
  EXPECT_EQ(capacities(Budget::kept_ratio(0.001), 1000), (Capacities{4, 4})) << "never below the window";
}

TEST(Compressor, EachLayerKeepsItsOwnCapacity) {
  const LayerErrors errors({0.75, 0.25}, {});
  const Plan plan{shape,
                  score::SemanticRetrieval{HeadRanking{{{0}, {1}}}, {.heads_per_layer = 1, .window = window}},
                  select::SharedTopK{}, budget::ErrorAware{errors, Budget::tokens_per_layer(50)}};
  Compressor compressor{plan};
  compressor.begin(120);
  Running first(120, 1);
  Running second(120, 2);
  EXPECT_EQ(compressor.compress(0, first.view(), first.observation()).rows(), 59U);
  EXPECT_EQ(compressor.compress(1, second.view(), second.observation()).rows(), 41U);
}

// ---- sequences ----

TEST(Compressor, ABeginForgetsTheSequenceBefore) {
  const auto plan = plan_of(Budget::tokens_per_layer(10));
  Compressor compressor{plan};
  compressor.begin(60);
  Running first(60, 1);
  compressor.compress(0, first.view(), first.observation());
  compressor.begin(30);
  EXPECT_EQ(compressor.retained(0).rows(), 30U);
  EXPECT_EQ(compressor.retained(0).next_position(), 30U);
  EXPECT_EQ(compressor.retained(0).bytes_freed(), 0U);
  Running second(30, 2);
  Running again(30, 2);
  Compressor fresh{plan};
  fresh.begin(30);
  EXPECT_EQ(positions_of(compressor.compress(0, second.view(), second.observation())),
            positions_of(fresh.compress(0, again.view(), again.observation())));
}

TEST(Compressor, ACopyGoesItsOwnWay) {
  const auto plan = plan_of(Budget::tokens_per_layer(10));
  Compressor beam{plan};
  beam.begin(60);
  Running sequence(60);
  beam.compress(0, sequence.view(), sequence.observation());
  sequence.shrink(10);
  Compressor other = beam;
  Running copy = sequence;
  sequence.append(5);
  const Rows before = positions_of(beam.retained(0));
  other.compact(0, copy.view(), Selection::shared_by_heads(Rows{0, 9}));
  EXPECT_EQ(positions_of(beam.retained(0)), before);
  EXPECT_EQ(positions_of(other.retained(0)), (Rows{before[0], before[9]}));
  beam.begin_turn(65);
  beam.compress(0, sequence.view(), sequence.observation());
  EXPECT_EQ(beam.retained(0).next_position(), 65U);
  EXPECT_EQ(other.retained(0).next_position(), 60U);
}

TEST(Compressor, GathersFromACacheThatIsReadOnly) {
  const auto plan = plan_of(Budget::tokens_per_layer(10));
  Compressor compressor{plan};
  compressor.begin(60);
  Running source(60);
  const float* keys = source.cache().keys.data();
  const float* values = source.cache().values.data();
  const StridedKv<const float> read_only(keys, values, source.cache().shape, source.cache().strides);
  const Selection selection = compressor.select(0, compressor.score(0, read_only, source.observation()));
  Cache<float> target({.kv_heads = 2, .rows = 10, .head_dim = 8}, reference::Arrangement::head_token_dim);
  const Retained& kept = compressor.gather(0, read_only, selection, target.view());
  for (std::size_t row = 0; row < 10; ++row) {
    EXPECT_EQ(target.values[target.at(1, row, 0)], static_cast<float>(kept.position(row)));
  }
}

TEST(Compressor, ReduceSeesTheScoresAndDecides) {
  const auto plan = plan_of(Budget::tokens_per_layer(6));
  Compressor compressor{plan};
  compressor.begin(40);
  Running sequence(40);
  const auto own = compressor.score(0, sequence.view(), sequence.observation());
  const std::vector<float> expected(own.values().begin(), own.values().end());
  const Retained& kept =
      compressor.compress(0, sequence.view(), sequence.observation(), [&](std::span<float> scores) {
        EXPECT_TRUE(std::equal(scores.begin(), scores.end(), expected.begin(), expected.end()));
        std::fill(scores.begin(), scores.end(), 0.0F);
        scores[17] = 2.0F;
        scores[30] = 1.0F;
      });
  EXPECT_EQ(positions_of(kept), (Rows{17, 30, 36, 37, 38, 39}));
}

// ---- what is refused, and that nothing has changed then ----

/// Makes the call fail, then shows that neither the cache nor the compressor noticed.
class Refusal : public testing::Test {
 protected:
  template <class E = ArgumentError, class Call>
  void refuses(Call&& call, std::initializer_list<std::string_view> parts) {
    const auto cache = sequence_.cache();
    const Rows before = positions_of(compressor_.retained(0));
    expect_error<E>(call, parts);
    EXPECT_EQ(sequence_.cache(), cache) << "the cache must be byte-identical";
    EXPECT_EQ(positions_of(compressor_.retained(0)), before);
    EXPECT_EQ(compressor_.retained(0).next_position(), 40U);
    // And goes on as one that never failed (where the test itself did not spoil the cache).
    Compressor other = compressor_;
    Running copy = sequence_;
    Running clean(40);
    Compressor fresh{plan_};
    fresh.begin(40);
    if (copy.cache() == clean.cache()) {
      EXPECT_EQ(positions_of(other.compress(0, copy.view(), clean.observation())),
                positions_of(fresh.compress(0, clean.view(), clean.observation())));
      EXPECT_EQ(copy.cache(), clean.cache());
    }
  }

  QueryWindow<float> queries(const QueryShape& query) const { return {memory_.data(), query}; }

  SemanticPlan plan_ = plan_of(Budget::tokens_per_layer(10));
  Compressor<SemanticPlan> compressor_ = [this] {
    Compressor<SemanticPlan> compressor{plan_};
    compressor.begin(40);
    return compressor;
  }();
  Running sequence_{40};
  std::vector<float> memory_ = std::vector<float>(4000, 0.1F);
};

TEST_F(Refusal, BeforeBegin) {
  Compressor compressor{plan_};
  const auto says = [](auto&& call) { expect_error<ArgumentError>(call, {"begin() was not called"}); };
  says([&] { compressor.compress(0, sequence_.view(), sequence_.observation()); });
  says([&] { compressor.score(0, sequence_.view(), sequence_.observation()); });
  says([&] { compressor.compact(0, sequence_.view(), Selection::shared_by_heads(Rows{0})); });
  says([&] { compressor.retained(0); });
}

TEST_F(Refusal, NoPromptAndTooLongAPrompt) {
  refuses([&] { compressor_.begin(0); }, {"prompt_tokens is 0", "at least one token"});
  refuses([&] { compressor_.begin(std::size_t{1} << 32U); }, {"prompt_tokens is 4294967296", "32 bits"});
}

TEST_F(Refusal, ABeginThatFailsLeavesTheSequence) {
  const LayerErrors errors({0.5, 0.5}, {});
  const Plan plan{
      shape, score::SemanticRetrieval{HeadRanking{{{0}, {1}}}, {.heads_per_layer = 1, .window = window}},
      select::SharedTopK{}, budget::ErrorAware{errors, Budget::kept_ratio(0.5), {.min_rows = 20}}};
  Compressor compressor{plan};
  compressor.begin(100);
  expect_error<ArgumentError>([&] { compressor.begin(30); }, {"min_rows is 20", "budget is 15 rows a layer"});
  EXPECT_EQ(compressor.retained(0).rows(), 100U);
  EXPECT_EQ(compressor.capacities()[0], 50U);
  Running sequence(100);
  EXPECT_EQ(compressor.compress(0, sequence.view(), sequence.observation()).rows(), 50U);
}

TEST_F(Refusal, ALayerThatIsNot) {
  refuses([&] { compressor_.compress(2, sequence_.view(), sequence_.observation()); },
          {"layer is 2", "layers 0 to 1"});
  refuses([&] { compressor_.retained(7); }, {"layer is 7"});
  refuses([&] { compressor_.compact(2, sequence_.view(), Selection::shared_by_heads(Rows{0})); },
          {"layer is 2"});
}

TEST_F(Refusal, AViewOfAnotherModel) {
  Cache<float> wide({.kv_heads = 2, .rows = 40, .head_dim = 16}, reference::Arrangement::head_token_dim);
  refuses([&] { compressor_.compress(0, wide.view(), sequence_.observation()); },
          {"rows of 16 elements", "head_dim is 8"});
  Cache<float> many({.kv_heads = 4, .rows = 40, .head_dim = 8}, reference::Arrangement::head_token_dim);
  refuses([&] { compressor_.compress(0, many.view(), sequence_.observation()); },
          {"4 KV heads", "model has 2"});
  refuses([&] { compressor_.compact(0, many.view(), Selection::shared_by_heads(Rows{0})); }, {"4 KV heads"});
}

TEST_F(Refusal, AViewThatLacksRowsOrHasThemUneven) {
  Running shorter = sequence_;
  shorter.shrink(39);
  refuses([&] { compressor_.compress(0, shorter.view(), sequence_.observation()); },
          {"layer 0 KV head 0 has 39 rows", "at least 40", "begin() announced"});
  refuses([&] { compressor_.compact(0, shorter.view(), Selection::shared_by_heads(Rows{0})); },
          {"39 rows", "at least 40"});
  Running longer = sequence_;
  longer.append(3);
  const UnevenKv uneven(longer.view(), {40, 43});
  refuses([&] { compressor_.compress(0, uneven, sequence_.observation()); },
          {"KV head 1 of layer 0 has 43 rows, KV head 0 has 40", "one set of rows for all heads",
           "scores a KV head"});
}

TEST_F(Refusal, AnObservationOfAnotherShape) {
  refuses(
      [&] {
        compressor_.compress(0, sequence_.view(), queries({2, 4, 8}));
      },
      {"observation has 2 query heads", "model has 4"});
  refuses(
      [&] {
        compressor_.compress(0, sequence_.view(), queries({4, 3, 8}));
      },
      {"observation shows 3 queries", "the last 4"});
  refuses(
      [&] {
        compressor_.compress(0, sequence_.view(), queries({4, 4, 9}));
      },
      {"queries have 9 elements", "head_dim is 8"});
  const AttentionMatrix<float> attention(memory_.data(), {.query_heads = 4, .queries = 4, .tokens = 39});
  refuses([&] { compressor_.compress(0, sequence_.view(), attention); },
          {"attention has 39 columns", "40 rows"});
}

TEST_F(Refusal, KeysAndQueriesThatHoldNoNumbers) {
  // Retrieval heads of layer 0 are query heads 1 and 2, one on each KV head.
  float& key = sequence_.cache().keys[sequence_.cache().at(1, 11, 3)];
  const float before = key;
  key = std::numeric_limits<float>::quiet_NaN();
  refuses<ScoreError>([&] { compressor_.compress(0, sequence_.view(), sequence_.observation()); },
                      {"score of layer 0 query head 2 token 11 ", "not finite", "left as it is"});
  key = before;
  std::fill(memory_.begin(), memory_.end(), std::numeric_limits<float>::infinity());
  refuses<ScoreError>(
      [&] {
        compressor_.compress(0, sequence_.view(), queries({4, 4, 8}));
      },
      {"score of layer 0 query head 1 ", "not finite"});
}

TEST_F(Refusal, ScoresThatHoldNoNumbers) {
  for (const float poison : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
                             -std::numeric_limits<float>::infinity()}) {
    refuses<ScoreError>(
        [&] {
          compressor_.compress(0, sequence_.view(), sequence_.observation(),
                               [&](std::span<float> scores) { scores[9] = poison; });
        },
        {"score of layer 0 row 0 token 9 is ", "must be finite"});
  }
}

TEST_F(Refusal, ScoresOfAnotherShape) {
  std::vector<float> values(36);
  const std::vector<std::size_t> one{36};
  const std::vector<std::size_t> two{18, 36};
  const std::vector<std::size_t> windows(2, window);
  const std::vector<std::size_t> longer{20};
  using LayerScores = Scores<Granularity::layer>;
  refuses([&] { compressor_.select(0, LayerScores(values, two, windows)); },
          {"scores of layer 0 have 2 rows", "this plan's have 1"});
  refuses([&] { compressor_.select(0, LayerScores(values, one, longer)); },
          {"window of 20 rows", "the plan's window is 4"});
  refuses([&] { compressor_.select(2, LayerScores(values, one, windows)); }, {"layer is 2"});
}

TEST_F(Refusal, SelectionsThatDoNotFit) {
  const auto compact = [&](const Selection& selection) {
    return [&] { compressor_.compact(0, sequence_.view(), selection); };
  };
  refuses(compact(Selection::shared_by_heads(Rows{0, 40})), {"keeps row 40", "rows 0 to 39"});
  refuses(compact(Selection::shared_by_heads(Rows{5, 4})), {"row 4 after row 5"});
  refuses(compact(Selection{}), {"keeps no row"});
  refuses(compact(Selection::per_head(std::vector<Rows>{{0}})), {"lists for 1 KV heads", "layer has 2"});
}

TEST_F(Refusal, ATargetWithoutRoom) {
  Cache<float> target({.kv_heads = 2, .rows = 9, .head_dim = 8}, reference::Arrangement::head_token_dim);
  const auto before = target;
  const auto ten = Selection::shared_by_heads(first_rows(10));
  refuses([&] { compressor_.gather(0, sequence_.view(), ten, target.view()); },
          {"gather's target has 9 rows of KV head 0", "the selection keeps 10"});
  Cache<float> other({.kv_heads = 2, .rows = 20, .head_dim = 4}, reference::Arrangement::head_token_dim);
  refuses([&] { compressor_.gather(0, sequence_.view(), ten, other.view()); }, {"rows of 4 elements"});
  refuses(
      [&] {
        compressor_.gather(0, sequence_.view(), Selection::shared_by_heads(Rows{0, 99}), target.view());
      },
      {"keeps row 99"});
  EXPECT_EQ(target, before);
}

TEST(Plan, RefusesPoliciesThatDoNotFitTheModel) {
  const HeadRanking two_layers{{{0, 1}, {0, 1}}};
  const auto make = [&](const ModelShape& model, Budget budget) {
    return Plan{model, score::SemanticRetrieval{two_layers, {.heads_per_layer = 1, .window = 8}},
                select::SharedTopK{}, budget::Uniform{budget}};
  };
  EXPECT_NO_THROW(make(shape, Budget::tokens_per_layer(8)));
  ModelShape bad = shape;
  bad.kv_heads = 3;
  expect_error<ArgumentError>([&] { make(bad, Budget::tokens_per_layer(8)); }, {"multiple of kv_heads 3"});
  bad = shape;
  bad.layers = 5;
  expect_error<ArgumentError>([&] { make(bad, Budget::tokens_per_layer(8)); }, {"the model has 5"});
  expect_error<ArgumentError>([&] { make(shape, Budget::tokens_per_layer(7)); },
                              {"budget is 7 rows a layer", "window alone is 8"});
  expect_error<ArgumentError>([&] { make(shape, Budget::bytes(1000)); }, {"needs ModelShape::kv_row_bytes"});
  expect_error<ArgumentError>(
      [&] {
        Plan(shape, score::SemanticRetrieval{two_layers, {.heads_per_layer = 1}}, select::SharedTopK{},
             budget::ErrorAware{LayerErrors({1.0}, {}), Budget::tokens_per_layer(8)});
      },
      {"layer errors have 1 layers", "the model has 2"});
}

TEST(Errors, AllDeriveFromOne) {
  static_assert(std::is_base_of_v<std::runtime_error, Error>);
  static_assert(std::is_base_of_v<Error, ArgumentError> && std::is_base_of_v<Error, ScoreError> &&
                std::is_base_of_v<Error, FileError>);
  EXPECT_THROW(Budget::kept_ratio(2.0), Error);
}

}  // namespace
}  // namespace compresskv
