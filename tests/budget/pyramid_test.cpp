#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <compresskv/budget/pyramid.hpp>
#include <limits>
#include <numeric>
#include <vector>

#include "reference/errors.hpp"
#include "reference/random.hpp"

namespace compresskv::budget {
namespace {

using reference::expect_error;
using Rows = std::vector<std::size_t>;

Rows allocated(std::size_t layers, const Allowance& allowance, const Pyramid::Options& options = {}) {
  Rows capacities(layers, 12345);
  Pyramid(Budget::tokens_per_layer(allowance.per_layer), options).allocate(allowance, capacities);
  return capacities;
}

std::size_t sum(const Rows& rows) { return std::accumulate(rows.begin(), rows.end(), std::size_t{0}); }

TEST(Pyramid, IsAStraightLineFromTheFormula) {
  // base 100, min 5, max 195, four layers: 195, 131.67, 68.33, 5, and the window of 8 on each.
  EXPECT_EQ(allocated(4, {.per_layer = 108, .window = 8, .tokens = 5000}), (Rows{203, 140, 76, 13}));
  // max would be above the prompt: 140 evictable, min 60.
  EXPECT_EQ(allocated(3, {.per_layer = 108, .window = 8, .tokens = 148}), (Rows{148, 108, 68}));
  EXPECT_EQ(allocated(1, {.per_layer = 108, .window = 8, .tokens = 148}), (Rows{108})) << "one layer";
  EXPECT_EQ(allocated(3, {.per_layer = 8, .window = 8, .tokens = 148}), (Rows{8, 8, 8}))
      << "the window alone";
}

TEST(Pyramid, SharesOutExactlyWithinBoundsAndNeverRises) {
  reference::Random random(31);
  for (int round = 0; round < 3000; ++round) {
    const std::size_t layers = random.between(1, 40);
    const std::size_t tokens = random.between(2, 600);
    const std::size_t window = random.between(1, 20);
    const std::size_t least = std::min(window, tokens);
    if (least == tokens) {
      continue;  // nothing to evict: no allocator is asked
    }
    const Allowance a{.per_layer = random.between(least, tokens - 1), .window = window, .tokens = tokens};
    const double beta = random.pick(std::vector<double>{1.0, 2.5, 20.0, 100.0});
    SCOPED_TRACE(testing::Message() << "L " << layers << " p " << a.per_layer << " w " << window << " S "
                                    << tokens << " beta " << beta);
    const Rows rows = allocated(layers, a, {.beta = beta});
    ASSERT_EQ(sum(rows), a.per_layer * layers);
    const double base = static_cast<double>(a.per_layer - least);
    double min = base / beta;
    double max = 2.0 * base - min;
    if (max >= static_cast<double>(tokens - least)) {
      max = static_cast<double>(tokens - least);
      min = 2.0 * base - max;
    }
    for (std::size_t l = 0; l < layers; ++l) {
      ASSERT_GE(rows[l], least);
      ASSERT_LE(rows[l], tokens);
      ASSERT_TRUE(l == 0 || rows[l] <= rows[l - 1] + 1) << "layer " << l;
      if (layers > 1) {
        const double line = max - static_cast<double>(l) * (max - min) / static_cast<double>(layers - 1);
        ASSERT_NEAR(static_cast<double>(rows[l] - least), line, 1.5 + 1e-9) << "rounded, and walked by one";
      }
    }
  }
}

TEST(Pyramid, TheReleasedIntegersMissTheTotal) {
  // 30 layers at 30 rows: base 22, min 1, max 43, step 1.
  const Rows rows =
      allocated(30, {.per_layer = 30, .window = 8, .tokens = 4000}, {.released_integers = true});
  EXPECT_EQ(rows.front(), 51U);
  EXPECT_EQ(rows.back(), 22U);
  EXPECT_EQ(sum(rows), 1095U) << "900 were asked for: 22 % more";
}

TEST(Pyramid, RejectsABetaThatIsNone) {
  const Budget budget = Budget::tokens_per_layer(30);
  expect_error<ArgumentError>([&] { Pyramid(budget, {.beta = 0.5}); }, {"beta is 0.5", "at least 1"});
  expect_error<ArgumentError>([&] { Pyramid(budget, {.beta = std::numeric_limits<double>::quiet_NaN()}); },
                              {"beta is nan"});
}

TEST(Pyramid, NumbersAtTheEndOfTheirRange) {
  constexpr std::size_t half = std::size_t{1} << 63U;
  std::vector<std::size_t> capacities(2);
  for (const bool released : {false, true}) {
    const Pyramid pyramid{Budget::tokens_per_layer(half), {.beta = 1e300, .released_integers = released}};
    expect_error<ArgumentError>(
        [&] { pyramid.allocate({.per_layer = half, .window = 8, .tokens = half + 1}, capacities); },
        {"budget is 9223372036854775808 rows a layer, of 2 layers", "beyond 64 bits"});
    expect_error<ArgumentError>(
        [&] { pyramid.allocate({.per_layer = 5, .window = 8, .tokens = 100}, capacities); },
        {"budget is 5 rows a layer", "window alone is 8"});
    pyramid.allocate({.per_layer = 50, .window = 8, .tokens = 1000}, capacities);
    EXPECT_EQ(capacities, (std::vector<std::size_t>{92, 8})) << "no layer keeps more the steeper it is";
  }
}

}  // namespace
}  // namespace compresskv::budget
