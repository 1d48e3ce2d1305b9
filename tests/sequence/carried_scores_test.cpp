// Scores that go from layer to layer: Carried and ModelWide, held against sums in double.

#include <gtest/gtest.h>

#include <algorithm>
#include <compresskv/compresskv.hpp>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "reference/errors.hpp"
#include "reference/layered_model.hpp"

namespace compresskv {
namespace {

using reference::expect_error;
using reference::LayerCase;
using Rows = std::vector<std::uint32_t>;
using reference::Scores64;
using Model = reference::LayeredModel;

/// The kept positions are the best by `scores`, but for those within rounding of each other.
void expect_best(const PositionSet& kept, const Scores64& scores, std::size_t window, std::size_t capacity) {
  ASSERT_EQ(kept.size(), std::min(capacity, scores.size() + window));
  std::vector<bool> stays(scores.size() + window, false);
  for (const std::uint32_t position : kept) {
    stays[position] = true;
  }
  double lowest_kept = std::numeric_limits<double>::infinity();
  double highest_lost = 0.0;
  for (std::size_t p = 0; p < scores.size(); ++p) {
    (stays[p] ? lowest_kept : highest_lost) =
        stays[p] ? std::min(lowest_kept, scores[p]) : std::max(highest_lost, scores[p]);
  }
  for (std::size_t i = 0; i < window; ++i) {
    ASSERT_TRUE(stays[scores.size() + i]) << "the window";
  }
  ASSERT_GE(lowest_kept, highest_lost * (1.0 - 1e-5) - 1e-12);
}

std::vector<LayerCase> cases() { return reference::model_cases(10, 51); }

constexpr std::size_t layer_count = 6;

TEST(Carried, EachLayerKeepsTheBestByWhatLayersBelowSawToo) {
  for (const LayerCase& c : cases()) {
    for (const std::size_t hold : {0U, 2U, 9U}) {
      SCOPED_TRACE(testing::Message() << c << " hold " << hold);
      Model model(c, layer_count);
      const Model original = model;
      const std::size_t heads = std::min<std::size_t>(2, c.query_heads());
      const Plan plan{
          model.shape,
          score::Carried{model.scores(),
                         {.heads_per_layer = heads, .decay = 0.7F, .hold_layers = hold, .window = c.window}},
          select::SharedTopK{}, budget::Uniform{Budget::tokens_per_layer(c.capacity)}};
      Compressor compressor{plan};
      compressor.begin(c.rows);
      Scores64 carried(c.rows - c.observed(), 0.0);
      const std::size_t waiting = std::min<std::size_t>(hold, layer_count - 1);
      for (std::size_t l = 0; l < layer_count; ++l) {
        const auto changed = compressor.arrive(l, model.views(), model.layers[l].observation());
        model.shrunk(compressor, changed);
        for (double& score : carried) {
          score *= 0.7;
        }
        for (const std::size_t head : original.best_heads(l, heads)) {
          const Scores64 own = original.weighted(l, head);
          for (std::size_t t = 0; t < own.size(); ++t) {
            carried[t] += own[t];
          }
        }
        std::vector<std::size_t> due;
        for (std::size_t first = l == waiting ? 0 : l; l >= waiting && first <= l; ++first) {
          due.push_back(first);
        }
        ASSERT_EQ(std::vector<std::size_t>(changed.begin(), changed.end()), due) << "layer " << l;
        for (const std::size_t shrunk : due) {
          expect_best(compressor.retained(shrunk).positions(), carried, c.observed(), c.capacity);
        }
      }
    }
  }
}

TEST(ModelWide, AllLayersKeepOneSetByTheBestHeadsOfTheModel) {
  for (const LayerCase& c : cases()) {
    SCOPED_TRACE(c);
    Model model(c, layer_count);
    const Model original = model;
    const std::size_t heads = std::min<std::size_t>(5, c.query_heads() * layer_count);
    const Plan plan{model.shape, score::ModelWide{model.scores(), {.heads = heads, .window = c.window}},
                    select::SharedTopK{}, budget::Uniform{Budget::tokens_per_layer(c.capacity)}};
    Compressor compressor{plan};
    compressor.begin(c.rows);
    for (std::size_t l = 0; l < layer_count; ++l) {
      ASSERT_TRUE(compressor.arrive(l, model.views(), model.layers[l].observation()).empty());
      ASSERT_EQ(model.layers[l].cache, original.layers[l].cache) << "nothing moves before the last";
    }
    const auto changed = compressor.finish(model.views());
    ASSERT_EQ(changed.size(), layer_count);
    model.shrunk(compressor, changed);

    const Scores64 scores = original.model_wide(heads);
    const Rows first(compressor.retained(0).positions().begin(), compressor.retained(0).positions().end());
    expect_best(compressor.retained(0).positions(), scores, c.observed(), c.capacity);
    for (std::size_t l = 0; l < layer_count; ++l) {
      const auto& kept = compressor.retained(l).positions();
      ASSERT_EQ(Rows(kept.begin(), kept.end()), first) << "one set for all layers";
      for (std::size_t row = 0; row < first.size(); ++row) {
        for (std::size_t head = 0; head < c.kv_heads; ++head) {
          ASSERT_EQ(model.layers[l].key(head, row, 3), original.layers[l].key(head, first[row], 3));
        }
      }
    }
  }
}

TEST(Carried, ErrorAwareBudgetsCutPrefixesOfOneOrder) {
  const LayerCase c{.group = 2, .kv_heads = 2, .head_dim = 16, .rows = 120, .window = 8, .capacity = 40};
  Model model(c, 3);
  const Plan plan{model.shape, score::ModelWide{model.scores(), {.heads = 3, .window = 8}},
                  select::SharedTopK{},
                  budget::ErrorAware{LayerErrors({0.7, 0.2, 0.1}, {}), Budget::tokens_per_layer(40)}};
  Compressor compressor{plan};
  compressor.begin(c.rows);
  for (std::size_t l = 0; l < 3; ++l) {
    compressor.arrive(l, model.views(), model.layers[l].observation());
  }
  compressor.finish(model.views());
  const auto& large = compressor.retained(0).positions();
  const auto& small = compressor.retained(2).positions();
  ASSERT_GT(large.size(), small.size());
  EXPECT_TRUE(std::includes(large.begin(), large.end(), small.begin(), small.end()));
}

TEST(Carried, RanksAddTheirParts) {
  const LayerCase c{.group = 2, .kv_heads = 2, .head_dim = 16, .rows = 120, .window = 8, .capacity = 40};
  Model whole(c, 3);
  Model doubled = whole;
  const Plan plan{whole.shape, score::Carried{whole.scores(), {.heads_per_layer = 2, .window = 8}},
                  select::SharedTopK{}, budget::Uniform{Budget::tokens_per_layer(40)}};
  Compressor one{plan};
  Compressor two{plan};
  one.begin(c.rows);
  two.begin(c.rows);
  for (std::size_t l = 0; l < 3; ++l) {
    whole.shrunk(one, one.arrive(l, whole.views(), whole.layers[l].observation()));
    // Two ranks that saw the same: every part doubles, and with it all that is carried.
    doubled.shrunk(
        two, two.arrive(l, doubled.views(), doubled.layers[l].observation(), [](std::span<float> scores) {
          for (float& score : scores) {
            score *= 2.0F;
          }
        }));
    const auto& a = one.retained(l).positions();
    const auto& b = two.retained(l).positions();
    EXPECT_EQ(Rows(a.begin(), a.end()), Rows(b.begin(), b.end()));
  }
}

TEST(CrossLayer, WhatIsMissingOrOutOfOrderIsNamedAndNothingMoves) {
  const LayerCase c{.group = 2, .kv_heads = 2, .head_dim = 16, .rows = 60, .window = 8, .capacity = 20};
  Model model(c, 3);
  const Plan plan{model.shape, score::ModelWide{model.scores(), {.heads = 3, .window = 8}},
                  select::SharedTopK{}, budget::Uniform{Budget::tokens_per_layer(20)}};
  Compressor compressor{plan};
  compressor.begin(c.rows);
  const auto before = model.layers[0].cache;
  compressor.arrive(0, model.views(), model.layers[0].observation());
  expect_error<ArgumentError>([&] { compressor.arrive(0, model.views(), model.layers[0].observation()); },
                              {"layer 0 arrives, expected layer 1"});
  expect_error<ArgumentError>([&] { compressor.arrive(2, model.views(), model.layers[2].observation()); },
                              {"layer 2 arrives, expected layer 1"});
  expect_error<ArgumentError>([&] { compressor.finish(model.views()); },
                              {"layer 1 has not arrived", "all 3 layers"});
  EXPECT_EQ(model.layers[0].cache, before);

  // A layer that fails adds nothing: the result is that of a model where it never failed.
  const std::vector<float> queries = model.layers[1].queries;
  std::fill(model.layers[1].queries.begin(), model.layers[1].queries.end(),
            std::numeric_limits<float>::quiet_NaN());
  expect_error<ScoreError>([&] { compressor.arrive(1, model.views(), model.layers[1].observation()); },
                           {"score of layer 1", "is not finite"});
  model.layers[1].queries = queries;
  compressor.arrive(1, model.views(), model.layers[1].observation());
  compressor.arrive(2, model.views(), model.layers[2].observation());
  Model other(c, 3);
  Compressor undisturbed{plan};
  undisturbed.begin(c.rows);
  for (std::size_t l = 0; l < 3; ++l) {
    undisturbed.arrive(l, other.views(), other.layers[l].observation());
  }
  // Rows appended before the end have no scores.
  model.rows[1].assign(c.kv_heads, c.rows - 1);
  expect_error<ArgumentError>([&] { compressor.finish(model.views()); }, {"layer 1 KV head 0 has 59 rows"});
  EXPECT_EQ(model.layers[0].cache, before);
  model.rows[1].assign(c.kv_heads, c.rows);
  compressor.finish(model.views());
  undisturbed.finish(other.views());
  for (std::size_t l = 0; l < 3; ++l) {
    EXPECT_EQ(model.layers[l].cache, other.layers[l].cache);
  }
}

TEST(CrossLayer, RejectsOptionsByName) {
  const Model model({.group = 2, .kv_heads = 2, .head_dim = 16, .rows = 20}, 3);
  const HeadScores scores = model.scores();
  expect_error<ArgumentError>([&] { score::Carried(scores, {.heads_per_layer = 5}); },
                              {"heads_per_layer is 5", "1 to the 4 heads"});
  expect_error<ArgumentError>([&] { score::Carried(scores, {.decay = 1.5F}); },
                              {"decay is 1.5", "between 0 and 1"});
  expect_error<ArgumentError>([&] { score::Carried(scores, {.window = 0}); }, {"window is 0"});
  expect_error<ArgumentError>([&] { score::ModelWide(scores, {.heads = 13}); },
                              {"heads is 13", "1 to the 12"});
  expect_error<ArgumentError>([&] { score::ModelWide(scores, {.heads = 3, .pool_width = 2}); },
                              {"pooling width is 2"});
  ModelShape shape = model.shape;
  shape.layers = 4;
  expect_error<ArgumentError>([&] { score::Carried(scores, {}).validate(shape); },
                              {"head scores are of 3 layers of 4 heads", "the model has 4 of 4"});
}

}  // namespace
}  // namespace compresskv
