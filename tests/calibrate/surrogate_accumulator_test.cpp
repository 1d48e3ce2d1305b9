#include "compresskv/calibrate/surrogate_accumulator.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "reference/errors.hpp"
#include "reference/hidden_states.hpp"

namespace compresskv::calibrate {
namespace {

using reference::expect_error;
using reference::Hidden;
using Rows = std::vector<std::vector<double>>;

/// `[kv_head][token]` scores whose logarithm is the surrogate's, plus noise.
template <Element T>
std::vector<float> scores_by(const Surrogate& surrogate, std::size_t layer, const Hidden<T>& hidden,
                             float noise, std::uint64_t seed) {
  reference::Random random(seed);
  std::vector<float> scores;
  for (std::size_t head = 0; head < surrogate.kv_heads(); ++head) {
    for (std::size_t t = 0; t < hidden.tokens; ++t) {
      scores.push_back(std::exp(static_cast<float>(hidden.score(surrogate, layer, head, t).score) +
                                noise * random.gaussian()));
    }
  }
  return scores;
}

/// The solution of `matrix x = right` by Gauss's elimination.
std::vector<double> solved(Rows matrix, std::vector<double> right) {
  const std::size_t size = right.size();
  for (std::size_t i = 0; i < size; ++i) {
    std::size_t pivot = i;
    for (std::size_t j = i; j < size; ++j) {
      pivot = std::abs(matrix[j][i]) > std::abs(matrix[pivot][i]) ? j : pivot;
    }
    std::swap(matrix[i], matrix[pivot]);
    std::swap(right[i], right[pivot]);
    for (std::size_t j = i + 1; j < size; ++j) {
      const double factor = matrix[j][i] / matrix[i][i];
      for (std::size_t k = i; k < size; ++k) {
        matrix[j][k] -= factor * matrix[i][k];
      }
      right[j] -= factor * right[i];
    }
  }
  for (std::size_t i = size; i-- > 0;) {
    for (std::size_t k = i + 1; k < size; ++k) {
      right[i] -= matrix[i][k] * right[k];
    }
    right[i] /= matrix[i][i];
  }
  return right;
}

TEST(SurrogateAccumulator, IsRidgeRegressionAsItIsWrittenDown) {
  constexpr std::size_t size = 7;
  const ModelShape shape{.layers = 2, .query_heads = 4, .kv_heads = 2, .head_dim = 4};
  const Surrogate truth = reference::surrogate(shape, size);
  SurrogateAccumulator accumulator(2, 2, size);
  std::vector<Rows> hidden(2);   // [layer][token][element]
  std::vector<Rows> targets(2);  // [layer][token][KV head]
  for (const std::size_t tokens : {1U, 30U, 9U}) {
    for (std::size_t layer = 0; layer < 2; ++layer) {
      const Hidden<float> some(tokens, size, layer, 10 * tokens + layer);
      const std::vector<float> scores = scores_by(truth, layer, some, 0.5F, tokens);
      accumulator.add(layer, some.shown(), scores);
      for (std::size_t t = 0; t < tokens; ++t) {
        hidden[layer].emplace_back();
        for (std::size_t e = 0; e < size; ++e) {
          hidden[layer].back().push_back(static_cast<double>(some.states[t * some.stride + e]));
        }
        targets[layer].push_back({std::log(std::max(static_cast<double>(scores[t]), 0x1p-36)),
                                  std::log(std::max(static_cast<double>(scores[tokens + t]), 0x1p-36))});
      }
    }
  }
  constexpr double ridge = 0.03;
  const Surrogate found = accumulator.surrogate(ridge);
  const std::vector<double> explained = accumulator.explained(found);
  for (std::size_t layer = 0; layer < 2; ++layer) {
    EXPECT_EQ(accumulator.count(layer), 40U);
    const auto n = static_cast<double>(hidden[layer].size());
    std::vector<double> mean(size, 0.0);
    for (const auto& row : hidden[layer]) {
      for (std::size_t e = 0; e < size; ++e) {
        mean[e] += row[e] / n;
      }
    }
    Rows matrix(size, std::vector<double>(size, 0.0));
    double spread = 0.0;
    for (const auto& row : hidden[layer]) {
      for (std::size_t i = 0; i < size; ++i) {
        for (std::size_t j = 0; j < size; ++j) {
          matrix[i][j] += (row[i] - mean[i]) * (row[j] - mean[j]);
        }
        spread += (row[i] - mean[i]) * (row[i] - mean[i]) / static_cast<double>(size);
      }
    }
    for (std::size_t i = 0; i < size; ++i) {
      matrix[i][i] += ridge * spread;
    }
    double missed = 0.0;
    double all = 0.0;
    for (std::size_t head = 0; head < 2; ++head) {
      double target_mean = 0.0;
      for (const auto& row : targets[layer]) {
        target_mean += row[head] / n;
      }
      std::vector<double> right(size, 0.0);
      for (std::size_t t = 0; t < hidden[layer].size(); ++t) {
        for (std::size_t e = 0; e < size; ++e) {
          right[e] += (hidden[layer][t][e] - mean[e]) * (targets[layer][t][head] - target_mean);
        }
      }
      const std::vector<double> weights = solved(matrix, right);
      double bias = target_mean;
      for (std::size_t e = 0; e < size; ++e) {
        bias -= weights[e] * mean[e];
        EXPECT_NEAR(static_cast<double>(found.weights(layer, head)[e]), weights[e], 1e-6);
      }
      EXPECT_NEAR(static_cast<double>(found.bias(layer, head)), bias, 1e-6);
      for (std::size_t t = 0; t < hidden[layer].size(); ++t) {
        double foretold = bias;
        for (std::size_t e = 0; e < size; ++e) {
          foretold += weights[e] * hidden[layer][t][e];
        }
        missed += (targets[layer][t][head] - foretold) * (targets[layer][t][head] - foretold);
        all += (targets[layer][t][head] - target_mean) * (targets[layer][t][head] - target_mean);
      }
    }
    EXPECT_NEAR(explained[layer], 1.0 - missed / all, 1e-5);
  }
}

TEST(SurrogateAccumulator, FindsTheMapThatMadeTheScores) {
  constexpr std::size_t size = 20;
  std::vector<float> weights;
  reference::Random random(4);
  for (std::size_t i = 0; i < 3 * size; ++i) {
    weights.push_back(0.3F * random.gaussian());
  }
  const Surrogate truth(1, 3, size, weights, {-3.0F, -4.0F, -5.0F});
  SurrogateAccumulator fed(1, 3, size);
  SurrogateAccumulator apart(1, 3, size);
  const Hidden<float> near(500, size, 2, 2);
  fed.add(0, near.shown(), scores_by(truth, 0, near, 0.0F, 1));
  const Surrogate found = fed.surrogate(1e-9);
  for (std::size_t head = 0; head < 3; ++head) {
    for (std::size_t e = 0; e < size; ++e) {
      EXPECT_NEAR(found.weights(0, head)[e], truth.weights(0, head)[e], 1e-4F);
    }
    EXPECT_NEAR(found.bias(0, head), truth.bias(0, head), 1e-3F);
  }
  const Hidden<float> held_out(300, size, 0, 3);
  apart.add(0, held_out.shown(), scores_by(truth, 0, held_out, 0.0F, 1));
  EXPECT_NEAR(apart.explained(found)[0], 1.0, 1e-6);
  SurrogateAccumulator noisy(1, 3, size);
  noisy.add(0, held_out.shown(), scores_by(truth, 0, held_out, 1.0F, 1));
  EXPECT_LT(noisy.explained(found)[0], 0.9);
  EXPECT_GT(noisy.explained(found)[0], 0.3);
  EXPECT_LT(noisy.explained(Surrogate(1, 3, size, std::vector<float>(3 * size), {9.0F, 9.0F, 9.0F}))[0], 0.0);

  // Of numbers around 100 as much is told.
  SurrogateAccumulator shifted(1, 3, size);
  Hidden<float> moved = near;
  for (std::size_t t = 0; t < moved.tokens; ++t) {
    for (std::size_t e = 0; e < size; ++e) {
      moved.states[t * moved.stride + e] += 100.0F;
    }
  }
  shifted.add(0, moved.shown(), scores_by(truth, 0, near, 0.0F, 1));
  const Surrogate of_shifted = shifted.surrogate(1e-9);
  for (std::size_t e = 0; e < size; ++e) {
    EXPECT_NEAR(of_shifted.weights(0, 1)[e], truth.weights(0, 1)[e], 1e-3F);
  }
}

TEST(SurrogateAccumulator, MergesPartsAndTakesAnyElements) {
  constexpr std::size_t size = 9;
  const ModelShape shape{.layers = 1, .query_heads = 2, .kv_heads = 2, .head_dim = 4};
  const Surrogate truth = reference::surrogate(shape, size);
  SurrogateAccumulator whole(1, 2, size);
  SurrogateAccumulator merged(1, 2, size);
  SurrogateAccumulator again(1, 2, size);
  for (std::uint64_t part = 0; part < 3; ++part) {
    const Hidden<half> hidden(20 + 5 * part, size, 1, part);
    const std::vector<float> scores = scores_by(truth, 0, hidden, 0.3F, part);
    whole.add(0, hidden.shown(), scores);
    SurrogateAccumulator own(1, 2, size);
    own.add(0, hidden.shown(), scores);
    merged.merge(own);
    again.merge(own);
  }
  EXPECT_EQ(merged.count(0), 75U);
  EXPECT_EQ(merged.surrogate(), again.surrogate()) << "bit for bit";
  merged.merge(SurrogateAccumulator(1, 2, size));
  EXPECT_EQ(merged.surrogate(), whole.surrogate()) << "a text is joined as a part";
}

TEST(SurrogateAccumulator, WhatNeverVariesIsTheBias) {
  SurrogateAccumulator accumulator(1, 1, 3);
  const std::vector<float> states(5 * 3, 2.0F);
  accumulator.add(0, HiddenStates<float>(states.data(), {.tokens = 5, .hidden_size = 3}),
                  std::vector<float>(5, 0.0F));
  const Surrogate found = accumulator.surrogate();
  EXPECT_EQ(found.weights(0, 0)[1], 0.0F);
  EXPECT_NEAR(found.bias(0, 0), std::log(0x1p-36F), 1e-4F) << "the least score";
  EXPECT_EQ(accumulator.explained(found)[0], 0.0);
}

TEST(SurrogateAccumulator, RefusesWhatItCannotTake) {
  expect_error<ArgumentError>([] { SurrogateAccumulator(0, 1, 1); },
                              {"got 0 layers of 1 KV heads of 1 elements"});
  expect_error<ArgumentError>([] { SurrogateAccumulator(30, 3, std::size_t{1} << 40U); },
                              {"do not fit in memory"});
  SurrogateAccumulator accumulator(2, 2, 3);
  std::vector<float> states(4 * 3, 1.0F);
  std::vector<float> scores(4 * 2, 0.5F);
  const auto add = [&](std::size_t layer, std::size_t hidden_size, std::size_t count) {
    accumulator.add(layer, HiddenStates<float>(states.data(), {.tokens = 3, .hidden_size = hidden_size}),
                    std::span(scores).first(count));
  };
  expect_error<ArgumentError>([&] { add(2, 3, 6); }, {"layer is 2, the surrogate has layers 0 to 1"});
  expect_error<ArgumentError>([&] { add(0, 4, 6); },
                              {"hidden states have 4 elements, the surrogate's have 3"});
  expect_error<ArgumentError>([&] { add(0, 3, 5); },
                              {"layer 0 gives 5 scores for 3 tokens of 2 KV heads, must be 6"});
  scores[4] = -0.5F;
  expect_error<ArgumentError>([&] { add(0, 3, 6); }, {"score of layer 0 KV head 1 token 1 is -0.5"});
  scores[4] = std::numeric_limits<float>::infinity();
  expect_error<ArgumentError>([&] { add(0, 3, 6); }, {"KV head 1 token 1 is inf"});
  scores[4] = 0.5F;
  states[7] = std::numeric_limits<float>::quiet_NaN();
  expect_error<ArgumentError>([&] { add(0, 3, 6); },
                              {"hidden state of layer 0 token 2 has nan as element 1"});
  EXPECT_EQ(accumulator.count(0), 0U);
  states[7] = 1.0F;
  add(0, 3, 6);
  expect_error<ArgumentError>([&] { static_cast<void>(accumulator.surrogate()); },
                              {"layer 1 was fed no token"});
  add(1, 3, 6);
  expect_error<ArgumentError>([&] { static_cast<void>(accumulator.surrogate(0.0)); }, {"ridge is 0"});
  expect_error<ArgumentError>(
      [&] { accumulator.merge(SurrogateAccumulator(2, 2, 4)); },
      {"of 2 layers of 2 KV heads of 4 elements into one of 2 layers of 2 KV heads of 3"});
  expect_error<ArgumentError>(
      [&] {
        static_cast<void>(
            accumulator.explained(Surrogate(2, 2, 4, std::vector<float>(16), std::vector<float>(4))));
      },
      {"surrogate is of 4 elements, what was fed has 3"});
}

}  // namespace
}  // namespace compresskv::calibrate
