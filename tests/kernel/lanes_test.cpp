#include <gtest/gtest.h>

#include <compresskv/kernel/lanes.hpp>

namespace compresskv::kernel {
namespace {

TEST(Lanes, FoldHalvesSixteenLanes) {
  Lanes lanes{};
  for (std::size_t i = 0; i < lane_count; ++i) {
    lanes[i] = static_cast<float>(1U << i);
  }
  EXPECT_EQ(fold(lanes), 65535.0F);
  // The order is a promise: 2^24 + 1 rounds to 2^24, so only the partner of lane 0, eight lanes on, is lost.
  Lanes order{};
  order[0] = 16777216.0F;
  order[8] = 1.0F;
  order[1] = 1.0F;
  order[9] = 1.0F;
  EXPECT_EQ(fold(order), 16777218.0F);
  EXPECT_EQ(round_up_to_lanes(0), 0U);
  EXPECT_EQ(round_up_to_lanes(1), 16U);
  EXPECT_EQ(round_up_to_lanes(16), 16U);
  EXPECT_EQ(round_up_to_lanes(17), 32U);
}

}  // namespace
}  // namespace compresskv::kernel
