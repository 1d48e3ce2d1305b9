#include <gtest/gtest.h>

#include <compresskv/core/order.hpp>
#include <cstdint>
#include <vector>

#include "reference/random.hpp"

namespace compresskv::detail {
namespace {

TEST(Order, FallsAndKeepsEqualValuesInPlace) {
  reference::Random random(81);
  for (int round = 0; round < 200; ++round) {
    std::vector<double> values(random.below(40));
    for (double& value : values) {
      value = static_cast<double>(random.below(6)) - 3.0;
    }
    const std::vector<std::uint32_t> order = by_falling(values);
    ASSERT_EQ(order.size(), values.size());
    std::vector<bool> seen(values.size());
    for (std::size_t i = 0; i < order.size(); ++i) {
      ASSERT_FALSE(seen[order[i]]);
      seen[order[i]] = true;
      if (i > 0) {
        const double before = values[order[i - 1]];
        const double here = values[order[i]];
        ASSERT_TRUE(before > here || (before == here && order[i - 1] < order[i]));
      }
    }
  }
}

}  // namespace
}  // namespace compresskv::detail
