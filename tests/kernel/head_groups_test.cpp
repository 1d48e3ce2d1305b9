#include <gtest/gtest.h>

#include <compresskv/kernel/head_groups.hpp>
#include <cstdint>
#include <numeric>
#include <vector>

#include "kernel/window_inputs.hpp"

namespace compresskv::kernel {
namespace {

TEST(HeadGroups, TheirSizeDecidesNoBit) {
  // One layer has no memory to spare, so one head goes at a time; 1000 layers have it for all.
  WindowInputs frugal(1, 4, 200, 8);
  WindowInputs lavish(1000, 4, 200, 8);
  std::vector<std::uint32_t> heads(8);
  std::iota(heads.begin(), heads.end(), 0U);
  Workspace small;
  Workspace large;
  const auto one_by_one = frugal.sums(heads, small);
  const auto together = lavish.sums(heads, large);
  ASSERT_EQ(one_by_one.size(), 8U);
  EXPECT_EQ(one_by_one, together);
  EXPECT_LT(small.bytes() * 3, large.bytes()) << "the two must have gone different ways";
}

}  // namespace
}  // namespace compresskv::kernel
