// Tokens are announced: what begin() and begin_turn() told bounds what a view may hold, whichever call shows
// it; and what a sequence holds between two compressions is what held() and truncate() say.

#include <gtest/gtest.h>

#include <algorithm>
#include <compresskv/compresskv.hpp>
#include <cstdint>
#include <numeric>
#include <string>
#include <vector>

#include "reference/allocations.hpp"
#include "reference/errors.hpp"
#include "reference/random.hpp"

namespace compresskv {
namespace {

using reference::expect_error;
using reference::Random;
using Rows = std::vector<std::uint32_t>;

constexpr std::size_t layers = 3;
constexpr std::size_t room = 400;
constexpr std::size_t window = 4;
constexpr ModelShape shape{.layers = layers, .query_heads = 4, .kv_heads = 2, .head_dim = 8};

/// The caches of all layers; the first element of a value row is the position of its token.
struct Engine {
  std::vector<std::vector<float>> keys;
  std::vector<std::vector<float>> values;
  std::vector<float> queries;
  std::vector<std::vector<std::size_t>> rows =
      std::vector<std::vector<std::size_t>>(layers, std::vector<std::size_t>(2, 0));
  std::size_t next = 0;
  Random random;

  explicit Engine(std::uint64_t seed) : random(seed) {
    keys.assign(layers, std::vector<float>(2 * room * 8));
    values = keys;
    for (auto& layer : keys) {
      for (float& x : layer) {
        x = random.gaussian();
      }
    }
    queries.resize(4 * room * 8);
    for (float& x : queries) {
      x = random.gaussian();
    }
  }

  void append(std::size_t count) {
    for (std::size_t i = 0; i < count; ++i, ++next) {
      for (std::size_t layer = 0; layer < layers; ++layer) {
        for (std::size_t head = 0; head < 2; ++head) {
          values[layer][(head * room + rows[layer][head]++) * 8] = static_cast<float>(next);
        }
      }
    }
  }

  /// A view of the rows that are there and `more`, which may be stale.
  StridedKv<float> view(std::size_t layer, std::size_t more = 0) {
    lengths[layer] = rows[layer];
    for (std::size_t& length : lengths[layer]) {
      length += more;
    }
    return {std::span(keys[layer]),
            std::span(values[layer]),
            {.kv_heads = 2, .head_dim = 8, .allocated_rows = room, .head_rows = lengths[layer]},
            layout::head_token_dim};
  }
  QueryWindow<float> observation() const {
    return {
        queries.data(), {.query_heads = 4, .queries = next, .head_dim = 8}, {.head = room * 8, .query = 8}};
  }

  std::size_t position(std::size_t layer, std::size_t head, std::size_t row) const {
    return static_cast<std::size_t>(values[layer][(head * room + row) * 8]);
  }

  std::vector<std::vector<std::size_t>> lengths = rows;  // what the views show
};

auto per_head_plan() {
  return Plan{shape, score::SnapKv{{.window = window}}, select::Adaptive{},
              budget::Uniform{Budget::tokens_per_layer(30)}};
}
auto carried_plan() {
  return Plan{shape,
              score::Carried{HeadScores(layers, 4, std::vector<std::vector<double>>(layers * 4, {1.0})),
                             {.window = window}},
              select::SharedTopK{}, budget::Uniform{Budget::tokens_per_layer(30)}};
}
auto whole_plan() {
  return Plan{shape,
              score::ModelWide{HeadScores(layers, 4, std::vector<std::vector<double>>(layers * 4, {1.0})),
                               {.heads = 4, .window = window}},
              select::SharedTopK{}, budget::Uniform{Budget::tokens_per_layer(30)}};
}
auto cake_plan() {
  return Plan{shape, score::Cake{{.window = window}}, select::GroupedTopK{},
              budget::Cake{Budget::tokens_per_layer(30)}};
}

template <class C>
void shorten(Engine& engine, const C& compressor, std::size_t layer) {
  for (std::size_t head = 0; head < 2; ++head) {
    engine.rows[layer][head] = compressor.retained(layer).rows(head);
  }
}

/// `layer` arrives, and the caches that shrank are shortened.
template <class C>
void arrive(Engine& engine, C& compressor, std::size_t layer) {
  const auto views = [&](std::size_t l) { return engine.view(l); };
  for (const std::size_t changed : compressor.arrive(layer, views, engine.observation())) {
    shorten(engine, compressor, changed);
  }
}

/// `call` must say which layer, both numbers and what to do, and change nothing.
template <class C, class Call>
void expect_too_many(Engine& engine, C& compressor, std::size_t layer, std::size_t shown, std::size_t most,
                     Call&& call) {
  const auto keys = engine.keys;
  const auto values = engine.values;
  std::vector<Rows> positions;
  for (std::size_t l = 0; l < layers; ++l) {
    const auto& kept = compressor.retained(l).positions(0);
    positions.emplace_back(kept.begin(), kept.end());
  }
  expect_error<ArgumentError>(
      call, {"layer " + std::to_string(layer) + " KV head ", " has " + std::to_string(shown) + " rows",
             "at most " + std::to_string(most), "shorten the cache", "begin_turn()"});
  EXPECT_EQ(engine.keys, keys);
  EXPECT_EQ(engine.values, values);
  for (std::size_t l = 0; l < layers; ++l) {
    const auto& kept = compressor.retained(l).positions(0);
    EXPECT_EQ(Rows(kept.begin(), kept.end()), positions[l]);
  }
}

TEST(Announced, NoCallTakesMoreRowsThanTheTokensOfThePrompt) {
  Engine engine(1);
  engine.append(60);
  const auto plan = per_head_plan();
  Compressor compressor{plan};
  compressor.begin(60);
  const auto observation = engine.observation();
  const std::vector<float> weights(4 * window * 61, 0.1F);
  const AttentionMatrix<float> attention(weights.data(), {.query_heads = 4, .queries = window, .tokens = 61});
  const Selection selection = Selection::shared_by_heads(Rows{1, 50, 60});
  const auto refused = [&](auto call) { expect_too_many(engine, compressor, 1, 61, 60, call); };
  refused([&] { compressor.compress(1, engine.view(1, 1), observation); });
  refused([&] { compressor.score(1, engine.view(1, 1), observation); });
  refused([&] { compressor.score(1, attention); });
  refused([&] { compressor.select(1, attention); });
  refused([&] { compressor.compact(1, engine.view(1, 1), selection); });
  refused([&] { compressor.gather(1, engine.view(1, 1), selection, engine.view(1)); });
  refused([&] { compressor.rerotate(1, engine.view(1, 1), {}); });
  std::vector<float> values(2 * 57);
  const std::vector<std::size_t> ends{57, 114};
  const std::vector<std::size_t> windows{window, window};
  refused([&] { compressor.select(1, Scores<Granularity::kv_head>(values, ends, windows)); });
}

TEST(Announced, ACacheThatWasNotShortenedIsRefusedAndTheSequenceGoesOn) {
  for (std::uint64_t seed = 0; seed < 10; ++seed) {
    Engine engine(seed);
    const auto plan = per_head_plan();
    Compressor compressor{plan};
    engine.append(engine.random.between(40, 200));
    compressor.begin(engine.next);
    for (int turn = 0; turn < 4; ++turn) {
      for (std::size_t layer = 0; layer < layers; ++layer) {
        const std::size_t stale = engine.rows[layer][0];
        compressor.compress(layer, engine.view(layer), engine.observation());
        const std::size_t kept = compressor.retained(layer).rows(0);
        if (engine.rows[layer] != std::vector<std::size_t>{kept, compressor.retained(layer).rows(1)}) {
          expect_error<ArgumentError>(
              [&] { compressor.compress(layer, engine.view(layer), engine.observation()); },
              {"layer " + std::to_string(layer) + " KV head"});
        }
        ASSERT_LE(kept, stale);
        shorten(engine, compressor, layer);
        compressor.compress(layer, engine.view(layer), engine.observation());  // twice, shortened: the same
        ASSERT_EQ(compressor.retained(layer).rows(0), kept);
        ASSERT_EQ(compressor.retained(layer).next_position(), engine.next);
      }
      engine.append(engine.random.between(1, 20));
      expect_too_many(engine, compressor, 0, engine.rows[0][0], compressor.retained(0).rows(0),
                      [&] { compressor.compress(0, engine.view(0), engine.observation()); });
      compressor.begin_turn(engine.next);
    }
  }
}

TEST(Announced, LayersThatArriveHoldWhatWasAnnouncedAndNothingElse) {
  const auto check = [](const auto& plan) {
    for (const std::size_t layer : {0U, 2U}) {
      Engine engine(3);
      engine.append(64);
      Compressor compressor{plan};
      compressor.begin(64);
      std::size_t more = 0;
      const auto arrive = [&](std::size_t l) {
        for (const std::size_t changed : compressor.arrive(
                 l, [&](std::size_t i) { return engine.view(i, i == l ? more : 0); }, engine.observation())) {
          shorten(engine, compressor, changed);
        }
      };
      for (std::size_t l = 0; l < layer; ++l) {
        arrive(l);
      }
      more = 16;
      expect_too_many(engine, compressor, layer, 80, 64, [&] { arrive(layer); });
      more = 0;
      for (std::size_t l = layer; l < layers; ++l) {
        arrive(l);
      }
      if constexpr (std::remove_cvref_t<decltype(plan)>::reach == Reach::all_layers) {
        expect_too_many(engine, compressor, 1, 65, 64, [&] {
          compressor.finish([&](std::size_t l) { return engine.view(l, l == 1 ? 1 : 0); });
        });
        compressor.finish([&](std::size_t l) { return engine.view(l); });
      }
      EXPECT_LT(compressor.retained(layer).rows(0), 64U);
    }
  };
  check(carried_plan());
  check(whole_plan());
  check(cake_plan());
}

/// Scores are those of the rows that arrived: tokens that came later would take the place of others.
TEST(Announced, ALayerArrivesWithAllTokensOfItsTurn) {
  const auto plan = cake_plan();
  Engine engine(5);
  engine.append(64);
  Compressor compressor{plan};
  compressor.begin(64);
  const auto arrive = [&](std::size_t l) {
    for (const std::size_t changed : compressor.arrive(
             l, [&](std::size_t i) { return engine.view(i); }, engine.observation())) {
      shorten(engine, compressor, changed);
    }
  };
  for (std::size_t l = 0; l < layers; ++l) {
    arrive(l);
  }
  engine.append(14);
  compressor.begin_turn(84);
  expect_error<ArgumentError>([&] { arrive(0); }, {"layer 0 KV head 0 has", "view all of them"});
  engine.append(6);
  for (std::size_t l = 0; l < layers; ++l) {
    arrive(l);
  }
  for (std::uint32_t position = 84 - window; position < 84; ++position) {
    EXPECT_TRUE(compressor.retained(0).row(position, 0).has_value()) << position;
  }
}

/// An engine that evicts on its device and shows attention alone: its cache is shorter than all tokens.
TEST(Announced, AttentionAloneMayBeOfACacheThatHasEvictedRows) {
  const auto plan = per_head_plan();
  Compressor compressor{plan};
  compressor.begin(60);
  const std::vector<float> weights(4 * window * 60, 0.01F);
  const AttentionMatrix<float> first(weights.data(), {.query_heads = 4, .queries = window, .tokens = 60});
  EXPECT_EQ(compressor.select(0, first).lists(), 2U);
  compressor.begin_turn(70);
  const AttentionMatrix<float> second(weights.data(), {.query_heads = 4, .queries = window, .tokens = 40});
  EXPECT_LT(compressor.select(0, second).rows(0).back(), 40U);
}

TEST(Announced, ListsOfProtectedTokensAllocateNothingFromTheSecondSequenceOn) {
  const auto plan = per_head_plan();
  Compressor compressor{plan};
  const Rows listed{3, 7, 9};
  compressor.begin(60, {.positions = listed});
  const std::size_t before = reference::allocations;
  compressor.begin(60, {.positions = listed});
  compressor.begin_turn(70, {.positions = listed});
  EXPECT_EQ(reference::allocations - before, 0U);
}

TEST(Announced, ATurnArrivesOnce) {
  const auto plan = whole_plan();
  Engine engine(4);
  engine.append(64);
  Compressor compressor{plan};
  compressor.begin(64);
  const auto views = [&](std::size_t l) { return engine.view(l); };
  for (std::size_t l = 0; l < layers; ++l) {
    compressor.arrive(l, views, engine.observation());
  }
  compressor.finish(views);
  for (std::size_t l = 0; l < layers; ++l) {
    shorten(engine, compressor, l);
  }
  // Scores of another round would be added to those that are there.
  expect_error<ArgumentError>([&] { compressor.arrive(0, views, engine.observation()); },
                              {"all arrived", "begin_turn()"});
  expect_error<ArgumentError>([&] { compressor.finish(views); }, {"all arrived", "begin_turn()"});
}

TEST(Announced, PositionsThatDoNotFitInto32BitsAreRefused) {
  const auto plan = per_head_plan();
  Compressor compressor{plan};
  const std::size_t above = std::size_t{1} << 32U;
  expect_error<ArgumentError>([&] { compressor.begin(above); },
                              {"prompt_tokens is 4294967296", "the most is 4294967295"});
  compressor.begin(64);
  expect_error<ArgumentError>([&] { compressor.begin_turn(above); },
                              {"total_tokens is 4294967296", "the most is 4294967295"});
  EXPECT_EQ(compressor.retained(0).rows(), 64U);
}

// ---- what a sequence holds between two compressions ----

/// docs/engines.md, Turns: compress, decode, draft, reject; the cache is shortened to what truncate() says.
TEST(Held, TheRecipeOfSpeculationLosesNoAcceptedToken) {
  for (std::uint64_t seed = 0; seed < 30; ++seed) {
    Engine engine(seed);
    const auto plan = per_head_plan();
    Compressor compressor{plan};
    engine.append(engine.random.between(20, 150));
    compressor.begin(engine.next);
    for (std::size_t layer = 0; layer < layers; ++layer) {
      compressor.compress(layer, engine.view(layer), engine.observation());
      shorten(engine, compressor, layer);
    }
    for (int step = 0; step < 6; ++step) {
      const std::size_t accepted = engine.random.below(8);
      const std::size_t drafted = engine.random.between(1, 5);
      const std::size_t rejected = engine.random.between(0, drafted);
      engine.append(accepted + drafted);
      const std::size_t left = engine.next - rejected;
      auto expected = engine.rows;
      for (auto& layer : expected) {
        for (std::size_t& rows : layer) {
          rows -= rejected;
        }
      }
      const Held now = compressor.truncate(left);
      for (std::size_t layer = 0; layer < layers; ++layer) {
        for (std::size_t head = 0; head < 2; ++head) {
          ASSERT_EQ(now.rows(layer, head), expected[layer][head]);
          ASSERT_EQ(compressor.held(left).rows(layer, head), expected[layer][head]);
          engine.rows[layer][head] = now.rows(layer, head);
          // Each row is the token that the compressor says, up to the last.
          for (std::size_t row = 0; row < engine.rows[layer][head]; ++row) {
            ASSERT_EQ(compressor.retained(layer).position(row, head), engine.position(layer, head, row));
          }
        }
      }
      engine.next = now.next_position();
      ASSERT_EQ(engine.next, left);
    }
    compressor.begin_turn(engine.next);
    for (std::size_t layer = 0; layer < layers; ++layer) {
      compressor.compress(layer, engine.view(layer), engine.observation());
      EXPECT_EQ(compressor.retained(layer).next_position(), engine.next);
    }
  }
}

TEST(Held, RowsOfALayerWhereHeadsDifferAreAskedByHead) {
  const auto plan = per_head_plan();
  Engine engine(2);
  engine.append(60);
  Compressor compressor{plan};
  expect_error<ArgumentError>([&] { static_cast<void>(compressor.held(5)); }, {"begin() was not called"});
  compressor.begin(60);
  EXPECT_EQ(compressor.held(60).rows(1), 60U);
  EXPECT_EQ(compressor.held(75).rows(1), 75U);
  compressor.compact(1, engine.view(1), Selection::per_head(std::vector<Rows>{{3, 9, 59}, {59}}));
  EXPECT_EQ(compressor.held(70).rows(1, 0), 13U);
  EXPECT_EQ(compressor.held(70).rows(1, 1), 11U);
  EXPECT_EQ(compressor.held(9).rows(1, 0), 1U);
  EXPECT_EQ(compressor.held(9).rows(1, 1), 0U);
  expect_error<ArgumentError>([&] { static_cast<void>(compressor.held(70).rows(1)); },
                              {"KV head 1 of layer 1 holds 11 rows, KV head 0 13", "rows(layer, kv_head)"});
  expect_error<ArgumentError>([&] { static_cast<void>(compressor.held(70).rows(3)); },
                              {"layer is 3", "layers 0 to 2"});
  expect_error<ArgumentError>([&] { static_cast<void>(compressor.held(70).rows(1, 2)); },
                              {"kv_head is 2", "KV heads 0 to 1"});
}

TEST(Held, ALayerTurnedToItsRowsStillKnowsWhatMayCome) {
  const auto plan = per_head_plan();
  Engine engine(6);
  engine.append(60);
  Compressor compressor{plan};
  compressor.begin(60);
  compressor.compact(0, engine.view(0), Selection::shared_by_heads(Rows{3, 9, 59}));
  shorten(engine, compressor, 0);
  const Retained& kept = compressor.rerotate(0, engine.view(0), {});
  EXPECT_EQ(kept.next_position(), 3U);
  expect_too_many(engine, compressor, 0, 60, 3,
                  [&] { compressor.compress(0, engine.view(0, 57), engine.observation()); });
}

TEST(Turned, LayersOfEqualRowsGoOnInTurnsFromTheirRowCount) {
  const Plan plan{shape, score::SnapKv{{.window = window}}, select::GroupedTopK{},
                  budget::Uniform{Budget::tokens_per_layer(30)}};
  Engine engine(7);
  engine.append(60);
  Compressor compressor{plan};
  compressor.begin(60);
  for (std::size_t layer = 0; layer < layers; ++layer) {
    compressor.compress(layer, engine.view(layer), engine.observation());
    shorten(engine, compressor, layer);
    compressor.rerotate(layer, engine.view(layer), {});
  }
  EXPECT_EQ(compressor.held(33).rows(2), 33U);
  engine.append(20);
  EXPECT_EQ(compressor.truncate(45).rows(1), 45U);
  for (auto& layer : engine.rows) {
    std::fill(layer.begin(), layer.end(), 45U);
  }
  compressor.begin_turn(45, {.keep_first = 2});
  for (std::size_t layer = 0; layer < layers; ++layer) {
    const Retained& kept = compressor.compress(layer, engine.view(layer), engine.observation());
    EXPECT_EQ(kept.rows(), 30U);
    EXPECT_EQ(kept.position(1), 1U) << "protected: the first rows, whatever tokens they are";
    EXPECT_EQ(kept.next_position(), 45U);
  }
}

TEST(Turned, LayersOfUnequalRowsRefuseWhatNeedsOnePositionForAll) {
  const auto plan = cake_plan();
  Engine engine(8);
  engine.append(60);
  Compressor compressor{plan};
  compressor.begin(60);
  for (std::size_t layer = 0; layer < layers; ++layer) {
    arrive(engine, compressor, layer);
  }
  ASSERT_NE(engine.rows[0][0], engine.rows[2][0]) << "or the case shows nothing";
  for (std::size_t layer = 0; layer < layers; ++layer) {
    compressor.rerotate(layer, engine.view(layer), {});
  }
  const std::string position = std::to_string(engine.rows[0][0]);
  expect_error<ArgumentError>([&] { compressor.begin_turn(70); },
                              {"begin_turn() finds that layer ", "layer 0 at " + position, "uniform budget"});
  expect_error<ArgumentError>([&] { compressor.truncate(10); },
                              {"truncate() finds that layer ", "layer 0 at " + position});
  expect_error<ArgumentError>([&] { static_cast<void>(compressor.held(70)); },
                              {"held() finds that layer ", "layer 0 at " + position});
  compressor.begin(60);
  EXPECT_EQ(compressor.held(61).rows(0), 61U) << "a new sequence is as any other";
}

TEST(Turned, ScoresThatTravelNeedTruePositions) {
  const auto plan = carried_plan();
  Engine engine(9);
  engine.append(60);
  Compressor compressor{plan};
  compressor.begin(60);
  for (std::size_t layer = 0; layer < layers; ++layer) {
    arrive(engine, compressor, layer);
  }
  for (std::size_t layer = 0; layer < layers; ++layer) {
    compressor.rerotate(layer, engine.view(layer), {});
  }
  expect_error<ArgumentError>([&] { compressor.begin_turn(40); },
                              {"carried from layer to layer by true positions", "rerotate()", "begin()"});
  compressor.begin(60);
  compressor.begin_turn(61);
}

TEST(Turned, ALayerThatACascadeCutsAgainIsChosenByTheScoresThatItArrivedWith) {
  const auto plan = cake_plan();
  const Rows listed{20, 21, 22, 23};
  const auto run = [&](bool turns) {
    Engine engine(12);
    engine.append(60);
    Compressor compressor{plan};
    compressor.begin(60, {.positions = listed});
    for (std::size_t layer = 0; layer < layers; ++layer) {
      arrive(engine, compressor, layer);
      if (turns && layer == 1) {
        EXPECT_LT(engine.rows[0][0], 60U) << "or row and position are the same";
        compressor.rerotate(0, engine.view(0), {});
      }
    }
    std::vector<std::vector<std::size_t>> kept(2);
    for (std::size_t head = 0; head < 2; ++head) {
      for (std::size_t row = 0; row < engine.rows[0][head]; ++row) {
        kept[head].push_back(engine.position(0, head, row));
      }
    }
    return kept;
  };
  EXPECT_EQ(run(true), run(false));
}

}  // namespace
}  // namespace compresskv
