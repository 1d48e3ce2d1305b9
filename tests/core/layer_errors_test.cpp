#include "compresskv/core/layer_errors.hpp"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "message_of.hpp"

namespace {

using compresskv::ArgumentError;
using compresskv::LayerErrors;
using compresskv::test::message_of;

std::vector<double> copy(std::span<const double> values) { return {values.begin(), values.end()}; }

TEST(LayerErrors, EachDataSetWeighsTheSame) {
  // The second data set's errors are a hundred times larger; normalised they are (0.75, 0.25).
  const LayerErrors errors({{.name = "a", .errors = {1.0, 3.0}}, {.name = "b", .errors = {300.0, 100.0}}});
  ASSERT_EQ(errors.layers(), 2U);
  EXPECT_EQ(copy(errors.average()), (std::vector<double>{0.5, 0.5}));
  EXPECT_EQ(errors.data_sets()[0].errors, (std::vector<double>{0.25, 0.75}));
  EXPECT_EQ(errors.data_sets()[1].errors, (std::vector<double>{0.75, 0.25}));
}

TEST(LayerErrors, AGivenAverageIsOnlyNormalised) {
  const LayerErrors errors({6.0, 2.0}, {{.name = "a", .errors = {1.0, 3.0}}});
  EXPECT_EQ(copy(errors.average()), (std::vector<double>{0.75, 0.25}));
  EXPECT_EQ(errors.data_sets()[0].errors, (std::vector<double>{0.25, 0.75}));
}

TEST(LayerErrors, NormalisingAgainChangesNothing) {
  std::mt19937_64 random(8);
  for (int trial = 0; trial < 500; ++trial) {
    std::vector<double> raw(1 + random() % 128);
    for (double& error : raw) {
      error = std::ldexp(static_cast<double>(1 + random() % 1000000), static_cast<int>(random() % 40));
    }
    const LayerErrors once(raw, {});
    EXPECT_NEAR(std::accumulate(once.average().begin(), once.average().end(), 0.0), 1.0, 1e-12);
    EXPECT_EQ(LayerErrors(copy(once.average()), {}), once) << "trial " << trial;
  }
}

TEST(LayerErrors, RejectsWhatIsNoError) {
  using Sets = std::vector<LayerErrors::DataSet>;
  const auto of = [](Sets sets) { return message_of<ArgumentError>([&] { LayerErrors{sets}; }); };
  EXPECT_EQ(of({}), "layer errors have no data set: give at least one");
  EXPECT_EQ(of({{.name = "a", .errors = {}}}), "layer errors of 'a' are empty: give one error a layer");
  EXPECT_EQ(of({{.name = "a", .errors = {1.0, 2.0}}, {.name = "b", .errors = {1.0}}}),
            "layer errors of data set 'b' have 1 layers, those of 'a' have 2: all must be of one model");
  EXPECT_EQ(of({{.name = "a", .errors = {1.0, -2.0}}}),
            "layer error of 'a' layer 1 is -2: errors are finite and not negative");
  EXPECT_EQ(of({{.name = "a", .errors = {std::numeric_limits<double>::quiet_NaN()}}}),
            "layer error of 'a' layer 0 is nan: errors are finite and not negative");
  EXPECT_EQ(of({{.name = "a", .errors = {0.0, 0.0}}}),
            "layer errors of 'a' sum to 0: at least one layer must have an error above 0");
  EXPECT_EQ(message_of<ArgumentError>([] {
              LayerErrors({1.0, 2.0}, {{.name = "b", .errors = {1.0}}});
            }),
            "layer errors of data set 'b' have 1 layers, avg_score has 2: all must be of one model");
}

/// Shares are those of the errors, however large or small these are.
TEST(LayerErrors, SharesOfTheLargestAndTheSmallestNumbers) {
  const double largest = std::numeric_limits<double>::max();
  const LayerErrors huge({{.name = "a", .errors = {largest, largest, 0.0, largest, largest}}});
  EXPECT_EQ(copy(huge.average()), (std::vector<double>{0.25, 0.25, 0.0, 0.25, 0.25}));
  const auto denormal = [](std::uint64_t bits) { return std::bit_cast<double>(bits); };
  const LayerErrors tiny({{.name = "a", .errors = {denormal(1), denormal(3), denormal(4)}}});
  EXPECT_EQ(copy(tiny.average()), (std::vector<double>{0.125, 0.375, 0.5}));
}

}  // namespace
