#include "compresskv/kernel/turns.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <numbers>
#include <span>
#include <vector>

#include "reference/queries.hpp"

namespace compresskv::kernel {
namespace {

TEST(MeanTurn, IsTheMeanOfAllTurns) {
  const double whole = 2.0 * std::numbers::pi;
  for (const double step :
       {1.0, 0.5, 1e-1, 1e-3, 1e-6, 1e-12, 0.0, 3.0, whole, whole / 2, whole * (1.0 + 1e-9)}) {
    for (const std::size_t first : {0U, 1U, 700U, 131072U}) {
      for (const std::size_t count : {1U, 2U, 3U, 512U, 2048U}) {
        double cosine = 0.0;
        double sine = 0.0;
        for (std::size_t i = 0; i < count; ++i) {
          cosine += std::cos(step * static_cast<double>(first + i)) / static_cast<double>(count);
          sine += std::sin(step * static_cast<double>(first + i)) / static_cast<double>(count);
        }
        const Turn mean = mean_turn(step, first, count);
        // A whole turn is told from none by 1e-9 of a step: over 2048 positions that is 1e-6 of an angle.
        const double slack = step > 6.0 ? 2e-5 : 1e-9;
        EXPECT_NEAR(mean.cosine, cosine, slack) << step << " from " << first << " over " << count;
        EXPECT_NEAR(mean.sine, sine, slack) << step << " from " << first << " over " << count;
      }
    }
  }
}

TEST(TurnPairs, IsRotatingAndTurningBackUndoesIt) {
  reference::Random random(9);
  for (const Rotary& rotary : reference::rotary_kinds(8)) {
    std::vector<double> row(8);
    for (double& x : row) {
      x = static_cast<double>(random.gaussian());
    }
    const std::vector<double> expected = reference::rotated(row, 1234.0, rotary);
    std::vector<double> turned = row;
    const auto turn = [&](std::size_t j) { return turn_by(1234.0 * rotary.step(j, 8)); };
    turn_pairs(rotary, std::span(turned), turn);
    std::vector<double> back = turned;
    turn_pairs(rotary, std::span(back), [&](std::size_t j) { return turn(j).transposed(); });
    for (std::size_t e = 0; e < 8; ++e) {
      EXPECT_NEAR(turned[e], expected[e], 1e-12);
      EXPECT_NEAR(back[e], row[e], 1e-12);
    }
  }
}

}  // namespace
}  // namespace compresskv::kernel
