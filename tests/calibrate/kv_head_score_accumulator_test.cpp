// Numbers of KV heads by repeats of a text, held against attention in double.

#include <gtest/gtest.h>

#include <algorithm>
#include <compresskv/calibrate/kv_head_score_accumulator.hpp>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <string_view>
#include <vector>

#include "reference/errors.hpp"
#include "reference/layer_case.hpp"
#include "reference/random.hpp"
#include "reference/repeats.hpp"

namespace compresskv {
namespace {

using calibrate::KvHeadScoreAccumulator;
using reference::expect_error;
using reference::Layer;
using reference::LayerCase;
using reference::Random;

/// The layers of a model with a text in their caches and, behind it, tokens that repeat a stretch of it: as
/// many as the case's window has queries, and some that ask to.
std::vector<Layer<float>> repeated_text(const LayerCase& c, std::size_t layers, std::uint64_t seed) {
  std::vector<Layer<float>> model;
  for (std::size_t l = 0; l < layers; ++l) {
    LayerCase own = c;
    own.seed = seed + l;
    own.capacity = c.window;
    model.emplace_back(own);
  }
  return model;
}

TEST(KvHeadScoreAccumulator, IsTheReferenceOverGeneratedTexts) {
  Random random(1);
  for (int i = 0; i < 25; ++i) {
    LayerCase c{.group = random.between(1, 3), .kv_heads = random.between(1, 3), .head_dim = 16};
    c.window = random.between(1, 9);
    const std::size_t layers = random.between(1, 3);
    const std::size_t sinks = random.pick(std::vector<std::size_t>{0, 1, 4});
    const std::size_t texts = random.between(1, 3);
    KvHeadScoreAccumulator accumulator(
        {.layers = layers, .query_heads = c.query_heads(), .kv_heads = c.kv_heads, .head_dim = c.head_dim},
        sinks);
    std::vector<std::vector<double>> expected(layers * c.kv_heads);
    for (std::size_t text = 0; text < texts; ++text) {
      const std::size_t tokens = random.between(sinks + 1, 60);
      const std::size_t at_once = random.between(1, 60);
      c.rows = tokens + c.window + random.below(5);
      SCOPED_TRACE(testing::Message()
                   << c << " tokens " << tokens << " at once " << at_once << " sinks " << sinks);
      accumulator.begin_text(tokens);
      for (std::vector<double>& numbers : expected) {
        numbers.push_back(0.0);
      }
      for (std::size_t first = 0; first < tokens; first += at_once) {
        const Stretch stretch{.first = first, .last = std::min(first + at_once, tokens)};
        std::vector<Layer<float>> model = repeated_text(c, layers, random.bits());
        for (std::size_t l = 0; l < layers; ++l) {
          accumulator.observe(l, model[l].cache.view(), stretch, model[l].observation());
          for (std::size_t head = 0; head < c.kv_heads; ++head) {
            const auto found = reference::repeat_scores(
                [&](std::size_t row, std::size_t dim) { return model[l].key(head, row, dim); },
                [&](std::size_t query_head, std::size_t q, std::size_t dim) {
                  return model[l].query(head * c.group + query_head, q, dim);
                },
                [](std::size_t row) { return row; }, c.group, tokens, c.rows, c.window, c.head_dim,
                model[l].scale(), stretch, sinks, [](std::size_t, std::size_t, std::size_t) { return 1.0; });
            double& number = expected[l * c.kv_heads + head].back();
            for (std::size_t t = sinks; t < tokens; ++t) {
              number = std::max(number, found[t]);
            }
          }
        }
      }
    }
    const HeadScores scores = accumulator.scores();
    ASSERT_EQ(scores.layers(), layers);
    ASSERT_EQ(scores.heads(), c.kv_heads);
    for (std::size_t l = 0; l < layers; ++l) {
      for (std::size_t head = 0; head < c.kv_heads; ++head) {
        for (std::size_t text = 0; text < texts; ++text) {
          EXPECT_NEAR(scores.runs(l, head)[text], expected[l * c.kv_heads + head][text], 1e-5)
              << "layer " << l << " KV head " << head << " text " << text;
        }
      }
    }
  }
}

TEST(KvHeadScoreAccumulator, RefusesWhatDoesNotFitAndTakesNothing) {
  const LayerCase c{.group = 2, .kv_heads = 2, .rows = 40, .window = 8};
  const ModelShape shape{.layers = 2, .query_heads = 4, .kv_heads = 2, .head_dim = 8};
  std::vector<Layer<float>> model = repeated_text(c, 2, 3);
  KvHeadScoreAccumulator accumulator(shape);
  const auto refused = [](auto&& call, std::initializer_list<std::string_view> parts) {
    expect_error<ArgumentError>(call, parts);
  };
  const auto observe = [&](std::size_t layer, Stretch stretch) {
    accumulator.observe(layer, model[0].cache.view(), stretch, model[0].observation());
  };
  expect_error<Error>([] { KvHeadScoreAccumulator{ModelShape{}}; }, {"layers"});
  refused([&] { observe(0, {.first = 0, .last = 5}); }, {"begin_text() was not called"});
  refused([&] { accumulator.scores(); }, {"no text was begun"});
  refused([&] { accumulator.begin_text(4); }, {"tokens is 4, the first 4 count for no head", "longer text"});
  accumulator.begin_text(30);
  refused([&] { observe(2, {.first = 0, .last = 5}); }, {"layer is 2", "layers 0 to 1"});
  refused([&] { observe(0, {.first = 5, .last = 5}); }, {"stretch is 5 to 5", "the text's 30"});
  refused([&] { observe(0, {.first = 0, .last = 31}); }, {"stretch is 0 to 31", "the text's 30"});
  refused([&] { observe(0, {.first = 3, .last = 30}); },
          {"layer 0 begins at token 3, tokens from 0", "without gaps"});
  refused([&] { accumulator.begin_text(33); }, {"layer 0 was shown repeats of 0 tokens, the text has 30"});
}

TEST(KvHeadScoreAccumulator, SaysWhatRowsAndNumbersAreWrong) {
  const LayerCase c{.group = 2, .kv_heads = 2, .rows = 40, .window = 8};
  std::vector<Layer<float>> model = repeated_text(c, 1, 3);
  KvHeadScoreAccumulator accumulator({.layers = 1, .query_heads = 4, .kv_heads = 2, .head_dim = 8});
  accumulator.begin_text(33);
  const auto observe = [&](Stretch stretch) {
    accumulator.observe(0, model[0].cache.view(), stretch, model[0].observation());
  };
  expect_error<ArgumentError>([&] { observe({.first = 0, .last = 33}); },
                              {"layer 0 KV head 0 has 40 rows", "the 33 of the text", "8 queries shown"});
  KvHeadScoreAccumulator fits({.layers = 1, .query_heads = 4, .kv_heads = 2, .head_dim = 8});
  fits.begin_text(32);
  model[0].cache.keys[model[0].cache.at(1, 20, 3)] = std::numeric_limits<float>::quiet_NaN();
  expect_error<ScoreError>(
      [&] { fits.observe(0, model[0].cache.view(), {.first = 0, .last = 32}, model[0].observation()); },
      {"layer 0"});
  expect_error<ArgumentError>([&] { fits.scores(); }, {"was shown repeats of 0 tokens, the text has 32"});
  model[0].cache.keys[model[0].cache.at(1, 20, 3)] = 1.0F;
  fits.observe(0, model[0].cache.view(), {.first = 0, .last = 32}, model[0].observation());
  EXPECT_GT(fits.scores().mean(0, 1), 0.0);
}

}  // namespace
}  // namespace compresskv
