#include <gtest/gtest.h>

#include <algorithm>
#include <compresskv/compresskv.hpp>
#include <cstdint>
#include <limits>
#include <vector>

#include "reference/errors.hpp"
#include "reference/executors.hpp"
#include "reference/hidden_states.hpp"
#include "reference/layer_case.hpp"

namespace compresskv {
namespace {

using reference::expect_error;
using reference::Hidden;
using reference::Layer;
using reference::LayerCase;

const budget::Uniform no_bound{Budget::kept_ratio(1.0)};

/// Scores of a whole layer beside the sum that is written down.
template <Element T>
void expect_reference(const LayerCase& c, std::size_t hidden_size, std::size_t gap) {
  Layer<float> layer(c);
  const Hidden<T> hidden(c.rows, hidden_size, gap, c.seed);
  const Surrogate surrogate = reference::surrogate(layer.shape, hidden_size, c.seed);
  const std::size_t sinks = c.seed % 3;
  const Plan plan{layer.shape, score::KvZap{surrogate, {.window = c.window, .sinks = sinks}},
                  select::Threshold{-4.0F}, no_bound};
  Compressor compressor{plan};
  compressor.begin(c.rows);
  const auto scores = compressor.score(0, layer.cache.view(), hidden.shown());
  ASSERT_EQ(scores.rows(), c.kv_heads);
  for (std::size_t head = 0; head < c.kv_heads; ++head) {
    ASSERT_EQ(scores.tokens(head), c.rows - c.observed());
    for (std::size_t t = 0; t < scores.tokens(head); ++t) {
      if (t < sinks) {
        ASSERT_GT(scores.row(head)[t], 1e38F);
        continue;
      }
      const auto expected = hidden.score(surrogate, 0, head, t);
      ASSERT_NEAR(static_cast<double>(scores.row(head)[t]), expected.score,
                  expected.mass * static_cast<double>(hidden_size) * 1e-7)
          << "KV head " << head << " token " << t;
    }
  }
}

TEST(KvZap, IsTheReferenceOverGeneratedLayers) {
  for (const LayerCase& c : reference::layer_cases(24, 61)) {
    SCOPED_TRACE(c);
    const std::size_t hidden_size = 1 + c.seed % 67;
    expect_reference<float>(c, hidden_size, c.seed % 3);
    expect_reference<half>(c, hidden_size, c.seed % 2);
    expect_reference<bfloat16>(c, hidden_size, 0);
  }
  // Whole steps, which are multiplied in place; more tokens than tiles at a time.
  const LayerCase large{.kv_heads = 3, .head_dim = 4, .rows = 3000, .window = 128, .capacity = 128};
  expect_reference<float>(large, 64, 0);
  expect_reference<half>(large, 64, 32);
  expect_reference<bfloat16>(large, 64, 0);
}

TEST(KvZap, ThreadsElementsAndPartsOfAWholeChangeNoBit) {
  const LayerCase c{.kv_heads = 3, .head_dim = 4, .rows = 2700, .window = 128, .capacity = 128};
  Layer<float> layer(c);
  const Hidden<half> hidden(c.rows, 40, 0, 5);
  Hidden<float> same(c.rows, 40, 3, 5);
  for (std::size_t t = 0; t < c.rows; ++t) {
    for (std::size_t e = 0; e < 40; ++e) {
      same.states[t * same.stride + e] = to_float(hidden.states[t * hidden.stride + e]);
    }
  }
  const Plan plan{layer.shape, score::KvZap{reference::surrogate(layer.shape, 40)}, select::Threshold{-4.0F},
                  no_bound};
  Compressor serial{plan};
  Compressor threaded{plan, reference::ThreadExecutor{}};
  Compressor reversed{plan, reference::ReverseExecutor{}};
  serial.begin(c.rows);
  threaded.begin(c.rows);
  reversed.begin(c.rows);
  const auto expected = serial.score(0, layer.cache.view(), hidden.shown());
  const std::vector<float> values(expected.values().begin(), expected.values().end());
  const auto by_threads = threaded.score(0, layer.cache.view(), same.shown());
  EXPECT_TRUE(
      std::equal(values.begin(), values.end(), by_threads.values().begin(), by_threads.values().end()));
  const auto in_reverse = reversed.score(0, layer.cache.view(), hidden.shown());
  EXPECT_TRUE(
      std::equal(values.begin(), values.end(), in_reverse.values().begin(), in_reverse.values().end()));
}

/// A sequence that is read in turns, and what stays of it by the rule: a token is judged once, when it has
/// left the window.
TEST(KvZap, JudgesEachTokenOnceOverTurns) {
  constexpr std::size_t window = 16;
  constexpr float threshold = -4.0F;
  const std::vector<std::size_t> ends{10, 120, 121, 300};
  const LayerCase c{
      .group = 2, .kv_heads = 3, .head_dim = 4, .rows = 300, .window = window, .capacity = window};
  Layer<float> layer(c);
  const Hidden<float> hidden(300, 24, 1, 8);
  const Surrogate surrogate = reference::surrogate(layer.shape, 24);
  const Plan plan{layer.shape, score::KvZap{surrogate, {.window = window}}, select::Threshold{threshold},
                  no_bound};
  Compressor compressor{plan};
  std::vector<std::size_t> rows(3, 0);
  std::size_t seen = 0;
  for (const std::size_t end : ends) {
    if (seen == 0) {
      compressor.begin(end);
    } else {
      compressor.begin_turn(end);
    }
    for (std::size_t& of_head : rows) {
      of_head += end - seen;
    }
    KvShape now = layer.cache.shape;
    now.head_rows = rows;
    const StridedKv<float> kv(layer.cache.keys.data(), layer.cache.values.data(), now, layer.cache.strides);
    const std::size_t first = seen < window ? 0 : seen - window;
    if (first > 0) {
      expect_error<ArgumentError>(
          [&] { compressor.compress(0, kv, hidden.shown(first + 1, end)); },
          {"hidden states of layer 0 are of", "expected the last", "the window before them"});
    }
    const Retained& kept = compressor.compress(0, kv, hidden.shown(first, end));
    for (std::size_t head = 0; head < 3; ++head) {
      std::vector<std::uint32_t> expected;
      for (std::uint32_t t = 0; t < end; ++t) {
        if (t < 4 || t + window >= end ||
            hidden.score(surrogate, 0, head, t).score >= static_cast<double>(threshold)) {
          expected.push_back(t);
        }
      }
      const auto& found = kept.positions(head);
      EXPECT_TRUE(std::equal(expected.begin(), expected.end(), found.begin(), found.end())) << "of " << end;
      rows[head] = kept.rows(head);
    }
    seen = end;
  }
  EXPECT_LT(rows[0], 250U);
  EXPECT_GT(rows[0], 60U);
}

TEST(KvZap, ACapacityWantsAllHiddenStatesAgain) {
  const LayerCase c{.kv_heads = 2, .head_dim = 4, .rows = 100, .window = 8, .capacity = 20};
  Layer<float> layer(c);
  const Hidden<float> hidden(100, 12, 0, 3);
  const Surrogate surrogate = reference::surrogate(layer.shape, 12);
  const Plan plan{layer.shape, score::KvZap{surrogate, {.window = 8, .sinks = 0}}, select::GroupedTopK{},
                  budget::Uniform{Budget::tokens_per_layer(20)}};
  Compressor compressor{plan};
  compressor.begin(60);
  std::vector<std::size_t> rows(2, 60);
  const auto view = [&] {
    KvShape now = layer.cache.shape;
    now.head_rows = rows;
    return StridedKv<float>(layer.cache.keys.data(), layer.cache.values.data(), now, layer.cache.strides);
  };
  compressor.compress(0, view(), hidden.shown(0, 60));
  compressor.begin_turn(100);
  rows = {60, 60};
  expect_error<ArgumentError>([&] { compressor.compress(0, view(), hidden.shown(52, 100)); },
                              {"are of 48 tokens, expected the last 100 of 100", "select::Threshold"});
  const Retained& kept = compressor.compress(0, view(), hidden.shown());
  EXPECT_EQ(kept.rows(), 20U);
  for (std::size_t head = 0; head < 2; ++head) {
    // The best of the first turn, and then of these and the new ones.
    std::vector<float> scores;
    for (std::size_t t = 0; t < 100; ++t) {
      scores.push_back(static_cast<float>(hidden.score(surrogate, 0, head, t).score));
    }
    std::vector<std::uint32_t> held =
        reference::top_k(std::vector<float>(scores.begin(), scores.begin() + 52), 12);
    for (std::uint32_t t = 52; t < 92; ++t) {
      held.push_back(t);
    }
    std::vector<float> of_held;
    for (const std::uint32_t t : held) {
      of_held.push_back(scores[t]);
    }
    std::vector<std::uint32_t> expected;
    for (const std::uint32_t row : reference::top_k(of_held, 12)) {
      expected.push_back(held[row]);
    }
    for (std::uint32_t t = 92; t < 100; ++t) {
      expected.push_back(t);
    }
    const auto& found = kept.positions(head);
    EXPECT_TRUE(std::equal(expected.begin(), expected.end(), found.begin(), found.end()));
  }
}

TEST(KvZap, ProtectedTokensStayBelowTheThreshold) {
  const LayerCase c{.kv_heads = 2, .head_dim = 4, .rows = 40, .window = 4, .capacity = 8};
  Layer<float> layer(c);
  const Hidden<float> hidden(40, 12, 0, 3);
  const Plan plan{layer.shape, score::KvZap{reference::surrogate(layer.shape, 12), {.window = 4, .sinks = 1}},
                  select::Threshold{1e6F}, no_bound};
  Compressor compressor{plan};
  compressor.begin(40, {.keep_first = 2});
  const Retained& kept = compressor.compress(0, layer.cache.view(), hidden.shown());
  const std::vector<std::uint32_t> expected{0, 1, 36, 37, 38, 39};
  EXPECT_TRUE(
      std::equal(expected.begin(), expected.end(), kept.positions(0).begin(), kept.positions(0).end()));
}

TEST(KvZap, NamesTheHiddenStateThatIsNotFinite) {
  const LayerCase c{.kv_heads = 2, .head_dim = 4, .rows = 40, .window = 4, .capacity = 8};
  Layer<float> layer(c);
  const auto before = layer.cache;
  const Plan plan{layer.shape, score::KvZap{reference::surrogate(layer.shape, 12), {.window = 4}},
                  select::Threshold{-4.0F}, no_bound};
  Compressor compressor{plan};
  compressor.begin(40);
  for (const float poison :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    Hidden<float> hidden(40, 12, 0, 3);
    hidden.states[17 * 12 + 5] = poison;
    expect_error<ScoreError>([&] { compressor.compress(0, layer.cache.view(), hidden.shown()); },
                             {"score of layer 0 row 0 token 17 is "});
    EXPECT_EQ(layer.cache, before);
  }
}

TEST(KvZap, RefusesWhatItCannotUse) {
  const LayerCase c{.kv_heads = 2, .head_dim = 4, .rows = 40, .window = 4, .capacity = 8};
  Layer<float> layer(c);
  const auto before = layer.cache;
  const Surrogate surrogate = reference::surrogate(layer.shape, 12);
  expect_error<ArgumentError>([&] { score::KvZap(surrogate, {.window = 0}); }, {"window is 0"});
  const ModelShape other{.layers = 1, .query_heads = 3, .kv_heads = 3, .head_dim = 4};
  expect_error<ArgumentError>(
      [&] { Plan(other, score::KvZap{surrogate}, select::Threshold{0.0F}, no_bound); },
      {"surrogate is of 1 layers of 2 KV heads, the model has 1 of 3", "calibrated for this model"});
  const Plan plan{layer.shape, score::KvZap{surrogate, {.window = 4}}, select::Threshold{-4.0F}, no_bound};
  Compressor compressor{plan};
  compressor.begin(40);
  const auto compress = [&](const HiddenStates<float>& shown) {
    return [&compressor, &layer, shown] { compressor.compress(0, layer.cache.view(), shown); };
  };
  const Hidden<float> hidden(41, 12, 0, 3);
  expect_error<ArgumentError>(compress(hidden.shown(1, 40)),
                              {"are of 39 tokens, expected the last 40 of 40: show those of all tokens"});
  expect_error<ArgumentError>(compress(hidden.shown(0, 41)), {"are of 41 tokens, the sequence has 40"});
  expect_error<ArgumentError>(compress(Hidden<float>(40, 13, 0, 3).shown()),
                              {"hidden states have 13 elements, the surrogate's have 12"});
  EXPECT_EQ(layer.cache, before);
  EXPECT_EQ(compressor.retained(0).rows(), 40U);
}

}  // namespace
}  // namespace compresskv
