// KVzip: repeats of the context held against attention in double, and what stays against a sort of the
// scores.

#include <gtest/gtest.h>

#include <algorithm>
#include <compresskv/compresskv.hpp>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "reference/errors.hpp"
#include "reference/layer_case.hpp"
#include "reference/random.hpp"
#include "reference/repeated_model.hpp"

namespace compresskv {
namespace {

using reference::expect_error;
using reference::LayerCase;
using reference::no_scores;
using reference::positions_of;
using reference::Random;
using reference::repeat_all;
using reference::RepeatedModel;
using reference::RepeatScores64;
using reference::surely_above;

LayerCase small_case(Random& random) {
  LayerCase c;
  c.group = random.between(1, 3);
  c.kv_heads = random.between(1, 3);
  c.head_dim = random.pick(std::vector<std::size_t>{4, 16, 20});
  c.window = random.between(1, 30);
  c.seed = random.bits();
  c.arrangement = random.pick(reference::all_arrangements);
  return c;
}

TEST(KvZip, KeepsWhatRepeatsLookAtInTheWholeModel) {
  Random random(3);
  for (int i = 0; i < 60; ++i) {
    LayerCase c = small_case(random);
    const std::size_t context = random.between(12, 140);
    c.rows = context + c.window + random.below(4);
    const std::size_t layers = random.between(1, 4);
    const std::size_t sinks = random.pick(std::vector<std::size_t>{0, 1, 4});
    const std::size_t window = random.pick(std::vector<std::size_t>{1, 3});
    const std::size_t capacity = random.between(sinks + window, context);
    const std::size_t stretch = random.between(5, context + 3);
    SCOPED_TRACE(testing::Message() << c << " context " << context << " layers " << layers << " sinks "
                                    << sinks << " keeps " << capacity << " stretch " << stretch);
    RepeatedModel<> model(c, layers, context);
    const RepeatedModel<> original = model;
    const Plan plan{model.shape, score::KvZip{{.sinks = sinks, .window = window}}, select::WholeModel{},
                    budget::Uniform{Budget::tokens_per_layer(capacity)}};
    Compressor compressor{plan};
    compressor.begin(context);
    RepeatScores64 scores = no_scores(model);
    repeat_all(model, compressor, stretch, sinks, c.seed, scores);
    ASSERT_EQ(compressor.finish(model.views()).size(), layers);

    std::size_t kept = 0;
    double lowest = std::numeric_limits<double>::infinity();
    double highest = 0.0;
    for (std::size_t l = 0; l < layers; ++l) {
      for (std::size_t head = 0; head < c.kv_heads; ++head) {
        const auto& positions = compressor.retained(l).positions(head);
        std::vector<bool> stays(context, false);
        std::size_t row = 0;
        for (const std::uint32_t position : positions) {
          stays[position] = true;
          ++kept;
          ASSERT_EQ(model.layers[l].key(head, row, 0), original.layers[l].key(head, position, 0));
          ASSERT_EQ(model.layers[l].value(head, row, 3), original.layers[l].value(head, position, 3));
          ++row;
        }
        for (std::size_t p = 0; p < context; ++p) {
          if (p < sinks || p + window >= context) {
            ASSERT_TRUE(stays[p]) << "layer " << l << " head " << head << " position " << p;
          } else if (stays[p]) {
            lowest = std::min(lowest, scores[l][head][p]);
          } else {
            highest = std::max(highest, scores[l][head][p]);
          }
        }
      }
    }
    ASSERT_EQ(kept, capacity * layers * c.kv_heads) << "the budget, to the row";
    ASSERT_FALSE(surely_above(highest, lowest)) << highest << " went, " << lowest << " stayed";
  }
}

TEST(KvZip, ALayerMayHaveABudgetOfItsOwn) {
  Random random(4);
  for (int i = 0; i < 20; ++i) {
    LayerCase c = small_case(random);
    const std::size_t context = random.between(12, 100);
    c.rows = context + c.window;
    const std::size_t capacity = random.between(5, context);
    SCOPED_TRACE(testing::Message() << c << " context " << context << " keeps " << capacity);
    RepeatedModel<> model(c, 3, context);
    const Plan plan{model.shape, score::KvZip{}, select::GroupedTopK{},
                    budget::Uniform{Budget::tokens_per_layer(capacity)}};
    Compressor compressor{plan};
    compressor.begin(context);
    RepeatScores64 scores = no_scores(model);
    repeat_all(model, compressor, context, 4, c.seed, scores);
    compressor.finish(model.views());
    for (std::size_t l = 0; l < 3; ++l) {
      for (std::size_t head = 0; head < c.kv_heads; ++head) {
        const auto& positions = compressor.retained(l).positions(head);
        ASSERT_EQ(positions.size(), capacity);
        double lowest = std::numeric_limits<double>::infinity();
        double highest = 0.0;
        for (std::size_t p = 4; p + 1 < context; ++p) {
          double& side = compressor.retained(l).row(p, head) ? lowest : highest;
          side = compressor.retained(l).row(p, head) ? std::min(side, scores[l][head][p])
                                                     : std::max(side, scores[l][head][p]);
        }
        ASSERT_FALSE(surely_above(highest, lowest));
      }
    }
  }
}

TEST(KvZip, GoesOnFromUnequalRows) {
  Random random(5);
  for (int i = 0; i < 20; ++i) {
    LayerCase c = small_case(random);
    const std::size_t context = random.between(20, 80);
    const std::size_t more = random.between(1, 20);
    c.rows = context + std::max(more, c.window) + c.window;
    SCOPED_TRACE(testing::Message() << c << " context " << context << " more " << more);
    RepeatedModel<> model(c, 2, context);
    const Plan plan{model.shape, score::KvZip{}, select::WholeModel{},
                    budget::Uniform{Budget::tokens_per_layer(15)}};
    Compressor compressor{plan};
    compressor.begin(context);
    RepeatScores64 scores = no_scores(model);
    repeat_all(model, compressor, context, 4, c.seed, scores);
    compressor.finish(model.views());
    model.shrunk(compressor);

    // The next turn: some rows more in every head, of which all is repeated.
    compressor.begin_turn(context + more);
    for (auto& layer : model.rows) {
      for (std::size_t& rows : layer) {
        rows += more;
      }
    }
    const std::size_t fed = c.window;
    model.sizes.rows = context + fed;  // fed() follows
    scores = no_scores(model);
    const Stretch all{.first = 0, .last = context + more};
    model.feed(c.seed + 99);
    for (std::size_t l = 0; l < 2; ++l) {
      compressor.observe(l, model.view(l, fed), all, model.layers[l].observation());
    }
    reference::add_repeats(model, compressor, all, 4, scores);
    // Rows as they stand now, since positions are of rows that go.
    std::vector<std::vector<std::vector<std::size_t>>> positions(2);
    for (std::size_t l = 0; l < 2; ++l) {
      for (std::size_t head = 0; head < c.kv_heads; ++head) {
        positions[l].emplace_back();
        for (std::size_t row = 0; row < model.rows[l][head]; ++row) {
          positions[l][head].push_back(compressor.retained(l).position(row, head));
        }
      }
    }
    compressor.finish(model.views());
    std::size_t kept = 0;
    double lowest = std::numeric_limits<double>::infinity();
    double highest = 0.0;
    for (std::size_t l = 0; l < 2; ++l) {
      for (std::size_t head = 0; head < c.kv_heads; ++head) {
        kept += compressor.retained(l).rows(head);
        for (std::size_t row = 0; row < positions[l][head].size(); ++row) {
          const std::size_t position = positions[l][head][row];
          if (position < 4 || position + 1 == context + more) {
            ASSERT_TRUE(compressor.retained(l).row(position, head).has_value());
          } else if (compressor.retained(l).row(position, head)) {
            lowest = std::min(lowest, scores[l][head][row]);
          } else {
            highest = std::max(highest, scores[l][head][row]);
          }
        }
      }
    }
    std::size_t held = 0;
    for (const auto& layer : positions) {
      for (const auto& head : layer) {
        held += head.size();
      }
    }
    ASSERT_EQ(kept, std::min(15 * 2 * c.kv_heads, held));
    ASSERT_FALSE(surely_above(highest, lowest)) << highest << " went, " << lowest << " stayed";
  }
}

TEST(KvZip, PartsOfARepeatThreadsAndLayoutsChangeNoBit) {
  reference::expect_same_rows_however_shown([](const auto& model) {
    return Plan{model.shape, score::KvZip{}, select::WholeModel{},
                budget::Uniform{Budget::tokens_per_layer(30)}};
  });
}

TEST(KvZip, ProtectedTokensStay) {
  const LayerCase c{.group = 2, .kv_heads = 2, .head_dim = 16, .rows = 60 + 20, .window = 20, .seed = 9};
  RepeatedModel<> model(c, 3, 60);
  const Plan plan{model.shape, score::KvZip{}, select::WholeModel{},
                  budget::Uniform{Budget::tokens_per_layer(20)}};
  Compressor compressor{plan};
  const std::vector<std::uint32_t> named{17, 33, 34};
  compressor.begin(60, {.positions = named});
  RepeatScores64 scores = no_scores(model);
  repeat_all(model, compressor, 60, 4, 5, scores);
  compressor.finish(model.views());
  std::size_t rows = 0;
  for (std::size_t l = 0; l < 3; ++l) {
    for (std::size_t head = 0; head < 2; ++head) {
      rows += compressor.retained(l).rows(head);
      for (const std::uint32_t position : named) {
        EXPECT_TRUE(compressor.retained(l).row(position, head).has_value());
      }
    }
  }
  EXPECT_EQ(rows, 20U * 3 * 2);
}

TEST(KvZip, WhatIsMissingOrWrongIsNamedAndNothingChanges) {
  const LayerCase c{.group = 2, .kv_heads = 2, .head_dim = 16, .rows = 60 + 20, .window = 20, .seed = 9};
  RepeatedModel<> model(c, 2, 60);
  const Plan plan{model.shape, score::KvZip{}, select::WholeModel{},
                  budget::Uniform{Budget::tokens_per_layer(20)}};
  Compressor compressor{plan};
  const auto observe = [&](std::size_t l, std::size_t fed, const Stretch& stretch) {
    compressor.observe(l, model.view(l, fed), stretch, model.layers[l].observation());
  };
  expect_error<ArgumentError>([&] { observe(0, 20, {0, 60}); }, {"begin() was not called"});
  compressor.begin(60);
  expect_error<ArgumentError>(
      [&] {
        compressor.observe(2, model.view(0, 20), {0, 60}, model.layers[0].observation());
      },
      {"layer is 2", "layers 0 to 1"});
  expect_error<ArgumentError>([&] { observe(0, 20, {0, 61}); }, {"stretch is 0 to 61", "the 60 announced"});
  expect_error<ArgumentError>([&] { observe(0, 20, {5, 5}); }, {"stretch is 5 to 5"});
  expect_error<ArgumentError>(
      [&] {
        observe(0, 20, {30, 60});
      },
      {"stretch of layer 0 begins at token 30", "tokens from 0 on"});
  expect_error<ArgumentError>(
      [&] {
        observe(0, 19, {0, 60});
      },
      {"layer 0 KV head 0 has 79 rows", "at least 80", "the 60 of the context"});
  model.rows[0][1] += 1;
  expect_error<ArgumentError>([&] { observe(0, 19, {0, 60}); }, {"layer 0 KV head 0 has 79 rows"});
  expect_error<ArgumentError>(
      [&] {
        model.rows[0][1] = 59;
        model.rows[0][0] = 60;
        compressor.observe(0, model.view(0, 20), {0, 60},
                           QueryWindow<float>{model.layers[0].queries.data(),
                                              QueryShape{.query_heads = 4, .queries = 10, .head_dim = 16}});
      },
      {"layer 0 KV head 1 has 19 rows behind the context, KV head 0 has 20"});
  model.rows[0][1] = 60;
  expect_error<ArgumentError>(
      [&] {
        compressor.observe(
            0, model.view(0, 20), {0, 60},
            QueryWindow<float>{
                model.layers[0].queries.data(),
                QueryShape{.query_heads = 4, .queries = 20, .head_dim = 16, .sliding_window = 30}});
      },
      {"layer 0 has a sliding window of 30", "by another plan"});

  // Queries that hold a NaN leave the scores as they were.
  observe(0, 20, {0, 60});
  std::vector<float> queries = model.layers[1].queries;
  model.layers[1].queries.back() = std::numeric_limits<float>::quiet_NaN();
  expect_error<ScoreError>([&] { observe(1, 20, {0, 60}); }, {"score of layer 1 query head 3"});
  const auto before = model.layers[0].cache;
  expect_error<ArgumentError>([&] { compressor.finish(model.views()); },
                              {"layer 1 was shown repeats of 0 tokens, the sequence has 60"});
  EXPECT_EQ(model.layers[0].cache, before);
  model.layers[1].queries = queries;
  observe(1, 20, {0, 60});
  expect_error<ArgumentError>(
      [&] {
        compressor.compact(0, model.views()(0), Selection::shared_by_heads(std::vector<std::uint32_t>{1}));
      },
      {"layer 0 is being repeated", "finish() cuts it"});
  RepeatedModel<> other(c, 2, 60);
  Compressor undisturbed{plan};
  undisturbed.begin(60);
  for (std::size_t l = 0; l < 2; ++l) {
    undisturbed.observe(l, other.view(l, 20), {0, 60}, other.layers[l].observation());
  }
  compressor.finish(model.views());
  undisturbed.finish(other.views());
  EXPECT_EQ(positions_of(compressor, model), positions_of(undisturbed, other));
  expect_error<ArgumentError>([&] { observe(0, 20, {0, 60}); }, {"begin_turn() starts the next turn"});

  const std::vector<std::uint32_t> named{17, 33, 34, 35, 36, 37, 38};
  const Plan narrow{model.shape, score::KvZip{}, select::WholeModel{},
                    budget::Uniform{Budget::tokens_per_layer(7)}};
  Compressor full{narrow};
  RepeatedModel<> third(c, 2, 60);
  full.begin(60, {.positions = named});
  for (std::size_t l = 0; l < 2; ++l) {
    full.observe(l, third.view(l, 20), {0, 60}, third.layers[l].observation());
  }
  const auto whole = third.layers[1].cache;
  expect_error<ArgumentError>([&] { full.finish(third.views()); },
                              {"the model may keep 28 rows", "protected tokens are 32", "raise the budget"});
  EXPECT_EQ(third.layers[1].cache, whole);
  expect_error<ArgumentError>([&] { score::KvZip{{.window = 0}}; }, {"window is 0"});
}

TEST(KvZip, HoldsLittle) {
  // Rows of 256 bytes: two bytes a score are 0.78 %.
  const LayerCase c{.group = 3, .kv_heads = 3, .head_dim = 64, .rows = 4096 + 16, .window = 16, .seed = 2};
  RepeatedModel<bfloat16> model(c, 2, 4096);
  ModelShape shape = model.shape;
  shape.layers = 30;
  const Plan plan{shape, score::KvZip{}, select::WholeModel{}, budget::Uniform{Budget::kept_ratio(0.5)}};
  Compressor compressor{plan};
  compressor.begin(4096);
  for (std::size_t l = 0; l < 30; ++l) {
    for (std::size_t first = 0; first < 4096; first += 2048) {
      compressor.observe(l, model.view(l % 2, 16), {.first = first, .last = first + 2048},
                         model.layers[l % 2].observation());
    }
  }
  const double cache = 30.0 * 3 * 4096 * 256;
  EXPECT_LT(static_cast<double>(compressor.memory_bytes()), 0.01 * cache);
}

}  // namespace
}  // namespace compresskv
