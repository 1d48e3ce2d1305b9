#include <gtest/gtest.h>

#include <bit>
#include <compresskv/budget/cake.hpp>
#include <cstdint>
#include <limits>
#include <vector>

#include "reference/errors.hpp"

namespace compresskv::budget {
namespace {

using Rows = std::vector<std::size_t>;

Rows shared_out(const std::vector<double>& preferences, std::size_t total) {
  Rows capacities(preferences.size(), 1000);
  Rows most(preferences.size());
  const Rows least(preferences.size(), 8);
  Cake{Budget::tokens_per_layer(8)}.cascade(preferences, least, total, capacities, most);
  return capacities;
}

/// What counts is how preferences compare, however large or small they are.
TEST(CakeBudget, SharesOfTheLargestAndTheSmallestNumbers) {
  const Rows expected{100, 200, 100};
  EXPECT_EQ(shared_out({1.0, 2.0, 1.0}, 400), expected);
  const double half = std::numeric_limits<double>::max() / 2.0;
  EXPECT_EQ(shared_out({half, 2.0 * half, half}, 400), expected);
  const double least = std::numeric_limits<double>::denorm_min();
  EXPECT_EQ(shared_out({least, std::bit_cast<double>(std::uint64_t{2}), least}, 400), expected);
  EXPECT_EQ(shared_out({0.0, 0.0}, 400), (Rows{200, 200}));
}

TEST(CakeBudget, RejectsATauThatIsNoNumberAboveZero) {
  for (const double tau :
       {0.0, -1.0, std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
    const Budget budget = Budget::tokens_per_layer(8);
    reference::expect_error<ArgumentError>([&] { Cake(budget, {.tau1 = tau}); }, {"tau1 is ", "above 0"});
    reference::expect_error<ArgumentError>([&] { Cake(budget, {.tau2 = tau}); }, {"tau2 is ", "above 0"});
  }
}

}  // namespace
}  // namespace compresskv::budget
