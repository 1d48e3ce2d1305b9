#include <gtest/gtest.h>

#include <algorithm>
#include <compresskv/score/lag_kv.hpp>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "reference/errors.hpp"
#include "reference/executors.hpp"
#include "reference/methods.hpp"

namespace compresskv {
namespace {

using reference::expect_error;
using reference::Layer;
using reference::LayerCase;
using score::LagKv;
using LagRows = std::vector<std::uint32_t>;

/// The scores of a layer, by KV head.
template <class X = SerialExecutor>
std::vector<std::vector<float>> lag_scores(const LagKv::Options& options, Layer<float>& layer,
                                           X executor = {}) {
  const Plan plan{layer.shape, LagKv{options}, select::GroupedTopK{},
                  budget::Uniform{Budget::tokens_per_layer(options.window)}};
  Compressor compressor{plan, executor};
  compressor.begin(layer.sizes.rows);
  const auto scores = compressor.score(0, layer.cache.view());
  std::vector<std::vector<float>> rows;
  for (std::size_t head = 0; head < scores.rows(); ++head) {
    rows.emplace_back(scores.row(head).begin(), scores.row(head).end());
  }
  return rows;
}

/// The rows of each KV head that stay of a layer.
std::vector<LagRows> lag_kept(const LagKv::Options& options, Layer<float>& layer, std::size_t capacity,
                              const Protection& protection = {}) {
  const Plan plan{layer.shape, LagKv{options}, select::GroupedTopK{},
                  budget::Uniform{Budget::tokens_per_layer(capacity)}};
  Compressor compressor{plan};
  compressor.begin(layer.sizes.rows, protection);
  const Selection& selection = compressor.select(0, compressor.score(0, layer.cache.view()));
  std::vector<LagRows> rows;
  for (std::size_t head = 0; head < layer.shape.kv_heads; ++head) {
    rows.emplace_back(selection.rows(head).begin(), selection.rows(head).end());
  }
  return rows;
}

std::vector<LayerCase> lag_cases(std::uint64_t seed) {
  std::vector<LayerCase> cases = reference::layer_cases(20, seed);
  std::erase_if(cases,
                [](const LayerCase& c) { return c.kv_heads > 4 && c.rows > 120; });  // the slow reference
  // Exactly two stretches of 16 behind 4 sinks; one row less; a window that reaches into one, or over all.
  for (const std::size_t rows : {35U, 36U, 37U, 51U, 52U, 53U}) {
    for (const std::size_t window : {1U, 15U, 16U, 17U, 33U, 48U}) {
      cases.push_back({.kv_heads = 2, .head_dim = 8, .rows = rows, .window = window, .capacity = window});
    }
  }
  return cases;
}

TEST(LagKv, IsTheReferenceOverGeneratedLayers) {
  std::size_t compared = 0;
  for (const LayerCase& c : lag_cases(81)) {
    for (const auto& [sinks, lag] :
         std::vector<std::pair<std::size_t, std::size_t>>{{4, 16}, {0, 5}, {3, 40}, {100, 16}, {4, 128}}) {
      SCOPED_TRACE(testing::Message() << c << " sinks " << sinks << " lag " << lag);
      Layer<float> layer(c);
      const auto expected = reference::lag_kv(layer, sinks, lag);
      // A deviation is rounded to float32 before its power is taken: relative to its size.
      reference::expect_scores(LagKv{{.sinks = sinks, .lag = lag, .ranked = false, .window = c.window}},
                               layer, expected, 1e-5, 0.0);
      compared += static_cast<std::size_t>(
          std::count_if(expected[0].begin(), expected[0].end(), [](double score) { return score < 1.0; }));
    }
  }
  EXPECT_GT(compared, 10000U) << "stretches, not only tails";
}

TEST(LagKv, RanksWithinEachStretch) {
  for (const LayerCase& c : lag_cases(82)) {
    for (const auto& [sinks, lag] :
         std::vector<std::pair<std::size_t, std::size_t>>{{4, 16}, {0, 2}, {3, 41}}) {
      SCOPED_TRACE(testing::Message() << c << " sinks " << sinks << " lag " << lag);
      Layer<float> layer(c);
      const auto raw = lag_scores({.sinks = sinks, .lag = lag, .ranked = false, .window = c.window}, layer);
      const auto ranked = lag_scores({.sinks = sinks, .lag = lag, .window = c.window}, layer);
      for (std::size_t head = 0; head < raw.size(); ++head) {
        ASSERT_EQ(raw[head].size(), ranked[head].size());
        for (std::size_t t = 0; t < raw[head].size(); ++t) {
          if (raw[head][t] >= 2.0F) {
            ASSERT_EQ(ranked[head][t], raw[head][t]) << "sinks and tail";
            continue;
          }
          const std::size_t first = t - (t - sinks) % lag;
          std::size_t below = 0;
          for (std::size_t other = first; other < first + lag; ++other) {
            below +=
                raw[head][other] < raw[head][t] || (raw[head][other] == raw[head][t] && other > t) ? 1U : 0U;
          }
          ASSERT_EQ(ranked[head][t], static_cast<float>(below) / static_cast<float>(lag)) << "token " << t;
        }
      }
    }
  }
}

TEST(LagKv, KeepsSinksThenTheTailThenEquallyManyOfEachStretch) {
  // 4 sinks, five stretches of 16, of which the last and 6 rows more are the tail: 22 rows.
  Layer<float> layer({.kv_heads = 2, .head_dim = 8, .rows = 90, .window = 8, .capacity = 8});
  const LagKv::Options options{.lag = 16};
  for (std::size_t capacity = 8; capacity <= 90; ++capacity) {
    SCOPED_TRACE(capacity);
    for (const LagRows& kept : lag_kept(options, layer, capacity)) {
      ASSERT_EQ(kept.size(), capacity);
      const auto in = [&](std::uint32_t first, std::uint32_t last) {
        return static_cast<std::size_t>(std::count_if(
            kept.begin(), kept.end(), [&](std::uint32_t row) { return row >= first && row < last; }));
      };
      const std::size_t sinks = std::min<std::size_t>(capacity - 8, 4);
      EXPECT_EQ(in(0, 4), sinks);
      const std::size_t recent = std::min<std::size_t>(capacity - sinks, 22);
      EXPECT_EQ(in(static_cast<std::uint32_t>(90 - recent), 90), recent) << "the most recent of the tail";
      const std::size_t rest = capacity - sinks - recent;
      for (std::uint32_t stretch = 0; stretch < 4; ++stretch) {
        EXPECT_EQ(in(4 + 16 * stretch, 20 + 16 * stretch), rest / 4 + (stretch < rest % 4 ? 1 : 0))
            << stretch;
      }
    }
  }
}

TEST(LagKv, OfAShortPromptKeepsSinksAndWhatIsRecent) {
  for (const std::size_t rows : {9U, 100U, 259U}) {  // one stretch of 128 has no other to be compared with
    Layer<float> layer({.kv_heads = 1, .rows = rows, .window = 3, .capacity = 3});
    layer.cache.values[0] = std::numeric_limits<float>::quiet_NaN();  // nothing is read
    const std::size_t capacity = std::min<std::size_t>(rows - 1, 20);
    LagRows expected{0, 1, 2, 3};
    for (std::size_t i = rows + 4 - capacity; i < rows; ++i) {
      expected.push_back(static_cast<std::uint32_t>(i));
    }
    EXPECT_EQ(lag_kept({.window = 3}, layer, capacity)[0], expected);
  }
}

TEST(LagKv, ProtectedTokensStayBesideTheBestOfTheRest) {
  Layer<float> layer({.kv_heads = 1, .rows = 90, .window = 8, .capacity = 8});
  const std::vector<std::uint32_t> listed{30, 31, 55};
  const auto kept = lag_kept({.lag = 16}, layer, 40, {.positions = listed})[0];
  EXPECT_EQ(kept.size(), 40U);
  for (const std::uint32_t position : listed) {
    EXPECT_TRUE(std::binary_search(kept.begin(), kept.end(), position)) << position;
  }
}

/// Stretches count rows, sinks count positions: a cache that lost rows scores as one that never had them.
TEST(LagKv, AfterAnEvictionStretchesAreOfTheRowsThatAreLeft) {
  reference::Random random(83);
  Layer<float> whole({.kv_heads = 2, .head_dim = 8, .rows = 200, .window = 4, .capacity = 40});
  for (const bool cut_sinks : {false, true}) {
    std::vector<LagRows> rows(2);
    for (std::uint32_t row = 0; row < 200; ++row) {
      for (LagRows& own : rows) {
        if ((row < 4 && (!cut_sinks || row > 1)) || (row >= 4 && random.below(3) > 0)) {
          own.push_back(row);
        }
      }
    }
    Layer<float> layer = whole;
    const Plan plan{layer.shape, LagKv{{.lag = 16, .ranked = false, .window = 4}}, select::GroupedTopK{},
                    budget::Uniform{Budget::tokens_per_layer(40)}};
    Compressor compressor{plan};
    compressor.begin(200);
    compressor.compact(0, layer.cache.view(), Selection::per_head(rows));
    layer.cache.set_rows({rows[0].size(), rows[1].size()});
    const auto scores = compressor.score(0, layer.cache.view());
    for (std::size_t head = 0; head < 2; ++head) {
      Layer<float> alone({.head_dim = 8, .rows = rows[head].size(), .window = 4, .capacity = 8});
      for (std::size_t row = 0; row < rows[head].size(); ++row) {
        for (std::size_t dim = 0; dim < 8; ++dim) {
          alone.cache.keys[alone.cache.at(0, row, dim)] =
              whole.cache.keys[whole.cache.at(head, rows[head][row], dim)];
          alone.cache.values[alone.cache.value_at(0, row, dim)] =
              whole.cache.values[whole.cache.value_at(head, rows[head][row], dim)];
        }
      }
      const auto expected =
          lag_scores({.sinks = cut_sinks ? 2U : 4U, .lag = 16, .ranked = false, .window = 4}, alone)[0];
      EXPECT_TRUE(
          std::equal(scores.row(head).begin(), scores.row(head).end(), expected.begin(), expected.end()));
    }
  }
}

TEST(LagKv, ElementsWithoutSpreadCountAsZero) {
  Layer<float> layer({.head_dim = 6, .rows = 44, .window = 1, .capacity = 1});
  for (std::size_t row = 0; row < 44; ++row) {
    layer.cache.keys[layer.cache.at(0, row, 2)] = row < 20 ? static_cast<float>(row) : 7.0F;
    for (std::size_t dim = 0; dim < 6; ++dim) {
      layer.cache.values[layer.cache.value_at(0, row, dim)] = -3.0F;  // none has any: all alike
    }
  }
  reference::expect_scores(LagKv{{.sinks = 4, .lag = 20, .ranked = false, .window = 1}}, layer,
                           reference::lag_kv(layer, 4, 20), 1e-5, 0.0);
}

/// Spreads that are denormal, or beyond float32, still give scores that are finite and in order.
TEST(LagKv, AnyFiniteNumbersHaveScores) {
  reference::Random random(84);
  constexpr float most = std::numeric_limits<float>::max();
  for (const float size : {std::numeric_limits<float>::denorm_min(), 1e-30F, most}) {
    Layer<float> layer({.head_dim = 8, .rows = 60, .window = 1, .capacity = 10});
    for (std::size_t row = 0; row < 60; ++row) {
      for (std::size_t dim = 0; dim < 8; ++dim) {
        const auto draw = static_cast<float>(random.below(3)) - 1.0F;
        layer.cache.keys[layer.cache.at(0, row, dim)] = row % 20 == 7 ? draw * most : draw * size;
        layer.cache.values[layer.cache.value_at(0, row, dim)] = draw * size;
      }
    }
    const auto raw = lag_scores({.sinks = 0, .lag = 20, .ranked = false, .window = 1}, layer)[0];
    double sum = 0.0;
    for (std::size_t t = 0; t < 40; ++t) {
      sum += static_cast<double>(raw[t]);
    }
    EXPECT_NEAR(sum, 2.0, 1e-5) << "each of two stretches gives 1";
    EXPECT_NO_THROW(lag_kept({.sinks = 0, .lag = 20, .window = 1}, layer, 30));
  }
}

TEST(LagKv, AdaptiveHeadsDifferWhereNothingIsRanked) {
  // The second head's stretches have one row far from all others, the first head's rows are alike.
  Layer<float> layer({.kv_heads = 2, .head_dim = 8, .rows = 200, .window = 4, .capacity = 60});
  for (std::size_t row = 7; row < 160; row += 8) {
    for (std::size_t dim = 0; dim < 8; ++dim) {
      layer.cache.keys[layer.cache.at(1, row, dim)] *= 30.0F;
    }
  }
  std::vector<std::vector<std::size_t>> lengths;
  for (const bool ranked : {true, false}) {
    const Plan plan{layer.shape, LagKv{{.lag = 16, .ranked = ranked, .window = 4}}, select::Adaptive{},
                    budget::Uniform{Budget::tokens_per_layer(60)}};
    Compressor compressor{plan};
    compressor.begin(200);
    const Selection& kept = compressor.select(0, compressor.score(0, layer.cache.view()));
    lengths.push_back({kept.rows(0).size(), kept.rows(1).size()});
    EXPECT_EQ(lengths.back()[0] + lengths.back()[1], 120U);
  }
  EXPECT_EQ(lengths[0], (std::vector<std::size_t>{60, 60})) << "ranks are alike in all heads";
  EXPECT_NE(lengths[1][0], 60U);
}

TEST(LagKv, ThreadsDecideNoBit) {
  Layer<float> layer({.kv_heads = 9, .head_dim = 20, .rows = 300, .window = 8, .capacity = 8});
  for (const bool ranked : {true, false}) {
    const LagKv::Options options{.lag = 32, .ranked = ranked};
    const auto expected = lag_scores(options, layer);
    EXPECT_EQ(lag_scores(options, layer, reference::ReverseExecutor{}), expected);
    EXPECT_EQ(lag_scores(options, layer, reference::ShuffledExecutor{}), expected);
    EXPECT_EQ(lag_scores(options, layer, reference::ThreadExecutor{}), expected);
  }
}

TEST(LagKv, NamesTheKeyOrValueThatIsNotFinite) {
  for (const float poison :
       {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()}) {
    for (const std::size_t row :
         {4U, 19U, 20U, 36U, 51U}) {  // the last whole stretch, too: it is a reference
      for (const bool key : {true, false}) {
        Layer<float> layer({.kv_heads = 3, .head_dim = 4, .rows = 55, .window = 8, .capacity = 20});
        const reference::Cache<float> sound = layer.cache;
        (key ? layer.cache.keys[layer.cache.at(1, row, 3)]
             : layer.cache.values[layer.cache.value_at(1, row, 3)]) = poison;
        const Plan plan{layer.shape, LagKv{{.lag = 16}}, select::GroupedTopK{},
                        budget::Uniform{Budget::tokens_per_layer(20)}};
        Compressor compressor{plan};
        compressor.begin(55);
        const reference::Cache<float> before = layer.cache;
        const std::string named = std::string(key ? "key" : "value") + " of layer 0 KV head 1 token " +
                                  std::to_string(row) + " holds NaN or infinite elements";
        expect_error<ScoreError>([&] { compressor.compress(0, layer.cache.view()); }, {named});
        expect_error<ScoreError>([&] { compressor.score(0, layer.cache.view()); }, {named});
        EXPECT_TRUE(layer.cache == before);
        layer.cache = sound;
        EXPECT_EQ(compressor.compress(0, layer.cache.view()).rows(1), 20U) << "the call may be made again";
      }
    }
  }
}

TEST(LagKv, NamesTheLowestTokenAndKvHead) {
  Layer<float> layer({.kv_heads = 3, .head_dim = 4, .rows = 55, .window = 8, .capacity = 20});
  const float poison = std::numeric_limits<float>::quiet_NaN();
  layer.cache.keys[layer.cache.at(2, 5, 0)] = poison;
  layer.cache.keys[layer.cache.at(1, 40, 0)] = poison;
  layer.cache.values[layer.cache.value_at(1, 30, 0)] = poison;
  expect_error<ScoreError>([&] { lag_scores({.lag = 16}, layer); },
                           {"value of layer 0 KV head 1 token 30 holds NaN"});
}

TEST(LagKv, RejectsOptionsByName) {
  expect_error<ArgumentError>([] { LagKv{{.window = 0}}; },
                              {"window is 0", "at least the last token must stay"});
  for (const std::size_t lag : {0U, 1U}) {
    expect_error<ArgumentError>([&] { LagKv{{.lag = lag}}; },
                                {"lag is " + std::to_string(lag) + ", must be at least 2"});
  }
  EXPECT_NO_THROW((LagKv{{.sinks = 0, .lag = std::numeric_limits<std::size_t>::max()}}));
}

}  // namespace
}  // namespace compresskv
