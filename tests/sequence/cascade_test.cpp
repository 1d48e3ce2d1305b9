// Compositions that reach over layers: CAKE's budgets, and what each arrival leaves.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <compresskv/compresskv.hpp>
#include <limits>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "reference/errors.hpp"
#include "reference/methods.hpp"

namespace compresskv {
namespace {

using reference::expect_error;
using reference::Layer;
using reference::LayerCase;
using Rows = std::vector<std::uint32_t>;

/// P of docs/method.md 5.5, in double.
double preference(const Layer<float>& layer, double tau1, double tau2) {
  double entropy = 0.0;
  double variance = 0.0;
  for (std::size_t head = 0; head < layer.shape.query_heads; ++head) {
    const auto weights = layer.attention(head).weights;
    for (std::size_t t = 0; t + layer.sizes.observed() < layer.sizes.rows; ++t) {
      double mean = 0.0;
      for (const auto& row : weights) {
        entropy -= row[t] * std::log(row[t] + 1e-10);
        mean += row[t] / static_cast<double>(weights.size());
      }
      for (const auto& row : weights) {
        variance += weights.size() < 2
                        ? 0.0
                        : (row[t] - mean) * (row[t] - mean) / (static_cast<double>(weights.size()) - 1.0);
      }
    }
  }
  return std::pow(entropy, 1.0 / tau1) * std::pow(variance, 1.0 / tau2);
}

/// Proportional to the preferences within bounds, the rest one row a layer in rounds from below.
std::vector<std::size_t> shared_out(const std::vector<double>& preferences, std::size_t least,
                                    std::size_t total, const std::vector<std::size_t>& most) {
  const double all = std::accumulate(preferences.begin(), preferences.end(), 0.0);
  std::vector<std::size_t> rows;
  for (std::size_t l = 0; l < most.size(); ++l) {
    const double share = std::nearbyint(preferences[l] / all * static_cast<double>(total));
    rows.push_back(std::clamp(static_cast<std::size_t>(share), least, most[l]));
  }
  const auto sum = [&] { return std::accumulate(rows.begin(), rows.end(), std::size_t{0}); };
  for (std::size_t l = 0; sum() != total; l = (l + 1) % most.size()) {
    if (sum() < total && rows[l] < most[l]) {
      ++rows[l];
    } else if (sum() > total && rows[l] > least) {
      --rows[l];
    }
  }
  return rows;
}

/// Layers of one model, each with its own cache and queries.
std::vector<Layer<float>> model(const LayerCase& c, std::size_t layers) {
  std::vector<Layer<float>> out;
  for (std::size_t l = 0; l < layers; ++l) {
    LayerCase own = c;
    own.seed = c.seed + l;
    out.emplace_back(own);
    // Some layers look sharply, some widely: preferences that differ.
    for (float& query : out.back().queries) {
      query *= 0.2F + 0.5F * static_cast<float>(l % 3);
    }
  }
  return out;
}

template <class S, class T>
auto plan_of(const LayerCase& c, std::size_t layers, const S& scorer, const T& selector) {
  return Plan{
      ModelShape{
          .layers = layers, .query_heads = c.query_heads(), .kv_heads = c.kv_heads, .head_dim = c.head_dim},
      scorer, selector, budget::Cake{Budget::tokens_per_layer(c.capacity)}};
}

StridedKv<float> view_of(Layer<float>& layer, std::span<const std::size_t> rows) {
  KvShape shape = layer.cache.shape;
  shape.head_rows = rows;
  return {layer.cache.keys.data(), layer.cache.values.data(), shape, layer.cache.strides};
}

/// Every arrival of a model, held against a plain recomputation from the untouched layers.
template <class S, class T>
void expect_cascade(const LayerCase& c, std::size_t count, const S& scorer, const T& selector) {
  auto layers = model(c, count);
  const auto original = layers;
  const auto plan = plan_of(c, count, scorer, selector);
  Compressor compressor{plan};
  compressor.begin(c.rows);
  std::vector<std::vector<std::size_t>> rows(count, std::vector<std::size_t>(c.kv_heads, c.rows));
  std::vector<double> preferences;
  for (std::size_t arrived = 0; arrived < count; ++arrived) {
    SCOPED_TRACE(testing::Message() << "layer " << arrived << " arrives");
    const std::vector<std::size_t> before(compressor.capacities().begin(), compressor.capacities().end());
    const auto changed = compressor.arrive(
        arrived, [&](std::size_t l) { return view_of(layers[l], rows[l]); }, layers[arrived].observation());
    ASSERT_EQ(changed.back(), arrived);
    for (const std::size_t l : changed) {
      for (std::size_t head = 0; head < c.kv_heads; ++head) {
        rows[l][head] = compressor.retained(l).rows(head);
      }
    }
    preferences.push_back(preference(original[arrived], 1.0, 1.0));
    const std::size_t total = std::min(c.capacity * count, c.rows * (arrived + 1));
    std::size_t sum = 0;
    for (std::size_t l = 0; l <= arrived; ++l) {
      const std::size_t capacity = compressor.capacities()[l];
      sum += capacity;
      std::size_t kept = 0;
      for (std::size_t head = 0; head < c.kv_heads; ++head) {
        kept += rows[l][head];
      }
      ASSERT_EQ(kept, capacity * c.kv_heads);
      ASSERT_GE(capacity, c.observed());
      ASSERT_TRUE(l == arrived || capacity <= before[l]) << "layer " << l << " cannot grow";
      ASSERT_EQ(std::count(changed.begin(), changed.end(), l), l == arrived || capacity < before[l] ? 1 : 0);
    }
    // The preferences in double differ from ours in rounding, which moves a row or two.
    std::vector<std::size_t> most(before.begin(), before.begin() + static_cast<std::ptrdiff_t>(arrived));
    most.push_back(c.rows);
    const auto expected = shared_out(preferences, c.observed(), total, most);
    for (std::size_t l = 0; l <= arrived; ++l) {
      ASSERT_NEAR(static_cast<double>(compressor.capacities()[l]), static_cast<double>(expected[l]), 2.0)
          << "layer " << l;
    }
    ASSERT_EQ(sum, total) << "the total, and not a row more";
  }
  // In the end each layer holds what it would hold had its capacity been known from the start.
  for (std::size_t l = 0; l < count; ++l) {
    Layer<float> fresh = original[l];
    const Plan alone{plan.shape(), scorer, selector,
                     budget::Uniform{Budget::tokens_per_layer(compressor.capacities()[l])}};
    Compressor once{alone};
    once.begin(c.rows);
    const Retained& expected = once.compress(l, fresh.cache.view(), fresh.observation());
    for (std::size_t head = 0; head < c.kv_heads; ++head) {
      const auto& kept = compressor.retained(l).positions(head);
      const auto& wanted = expected.positions(head);
      ASSERT_EQ(Rows(kept.begin(), kept.end()), Rows(wanted.begin(), wanted.end())) << "layer " << l;
      for (std::size_t row = 0; row < kept.size(); ++row) {
        for (std::size_t dim = 0; dim < c.head_dim; ++dim) {
          ASSERT_EQ(layers[l].key(head, row, dim), original[l].key(head, kept[row], dim));
          ASSERT_EQ(layers[l].value(head, row, dim), original[l].value(head, kept[row], dim));
        }
      }
    }
  }
}

std::vector<LayerCase> cases() { return reference::model_cases(12, 41); }

TEST(Cascade, EachArrivalKeepsTheTotalAndEndsAsIfBudgetsHadBeenKnown) {
  for (const LayerCase& c : cases()) {
    SCOPED_TRACE(c);
    expect_cascade(c, 6, score::Cake{{.window = c.window}}, select::GroupedTopK{});
  }
}

TEST(Cascade, BudgetsCombineWithOtherScorersAndSelectors) {
  const LayerCase c = cases()[3];
  expect_cascade(c, 5, score::SnapKv{{.window = c.window}}, select::Adaptive{});
  HeadRanking ranking{std::vector<std::vector<std::uint32_t>>(5, {0})};
  expect_cascade(c, 5, score::SemanticRetrieval{ranking, {.heads_per_layer = 1, .window = c.window}},
                 select::SharedTopK{});
}

TEST(Cascade, LayersArriveInOrderEachOnce) {
  const LayerCase c{.group = 2, .kv_heads = 2, .rows = 60, .window = 2, .capacity = 10};
  std::vector<Layer<float>> layers(3, Layer<float>(c));  // equal preferences: 15 and 15 rows, then 10 each
  const auto plan = plan_of(c, 3, score::Cake{{.window = c.window}}, select::GroupedTopK{});
  Compressor compressor{plan};
  std::vector<std::vector<std::size_t>> rows(3, std::vector<std::size_t>(c.kv_heads, c.rows));
  const auto arrive = [&](std::size_t layer) {
    for (const std::size_t l : compressor.arrive(
             layer, [&](std::size_t l) { return view_of(layers[l], rows[l]); },
             layers[layer].observation())) {
      for (std::size_t head = 0; head < c.kv_heads; ++head) {
        rows[l][head] = compressor.retained(l).rows(head);
      }
    }
  };
  expect_error<ArgumentError>([&] { arrive(0); }, {"begin() was not called"});
  compressor.begin(c.rows);
  expect_error<ArgumentError>([&] { arrive(1); },
                              {"layer 1 arrives, expected layer 0", "in order, each once"});
  arrive(0);
  expect_error<ArgumentError>([&] { arrive(0); }, {"layer 0 arrives, expected layer 1"});
  // A layer that failed has not arrived, and comes again.
  const auto untouched = layers[1].cache;
  const float query = std::exchange(layers[1].queries.back(), std::numeric_limits<float>::quiet_NaN());
  expect_error<ScoreError>([&] { arrive(1); }, {"score of layer 1", "is not finite"});
  EXPECT_EQ(layers[1].cache, untouched);
  layers[1].queries.back() = query;
  arrive(1);
  // A layer that must shrink again has scores for the rows that it kept, not for rows appended since.
  rows[0].assign(c.kv_heads, rows[0][0] + 1);
  expect_error<ArgumentError>([&] { arrive(2); },
                              {"layer 0 KV head 0 has 16 rows", "at most 15", "begin_turn()"});
  rows[0].assign(c.kv_heads, rows[0][0] - 2);
  expect_error<ArgumentError>([&] { arrive(2); }, {"layer 0 KV head 0 has 14 rows", "at least 15"});
  rows[0].assign(c.kv_heads, rows[0][0] + 1);
  arrive(2);
}

TEST(Cascade, ATurnBeginsAnew) {
  LayerCase c = cases()[2];
  c.extra_rows = 3;  // of the second turn
  auto layers = model(c, 2);
  const auto plan = plan_of(c, 2, score::Cake{{.window = c.window}}, select::GroupedTopK{});
  Compressor compressor{plan};
  std::vector<std::vector<std::size_t>> rows(2, std::vector<std::size_t>(c.kv_heads, c.rows));
  const auto all_arrive = [&] {
    for (std::size_t layer = 0; layer < 2; ++layer) {
      for (const std::size_t l : compressor.arrive(
               layer, [&](std::size_t l) { return view_of(layers[l], rows[l]); },
               layers[layer].observation())) {
        for (std::size_t head = 0; head < c.kv_heads; ++head) {
          rows[l][head] = compressor.retained(l).rows(head);
        }
      }
    }
  };
  compressor.begin(c.rows);
  all_arrive();
  for (auto& lengths : rows) {
    for (std::size_t& length : lengths) {
      length += 3;
    }
  }
  reference::Random random(c.seed);
  for (Layer<float>& layer : layers) {
    layer.cache.fill_rows(random, c.rows, c.rows + 3);
  }
  const std::size_t total = compressor.retained(0).next_position() + 3;
  compressor.begin_turn(total);
  all_arrive();
  EXPECT_EQ(compressor.capacities()[0] + compressor.capacities()[1], 2 * c.capacity);
}

TEST(CakeBudget, RejectsOptionsByName) {
  const Budget budget = Budget::tokens_per_layer(30);
  expect_error<ArgumentError>([&] { budget::Cake(budget, {.tau1 = 0.0}); }, {"tau1 is 0", "above 0"});
  expect_error<ArgumentError>([&] { budget::Cake(budget, {.tau2 = -1.0}); }, {"tau2 is -1"});
}

TEST(CakeBudget, LayersThatPreferNothingCountTheSame) {
  std::vector<std::size_t> capacities{10, 10, 10};
  std::vector<std::size_t> most(3);
  const std::vector<double> none(3, 0.0);
  const std::vector<std::size_t> least(3, 2);
  budget::Cake(Budget::tokens_per_layer(5)).cascade(none, least, 16, capacities, most);
  EXPECT_EQ(capacities, (std::vector<std::size_t>{6, 5, 5}));
}

TEST(CakeBudget, NoLayerFallsBelowItsLeast) {
  std::vector<std::size_t> capacities{10, 10, 10};
  std::vector<std::size_t> most(3);
  const std::vector<double> preferences{0.0, 1.0, 100.0};
  const std::vector<std::size_t> least{2, 7, 3};
  const budget::Cake cake(Budget::tokens_per_layer(5));
  cake.cascade(preferences, least, 16, capacities, most);
  EXPECT_EQ(capacities, (std::vector<std::size_t>{2, 7, 7}));
  expect_error<ArgumentError>(
      [&] { cake.cascade(preferences, least, 11, capacities, most); },
      {"windows and protected tokens of layers 0 to 2 are 12 rows", "the budget has 11", "protect fewer"});
  EXPECT_EQ(capacities, (std::vector<std::size_t>{2, 7, 7})) << "as they were";
}

}  // namespace
}  // namespace compresskv
