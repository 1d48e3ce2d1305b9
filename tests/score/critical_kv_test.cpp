// CriticalKV: the rows of each capacity held against the two stages as they are defined.

#include <gtest/gtest.h>

#include <algorithm>
#include <compresskv/compresskv.hpp>
#include <compresskv/methods.hpp>
#include <cstddef>
#include <limits>
#include <numeric>
#include <span>
#include <vector>

#include "reference/errors.hpp"
#include "reference/executors.hpp"
#include "reference/layer_case.hpp"
#include "reference/output_norms.hpp"

namespace compresskv {
namespace {

using reference::expect_error;
using reference::Layer;
using reference::LayerCase;
using score::CriticalKv;

OutputWeights outputs_of(const std::vector<float>& weights, const ModelShape& model) {
  return {std::vector<const float*>(model.layers, weights.data()),
          {.hidden = reference::output_rows, .query_heads = model.query_heads, .head_dim = model.head_dim}};
}

template <class S, class T>
auto scored_plan(const Layer<float>& layer, const S& scorer, const T& selector, std::size_t capacity) {
  return Plan{layer.shape, scorer, selector, budget::Uniform{Budget::tokens_per_layer(capacity)}};
}

/// Scores of a layer by a scorer of KV heads.
template <class S>
std::vector<std::vector<float>> scores_by(const S& scorer, Layer<float>& layer) {
  const auto plan = scored_plan(layer, scorer, select::GroupedTopK{}, scorer.window());
  Compressor compressor{plan};
  compressor.begin(layer.sizes.rows);
  const auto found = compressor.score(0, layer.cache.view(), layer.observation());
  std::vector<std::vector<float>> rows;
  for (std::size_t row = 0; row < found.rows(); ++row) {
    rows.emplace_back(found.row(row).begin(), found.row(row).end());
  }
  return rows;
}

std::vector<std::size_t> rows_by_falling(const std::vector<double>& scores) {
  std::vector<std::size_t> order(scores.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return scores[a] > scores[b]; });
  return order;
}

/// Scores of a KV head weighed, in double; and how sure they are, relative to themselves.
std::vector<double> weighed(const Layer<float>& layer, const std::vector<float>& weights,
                            const std::vector<float>& scores, std::size_t kv_head, double epsilon) {
  std::vector<double> found;
  for (std::size_t t = 0; t < scores.size(); ++t) {
    double norm = 0.0;
    for (std::size_t h = 0; h < layer.sizes.group; ++h) {
      norm += reference::absolute_sum(
          reference::added_to_output(layer, weights, kv_head * layer.sizes.group + h, t));
    }
    found.push_back((static_cast<double>(scores[t]) + epsilon) * norm /
                    static_cast<double>(layer.sizes.group));
  }
  return found;
}

TEST(CriticalKv, KeepsTheRowsOfBothStagesAtEveryCapacity) {
  std::vector<LayerCase> cases = reference::layer_cases(10, 97);
  std::erase_if(cases, [](const LayerCase& c) { return c.rows > 160 || c.kv_heads > 8; });
  for (const LayerCase& c : cases) {
    Layer<float> layer(c);
    const auto weights = reference::random_outputs(c.seed, layer.shape);
    const score::SnapKv snap{{.window = c.window, .pool_width = c.pool_width}};
    const auto plain = scores_by(snap, layer);
    for (const double share : {0.0, 0.3, 0.5, 1.0}) {
      const CriticalKv critical{
          snap, outputs_of(weights, layer.shape), {.first_share = share, .epsilon = 1e-3F}};
      const auto ranks = scores_by(critical, layer);
      for (std::size_t kv_head = 0; kv_head < c.kv_heads; ++kv_head) {
        const std::size_t count = plain[kv_head].size();
        const std::vector<double> first_scores(plain[kv_head].begin(), plain[kv_head].end());
        const auto second_scores = weighed(layer, weights, plain[kv_head], kv_head, 1e-3);
        const auto first = rows_by_falling(first_scores);
        for (std::size_t capacity = 0; capacity <= count; ++capacity) {
          SCOPED_TRACE(testing::Message()
                       << c << " share " << share << " KV head " << kv_head << " keeps " << capacity);
          std::vector<bool> kept(count, false);
          for (std::size_t t = 0; t < count; ++t) {
            const auto better = static_cast<std::size_t>(
                std::count_if(ranks[kv_head].begin(), ranks[kv_head].end(),
                              [&](float other) { return other > ranks[kv_head][t]; }));
            kept[t] = better < capacity;
          }
          ASSERT_EQ(static_cast<std::size_t>(std::count(kept.begin(), kept.end(), true)), capacity)
              << "every row has a rank of its own";
          const auto chosen_first = static_cast<std::size_t>(share * static_cast<double>(capacity));
          std::vector<bool> of_first(count, false);
          for (std::size_t i = 0; i < chosen_first; ++i) {
            ASSERT_TRUE(kept[first[i]]) << "row " << first[i] << " is of the first stage";
            of_first[first[i]] = true;
          }
          // Of the others none that went is surely better than one that stayed.
          double lowest = std::numeric_limits<double>::infinity();
          double highest = 0.0;
          for (std::size_t t = 0; t < count; ++t) {
            if (kept[t] && !of_first[t]) {
              lowest = std::min(lowest, second_scores[t]);
            } else if (!kept[t]) {
              highest = std::max(highest, second_scores[t]);
            }
          }
          ASSERT_LE(highest, lowest * (1.0 + 1e-4) + 1e-7);
        }
      }
    }
  }
}

TEST(CriticalKv, WeighsAndLeavesTheScorersOwnHalf) {
  const LayerCase c{
      .group = 2, .kv_heads = 2, .head_dim = 16, .rows = 200, .window = 8, .capacity = 48, .seed = 3};
  Layer<float> layer(c);
  const auto weights = reference::random_outputs(4, layer.shape);
  const score::SnapKv snap{{.window = 8}};
  const auto plain = scores_by(snap, layer);
  EXPECT_NE(scores_by(CriticalKv{snap, outputs_of(weights, layer.shape)}, layer),
            scores_by(CriticalKv{snap, outputs_of(weights, layer.shape), {.first_share = 1.0}}, layer));
  // All by the first stage: the scorer's order.
  const auto all_first =
      scores_by(CriticalKv{snap, outputs_of(weights, layer.shape), {.first_share = 1.0}}, layer);
  for (std::size_t head = 0; head < 2; ++head) {
    const std::vector<double> a(plain[head].begin(), plain[head].end());
    const std::vector<double> b(all_first[head].begin(), all_first[head].end());
    EXPECT_EQ(rows_by_falling(a), rows_by_falling(b));
  }
}

TEST(CriticalKv, ThreadsAndLayoutsChangeNoBit) {
  const LayerCase c{
      .group = 3, .kv_heads = 2, .head_dim = 64, .rows = 400, .window = 8, .capacity = 60, .seed = 5};
  Layer<float> layer(c);
  const auto weights = reference::random_outputs(4, layer.shape);
  const CriticalKv critical{score::SnapKv{{.window = 8}}, outputs_of(weights, layer.shape)};
  const auto expected = scores_by(critical, layer);
  for (const reference::Arrangement arrangement : reference::all_arrangements) {
    LayerCase other = c;
    other.arrangement = arrangement;
    Layer<float> arranged(other);
    const auto plan = scored_plan(arranged, critical, select::Adaptive{}, 60);
    Compressor compressor{plan, reference::ThreadExecutor{}};
    compressor.begin(400);
    const auto found = compressor.score(0, arranged.cache.view(), arranged.observation());
    for (std::size_t head = 0; head < 2; ++head) {
      EXPECT_EQ(std::vector<float>(found.row(head).begin(), found.row(head).end()), expected[head]);
    }
    compressor.compress(0, arranged.cache.view(), arranged.observation());
    EXPECT_EQ(compressor.retained(0).rows(0) + compressor.retained(0).rows(1), 120U);
  }
}

TEST(CriticalKv, WrapsScorersThatLookAtNoQuery) {
  const LayerCase c{
      .group = 2, .kv_heads = 2, .head_dim = 16, .rows = 90, .window = 8, .capacity = 20, .seed = 3};
  Layer<float> layer(c);
  const auto weights = reference::random_outputs(4, layer.shape);
  const CriticalKv critical{score::Cur{{.window = 8}}, outputs_of(weights, layer.shape)};
  static_assert(decltype(critical)::needs == Needs::keys_and_values);
  static_assert(CriticalKv<score::Random>::needs == Needs::keys_and_values);
  static_assert(CriticalKv<score::SnapKv>::needs == Needs::window_attention);
  const auto plan = scored_plan(layer, critical, select::GroupedTopK{}, 20);
  Compressor compressor{plan};
  compressor.begin(90);
  EXPECT_EQ(compressor.compress(0, layer.cache.view()).rows(), 20U);
}

TEST(CriticalKv, WhatIsWrongIsNamedAndNothingMoves) {
  const LayerCase c{
      .group = 2, .kv_heads = 2, .head_dim = 16, .rows = 90, .window = 8, .capacity = 20, .seed = 3};
  Layer<float> layer(c);
  const auto weights = reference::random_outputs(4, layer.shape);
  const auto make = [&](const score::CriticalKvOptions& options) {
    return CriticalKv{score::SnapKv{}, outputs_of(weights, layer.shape), options};
  };
  for (const double wrong : {-0.1, 1.1, std::numeric_limits<double>::quiet_NaN()}) {
    expect_error<ArgumentError>([&] { make({.first_share = wrong}); }, {"first_share is", "between 0 and 1"});
  }
  expect_error<ArgumentError>([&] { make({.epsilon = -1.0F}); }, {"epsilon is -1", "not below 0"});
  ModelShape other = layer.shape;
  other.layers = 2;
  expect_error<ArgumentError>(
      [&] { Plan(other, make({}), select::GroupedTopK{}, budget::Uniform{Budget::tokens_per_layer(20)}); },
      {"output weights are of 1 layers", "the model has 2"});

  layer.cache.values[layer.cache.at(1, 33, 2)] = std::numeric_limits<float>::infinity();
  const auto before = layer.cache.keys;
  const auto plan = scored_plan(layer, make({}), select::GroupedTopK{}, 20);
  Compressor compressor{plan};
  compressor.begin(90);
  expect_error<ScoreError>([&] { compressor.compress(0, layer.cache.view(), layer.observation()); },
                           {"layer 0 query head 2 token 33", "its value"});
  EXPECT_EQ(layer.cache.keys, before);
  layer.cache.values[layer.cache.at(1, 33, 2)] = 1.0F;
  EXPECT_EQ(compressor.compress(0, layer.cache.view(), layer.observation()).rows(), 20U);
}

}  // namespace
}  // namespace compresskv
