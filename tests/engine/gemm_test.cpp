#include "engine/gemm.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "engine/tiny_model.hpp"

namespace engine {
namespace {

// Every number against a plain sum in double; a float chain of n multiply-adds errs by less than n * 2^-24 of
// the sum of the terms' magnitudes.
TEST(Gemm, AgreesWithAPlainSumForAnyStretch) {
  std::mt19937_64 random{7};
  const auto up_to = [&](std::ptrdiff_t n) {
    return static_cast<std::ptrdiff_t>(random() % static_cast<std::uint64_t>(n));
  };
  for (int round = 0; round < 200; ++round) {
    const std::ptrdiff_t outputs = 1 + up_to(70);
    const std::ptrdiff_t inputs = 1 + up_to(round % 4 == 0 ? 700 : 60);
    const std::ptrdiff_t rows = 1 + up_to(15);
    const std::ptrdiff_t first_output = up_to((outputs + 15) / 16) * 16;
    const Range wanted{first_output, 1 + up_to(outputs - first_output)};
    const std::ptrdiff_t first_input = up_to(inputs);
    const Range used{first_input, 1 + up_to(inputs - first_input)};
    const bool add = round % 2 == 0;

    const std::vector<float> weights =
        test::random_floats(static_cast<std::size_t>(outputs * inputs), random(), 1.0F);
    PackedMatrix packed(outputs, inputs);
    for (std::ptrdiff_t o = 0; o < outputs; ++o) {
      for (std::ptrdiff_t i = 0; i < inputs; ++i)
        packed(o, i) = weights[static_cast<std::size_t>(o * inputs + i)];
    }
    const std::ptrdiff_t x_stride = used.count + up_to(5);
    const std::ptrdiff_t out_stride = wanted.count + up_to(5);
    const std::vector<float> x =
        test::random_floats(static_cast<std::size_t>(rows * x_stride), random(), 1.0F);
    const std::vector<float> before =
        test::random_floats(static_cast<std::size_t>(rows * out_stride), random(), 1.0F);
    std::vector<float> out = before;
    multiply({x.data(), x_stride}, rows, packed, wanted, used, add, {out.data(), out_stride});

    for (std::ptrdiff_t r = 0; r < rows; ++r) {
      for (std::ptrdiff_t c = 0; c < out_stride; ++c) {
        const auto at = static_cast<std::size_t>(r * out_stride + c);
        if (c >= wanted.count) {
          ASSERT_EQ(out[at], before[at]) << "written beyond the outputs";
          continue;
        }
        double sum = add ? double{before[at]} : 0.0;
        double magnitude = std::abs(sum);
        for (std::ptrdiff_t i = 0; i < used.count; ++i) {
          const double term = double{x[static_cast<std::size_t>(r * x_stride + i)]} *
                              double{packed(wanted.first + c, used.first + i)};
          sum += term;
          magnitude += std::abs(term);
        }
        ASSERT_NEAR(out[at], sum, static_cast<double>(used.count + 1) * magnitude * 0x1p-24);
      }
    }
  }
}

TEST(Gemm, GivesARowTheSameBitsWhateverIsBesideIt) {
  const std::ptrdiff_t outputs = 50;
  const std::ptrdiff_t inputs = 300;
  PackedMatrix packed(outputs, inputs);
  std::mt19937_64 random{3};
  for (std::ptrdiff_t o = 0; o < outputs; ++o) {
    for (std::ptrdiff_t i = 0; i < inputs; ++i) packed(o, i) = test::random_floats(1, random(), 1.0F)[0];
  }
  const std::ptrdiff_t rows = 13;
  const std::vector<float> x = test::random_floats(static_cast<std::size_t>(rows * inputs), 5, 1.0F);
  std::vector<float> together(static_cast<std::size_t>(rows * outputs));
  multiply({x.data(), inputs}, rows, packed, false, {together.data(), outputs});
  for (std::ptrdiff_t r = 0; r < rows; ++r) {
    std::vector<float> alone(static_cast<std::size_t>(outputs));
    multiply({x.data() + r * inputs, inputs}, 1, packed, false, {alone.data(), outputs});
    EXPECT_TRUE(std::equal(alone.begin(), alone.end(), together.begin() + r * outputs)) << "row " << r;
  }
}

}  // namespace
}  // namespace engine
