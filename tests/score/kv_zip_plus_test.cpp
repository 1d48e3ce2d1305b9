// KVzip+: attention of repeats weighed by what values add to the layer's output, held against double.

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
using reference::Random;
using reference::RepeatedModel;
using reference::RepeatScores64;

auto plus_plan(const RepeatedModel<>& model, std::size_t capacity,
               const score::KvZipPlus::Options& options = {}) {
  return Plan{model.shape, score::KvZipPlus{model.output_weights(), options}, select::WholeModel{},
              budget::Uniform{Budget::tokens_per_layer(capacity)}};
}

/// The lowest score of what stays and the highest of what goes, of rows that compete.
template <class C>
std::pair<double, double> lowest_and_highest(const RepeatedModel<>& model, const C& compressor,
                                             const RepeatScores64& scores, std::size_t sinks,
                                             std::size_t window) {
  double lowest = std::numeric_limits<double>::infinity();
  double highest = 0.0;
  for (std::size_t l = 0; l < model.layers.size(); ++l) {
    for (std::size_t head = 0; head < model.sizes.kv_heads; ++head) {
      for (std::size_t p = sinks; p + window < model.context; ++p) {
        if (compressor.retained(l).row(p, head)) {
          lowest = std::min(lowest, scores[l][head][p]);
        } else {
          highest = std::max(highest, scores[l][head][p]);
        }
      }
    }
  }
  return {lowest, highest};
}

TEST(KvZipPlus, KeepsWhatRepeatsDrawTheMostFrom) {
  Random random(13);
  std::size_t unlike_kvzip = 0;
  for (int i = 0; i < 40; ++i) {
    LayerCase c;
    c.group = random.between(1, 3);
    c.kv_heads = random.between(1, 3);
    c.head_dim = random.pick(std::vector<std::size_t>{4, 16, 20});
    c.window = random.between(1, 40);
    c.seed = random.bits();
    c.arrangement = random.pick(reference::all_arrangements);
    const std::size_t context = random.between(12, 140);
    c.rows = context + c.window + random.below(4);
    const std::size_t layers = random.between(1, 4);
    const std::size_t sinks = random.pick(std::vector<std::size_t>{0, 1, 4});
    const std::size_t capacity = random.between(sinks + 1, context);
    const std::size_t stretch = random.between(5, context + 3);
    SCOPED_TRACE(testing::Message() << c << " context " << context << " layers " << layers << " sinks "
                                    << sinks << " keeps " << capacity << " stretch " << stretch);
    RepeatedModel<> model(c, layers, context);
    model.weighed = true;
    RepeatedModel<> plain = model;
    const auto plan = plus_plan(model, capacity, {.sinks = sinks});
    Compressor compressor{plan};
    compressor.begin(context);
    RepeatScores64 scores = reference::no_scores(model);
    reference::repeat_all(model, compressor, stretch, sinks, c.seed, scores);
    compressor.finish(model.views());
    const auto [lowest, highest] = lowest_and_highest(model, compressor, scores, sinks, 1);
    ASSERT_FALSE(reference::surely_above(highest, lowest)) << highest << " went, " << lowest << " stayed";

    const Plan of_kvzip{model.shape, score::KvZip{{.sinks = sinks}}, select::WholeModel{},
                        budget::Uniform{Budget::tokens_per_layer(capacity)}};
    Compressor kvzip{of_kvzip};
    kvzip.begin(context);
    RepeatScores64 unused = reference::no_scores(plain);
    reference::repeat_all(plain, kvzip, stretch, sinks, c.seed, unused);
    kvzip.finish(plain.views());
    unlike_kvzip += reference::positions_of(kvzip, plain) != reference::positions_of(compressor, model);
  }
  EXPECT_GT(unlike_kvzip, 20U) << "the weights count";
}

/// Scores far below the steps of plain half floats are told apart, and those above them are no error.
TEST(KvZipPlus, SmallAndLargeOutputsKeepTheirOrder) {
  const LayerCase c{.group = 2, .kv_heads = 2, .head_dim = 16, .rows = 90 + 40, .window = 40, .seed = 8};
  for (const float factor : {2e-4F, 1e3F}) {
    RepeatedModel<> model(c, 2, 90);
    model.weighed = true;
    for (auto& layer : model.outputs) {
      for (float& weight : layer) {
        weight *= factor;
      }
    }
    const auto plan = plus_plan(model, 30);
    Compressor compressor{plan};
    compressor.begin(90);
    RepeatScores64 scores = reference::no_scores(model);
    reference::repeat_all(model, compressor, 90, 4, 1, scores);
    compressor.finish(model.views());
    const auto [lowest, highest] = lowest_and_highest(model, compressor, scores, 4, 1);
    // Beyond 16 all count the same.
    EXPECT_LE(std::min(highest, 15.99), lowest * (1.0 + 2e-3)) << "factor " << factor;
  }
}

TEST(KvZipPlus, PartsOfARepeatThreadsAndLayoutsChangeNoBit) {
  reference::expect_same_rows_however_shown([](const auto& model) { return plus_plan(model, 30); });
}

TEST(KvZipPlus, ALayerMayHaveABudgetOfItsOwn) {
  const LayerCase c{.group = 2, .kv_heads = 2, .head_dim = 16, .rows = 60 + 20, .window = 20, .seed = 9};
  RepeatedModel<> model(c, 2, 60);
  const Plan plan{model.shape, score::KvZipPlus{model.output_weights()}, select::GroupedTopK{},
                  budget::Uniform{Budget::tokens_per_layer(7)}};
  Compressor compressor{plan};
  compressor.begin(60);
  RepeatScores64 scores = reference::no_scores(model);
  reference::repeat_all(model, compressor, 60, 4, 5, scores);
  compressor.finish(model.views());
  for (std::size_t l = 0; l < 2; ++l) {
    for (std::size_t head = 0; head < 2; ++head) {
      EXPECT_EQ(compressor.retained(l).rows(head), 7U);
      for (std::size_t sink = 0; sink < 4; ++sink) {
        EXPECT_TRUE(compressor.retained(l).row(sink, head).has_value()) << "above all scores";
      }
    }
  }
}

TEST(KvZipPlus, WhatIsMissingOrWrongIsNamedAndNothingChanges) {
  const LayerCase c{.group = 2, .kv_heads = 2, .head_dim = 16, .rows = 60 + 20, .window = 20, .seed = 9};
  RepeatedModel<> model(c, 2, 60);
  model.feed(4);
  const auto plan = plus_plan(model, 20);
  Compressor compressor{plan};
  compressor.begin(60);
  const auto observe = [&](std::size_t l, std::span<const float> norms) {
    compressor.observe(l, model.view(l, 20), {.first = 0, .last = 60}, model.layers[l].observation(), norms);
  };
  std::vector<float> norms = model.hidden_norms[0];
  expect_error<ArgumentError>([&] { observe(0, {}); },
                              {"layer 0 was shown no hidden_norms", "each of the 20 queries shown"});
  expect_error<ArgumentError>([&] { observe(0, std::span(norms).first(19)); },
                              {"layer 0 was shown 19 hidden_norms for 20 queries", "one a query"});
  for (const float wrong :
       {0.0F, -1.0F, std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    norms[7] = wrong;
    expect_error<ArgumentError>([&] { observe(0, norms); },
                                {"hidden_norms[7] of layer 0 is", "finite and above 0"});
  }
  auto& cache = model.layers[0].cache;
  const std::size_t place = cache.at(1, 33, 2);
  const float value = std::exchange(cache.values[place], std::numeric_limits<float>::quiet_NaN());
  expect_error<ScoreError>([&] { observe(0, model.hidden_norms[0]); },
                           {"layer 0 query head 2 token 33", "its value"});
  cache.values[place] = value;

  ModelShape other = model.shape;
  other.layers = 3;
  expect_error<ArgumentError>(
      [&] {
        Plan(other, score::KvZipPlus{model.output_weights()}, select::WholeModel{},
             budget::Uniform{Budget::tokens_per_layer(20)});
      },
      {"output weights are of 2 layers", "the model has 3"});
  expect_error<ArgumentError>([&] { score::KvZipPlus(model.output_weights(), {.window = 0}); },
                              {"window is 0"});

  // As if nothing had been tried.
  Compressor fresh{plan};
  fresh.begin(60);
  for (auto* const each : {&compressor, &fresh}) {
    for (std::size_t l = 0; l < 2; ++l) {
      each->observe(l, model.view(l, 20), {.first = 0, .last = 60}, model.layers[l].observation(),
                    model.hidden_norms[l]);
    }
  }
  RepeatedModel<> copy = model;
  compressor.finish(model.views());
  fresh.finish(copy.views());
  EXPECT_EQ(reference::positions_of(compressor, model), reference::positions_of(fresh, copy));
}

}  // namespace
}  // namespace compresskv
