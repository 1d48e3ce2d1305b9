#include "compresskv/calibrate/eviction_error_accumulator.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "message_of.hpp"

namespace {

using compresskv::ArgumentError;
using compresskv::Error;
using compresskv::LayerErrors;
using compresskv::calibrate::EvictionErrorAccumulator;
using compresskv::calibrate::EvictionRun;
using compresskv::test::message_of;

using Output = std::vector<float>;

std::vector<double> copy(std::span<const double> values) { return {values.begin(), values.end()}; }

// ||full|| is 5 throughout and epsilon is 5, so that an error is ||difference|| / 10.
TEST(EvictionErrorAccumulator, ByHand) {
  EvictionErrorAccumulator accumulator(2, {.epsilon = 5.0});
  const Output full{3.0F, 4.0F};
  accumulator.begin_run("a", 0);
  accumulator.add(0, full, Output{3.0F, 9.0F});    // 0.5
  accumulator.add(1, full, Output{0.0F, 0.0F});    // 0.5
  accumulator.add(0, full, Output{3.0F, 4.0F});    // 0
  accumulator.add(1, full, Output{-3.0F, -4.0F});  // 1
  accumulator.end_run();                           // sums 0.5 and 1.5
  accumulator.begin_run("b", 0);
  accumulator.add(1, full, Output{3.0F, 4.5F});  // 0.05
  accumulator.add(0, full, Output{6.0F, 8.0F});  // 0.5
  accumulator.end_run();
  const LayerErrors errors = accumulator.errors();
  ASSERT_EQ(errors.data_sets().size(), 2U);
  EXPECT_EQ(errors.data_sets()[0], (LayerErrors::DataSet{.name = "a", .errors = {0.25, 0.75}}));
  EXPECT_EQ(errors.data_sets()[1].name, "b");
  EXPECT_NEAR(errors.data_sets()[1].errors[0], 10.0 / 11.0, 1e-15);
  EXPECT_NEAR(errors.data_sets()[1].errors[1], 1.0 / 11.0, 1e-15);
  EXPECT_NEAR(errors.average()[0], (0.25 + 10.0 / 11.0) / 2.0, 1e-15);
  EXPECT_NEAR(errors.average()[1], (0.75 + 1.0 / 11.0) / 2.0, 1e-15);
}

// Layer 0's full output is 0, so its error is 1 / eps; layer 1's is 1 / (1 + eps).
TEST(EvictionErrorAccumulator, EpsilonIsTheReleasedCodesUnlessSaid) {
  const auto ratio = [](EvictionErrorAccumulator accumulator) {
    accumulator.begin_run("a", 0);
    accumulator.add(0, Output{0.0F}, Output{1.0F});
    accumulator.add(1, Output{1.0F}, Output{0.0F});
    accumulator.end_run();
    const LayerErrors errors = accumulator.errors();
    return errors.average()[0] / errors.average()[1];
  };
  EXPECT_NEAR(ratio(EvictionErrorAccumulator(2)), 100001.0, 1e-6);
  EXPECT_NEAR(ratio(EvictionErrorAccumulator(2, {.epsilon = 1e-6})), 1000001.0, 1e-5);
}

// Equations 8 to 12 literally, everything kept and divided at the end, in long double.
TEST(EvictionErrorAccumulator, VsTheEquations) {
  std::mt19937_64 random(12);
  const auto value = [&] { return static_cast<float>(random() % 2001) / 1000.0F - 1.0F; };
  for (int trial = 0; trial < 50; ++trial) {
    const std::size_t layers = 1 + random() % 6;
    const std::size_t width = 1 + random() % 40;
    const std::size_t sets = 1 + random() % 4;
    EvictionErrorAccumulator accumulator(layers);
    std::vector<std::vector<long double>> sums(sets, std::vector<long double>(layers, 0.0L));
    for (std::size_t set = 0; set < sets; ++set) {
      accumulator.begin_run("set " + std::to_string(set), 0);
      const std::size_t steps = 1 + random() % 5;
      for (std::size_t step = 0; step < steps; ++step) {
        for (std::size_t layer = 0; layer < layers; ++layer) {
          Output full(width);
          Output compressed(width);
          long double difference = 0.0L;
          long double norm = 0.0L;
          for (std::size_t i = 0; i < width; ++i) {
            full[i] = value();
            compressed[i] = value();
            difference += std::pow(static_cast<long double>(compressed[i]) - full[i], 2.0L);
            norm += std::pow(static_cast<long double>(full[i]), 2.0L);
          }
          sums[set][layer] += std::sqrt(difference) / (std::sqrt(norm) + 1e-5L);
          accumulator.add(layer, full, compressed);
        }
      }
      accumulator.end_run();
    }
    const LayerErrors errors = accumulator.errors();
    for (std::size_t layer = 0; layer < layers; ++layer) {
      long double mean = 0.0L;
      for (const auto& set : sums) {
        mean += set[layer] / std::accumulate(set.begin(), set.end(), 0.0L) / static_cast<long double>(sets);
      }
      EXPECT_NEAR(errors.average()[layer], static_cast<double>(mean), 1e-13) << "trial " << trial;
    }
  }
}

TEST(EvictionErrorAccumulator, PromptsOfADataSetAddUp) {
  EvictionErrorAccumulator accumulator(2, {.epsilon = 1.0});
  accumulator.begin_run("a", 3);
  accumulator.add(0, Output{1.0F}, Output{0.5F});  // 0.25
  accumulator.add(1, Output{1.0F}, Output{0.0F});  // 0.5
  accumulator.end_run();
  accumulator.begin_run("a", 1);
  for (int step = 0; step < 2; ++step) {
    accumulator.add(0, Output{3.0F}, Output{2.0F});  // 0.25
    accumulator.add(1, Output{3.0F}, Output{3.0F});
  }
  accumulator.end_run();
  EXPECT_EQ(copy(accumulator.errors().average()), (std::vector<double>{0.6, 0.4}));
  EXPECT_EQ(accumulator.step_errors(), (std::vector<double>{0.75 / 3, 0.5 / 3}));
  accumulator.begin_run("b", 0);
  accumulator.add(0, Output{0.0F}, Output{1.0F});
  accumulator.add(1, Output{0.0F}, Output{0.0F});
  accumulator.end_run();
  EXPECT_EQ(accumulator.step_errors(), (std::vector<double>{0.75 / 6 + 0.5, 0.5 / 6}));
}

TEST(EvictionErrorAccumulator, MergedProcessesAreOne) {
  const auto feed = [](EvictionErrorAccumulator& accumulator, std::size_t i) {
    std::mt19937_64 random(i);
    const auto value = [&] { return static_cast<float>(random() % 2001) / 1000.0F - 1.0F; };
    accumulator.begin_run(i % 2 == 0 ? "needles" : "text", i / 2);
    for (std::size_t step = 0; step < 1 + i % 3; ++step) {
      for (std::size_t layer = 0; layer < 3; ++layer) {
        accumulator.add(layer, Output{value(), value()}, Output{value(), value()});
      }
    }
    accumulator.end_run();
  };
  EvictionErrorAccumulator whole(3);
  std::vector<EvictionErrorAccumulator> parts(3, EvictionErrorAccumulator(3));
  for (std::size_t i = 0; i < 20; ++i) {
    feed(whole, i);
    feed(parts[i * 7 % 3], 19 - i);
  }
  EvictionErrorAccumulator merged(3);
  for (const std::size_t part : {1U, 2U, 0U}) {
    merged.merge(parts[part]);
  }
  EXPECT_EQ(merged.data_sets(), whole.data_sets());
  EXPECT_EQ(merged.errors(), whole.errors());
  EXPECT_EQ(merged.step_errors(), whole.step_errors());

  EvictionErrorAccumulator twice(3);
  feed(twice, 30);
  feed(twice, 5);
  EXPECT_EQ(message_of<ArgumentError>([&] { merged.merge(twice); }),
            "run 2 of data set 'text' is in both: a prompt is given to one process alone");
  EXPECT_EQ(merged.data_sets(), whole.data_sets());
  EXPECT_EQ(message_of<ArgumentError>([&] { merged.merge(EvictionErrorAccumulator(2)); }),
            "cannot merge errors of 2 layers into those of 3: all must be of one model");
  twice.begin_run("more", 0);
  EXPECT_EQ(message_of<ArgumentError>([&] { merged.merge(twice); }),
            "merge within a run: call end_run first");

  // What was written down comes back.
  EvictionErrorAccumulator again(3);
  for (const auto& [name, runs] : whole.data_sets()) {
    for (const auto& [number, run] : runs) {
      again.add_run(run);
    }
  }
  EXPECT_EQ(again.errors(), whole.errors());
  const auto of = [&](const EvictionRun& run) {
    return message_of<ArgumentError>([&] { again.add_run(run); });
  };
  EXPECT_EQ(of({.data_set = "text", .run = 2, .steps = 1, .errors = {1.0, 1.0, 1.0}}),
            "run 2 of data set 'text' came already: each prompt has a number of its own");
  EXPECT_EQ(of({.data_set = "text", .run = 99, .steps = 1, .errors = {1.0, 1.0}}),
            "run 99 of data set 'text' has 2 errors, must have 3: one a layer");
  EXPECT_EQ(of({.data_set = "text", .run = 99, .steps = 1, .errors = {1.0, -1.0, 1.0}}),
            "run 99 of data set 'text' has the error -1 of layer 1: errors are finite and not negative");
  EXPECT_EQ(of({.data_set = "", .run = 99, .steps = 1, .errors = {1.0, 1.0, 1.0}}),
            "a data set cannot be named '': give it a name, and not avg_score, which is the mean's");
}

TEST(EvictionErrorAccumulator, RejectsSettings) {
  EXPECT_EQ(message_of<ArgumentError>([] { EvictionErrorAccumulator(0); }),
            "eviction error accumulator needs at least one layer, got 0");
  EXPECT_EQ(message_of<ArgumentError>([] { EvictionErrorAccumulator(1, {.epsilon = 0.0}); }),
            "epsilon is 0, must be finite and above 0: leave it at 1e-5");
  EXPECT_EQ(message_of<ArgumentError>(
                [] { EvictionErrorAccumulator(1, {.epsilon = std::numeric_limits<double>::infinity()}); }),
            "epsilon is inf, must be finite and above 0: leave it at 1e-5");
}

TEST(EvictionErrorAccumulator, RejectsCallsOutOfOrder) {
  EvictionErrorAccumulator accumulator(2);
  EXPECT_EQ(message_of<ArgumentError>([&] { accumulator.add(0, Output{1.0F}, Output{1.0F}); }),
            "add outside a run: call begin_run first");
  EXPECT_EQ(message_of<ArgumentError>([&] { accumulator.end_run(); }),
            "end_run outside a run: call begin_run first");
  EXPECT_EQ(message_of<Error>([&] { accumulator.errors(); }),
            "no prompt was measured: begin_run, add, end_run first");
  EXPECT_EQ(message_of<ArgumentError>([&] { accumulator.begin_run("avg_score", 0); }),
            "a data set cannot be named 'avg_score': give it a name, and not avg_score, which is the mean's");
  accumulator.begin_run("a", 2);
  EXPECT_EQ(message_of<ArgumentError>([&] { accumulator.begin_run("b", 0); }),
            "begin_run within run 2 of data set 'a': call end_run first");
  EXPECT_EQ(message_of<ArgumentError>([&] { accumulator.errors(); }),
            "errors asked for within run 2 of data set 'a': call end_run first");
  EXPECT_EQ(message_of<ArgumentError>([&] { accumulator.end_run(); }),
            "run 2 of data set 'a' has no step of layer 0: call add for every layer at every decode step");
  accumulator.add(0, Output{1.0F}, Output{1.0F});
  EXPECT_EQ(message_of<ArgumentError>([&] { accumulator.end_run(); }),
            "run 2 of data set 'a' has 0 steps of layer 1, 1 of layer 0: call add for every layer at every "
            "decode step");
  accumulator.add(1, Output{1.0F}, Output{1.0F});
  accumulator.end_run();
  EXPECT_EQ(
      message_of<ArgumentError>([&] { accumulator.errors(); }),
      "data set 'a' has no error in any layer: compress the cache to fewer tokens than the prompts have");
  EXPECT_EQ(message_of<ArgumentError>([&] { accumulator.begin_run("a", 2); }),
            "run 2 of data set 'a' came already: each prompt has a number of its own");
  accumulator.begin_run("a", 3);
  accumulator.add(0, Output{1.0F}, Output{0.5F});
  accumulator.add(1, Output{1.0F}, Output{1.0F});
  accumulator.end_run();
  EXPECT_EQ(copy(accumulator.errors().average()), (std::vector<double>{1.0, 0.0}));
}

TEST(EvictionErrorAccumulator, RejectsOutputs) {
  EvictionErrorAccumulator accumulator(2);
  accumulator.begin_run("a", 0);
  const auto of = [&](std::size_t layer, const Output& full, const Output& compressed) {
    return message_of<ArgumentError>([&] { accumulator.add(layer, full, compressed); });
  };
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float infinity = std::numeric_limits<float>::infinity();
  EXPECT_EQ(of(2, {1.0F}, {1.0F}), "layer is 2, the model has layers 0 to 1");
  EXPECT_EQ(of(1, {1.0F, 2.0F}, {1.0F}),
            "outputs of layer 1 have 2 (full) and 1 (compressed) elements: both must have the model's width");
  EXPECT_EQ(of(1, {}, {}),
            "outputs of layer 1 have 0 (full) and 0 (compressed) elements: both must have the model's width");
  EXPECT_EQ(of(1, {1.0F, nan}, {1.0F, 1.0F}),
            "full output of layer 1 element 1 is nan: outputs must be finite");
  EXPECT_EQ(of(0, {1.0F, 1.0F}, {-infinity, 1.0F}),
            "compressed output of layer 0 element 0 is -inf: outputs must be finite");
  // The largest floats are outputs like any other.
  const float largest = std::numeric_limits<float>::max();
  accumulator.add(0, Output{largest}, Output{-largest});
  accumulator.add(1, Output{largest}, Output{0.0F});
  accumulator.end_run();
  EXPECT_NEAR(accumulator.errors().average()[0], 2.0 / 3.0, 1e-15);
}

}  // namespace
