#include <gtest/gtest.h>

#include <array>
#include <bit>
#include <cmath>
#include <compresskv/kernel/softmax.hpp>
#include <cstdint>
#include <limits>
#include <numbers>
#include <vector>

#include "reference/cache.hpp"
#include "reference/forced_path.hpp"
#include "reference/random.hpp"
#include "reference/scores.hpp"

namespace compresskv::kernel {
namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();

std::vector<float> random_row(reference::Random& random, std::size_t count, float deviation) {
  std::vector<float> row(count);
  for (float& x : row) {
    x = deviation * random.gaussian();
  }
  return row;
}

TEST(Softmax, IsTheReferencesWithinRounding) {
  reference::Random random(21);
  for (const float deviation : {0.1F, 2.0F, 20.0F}) {
    for (const std::size_t count : {1U, 2U, 7U, 8U, 15U, 16U, 17U, 33U, 1000U, 4099U}) {
      const std::vector<float> logits = random_row(random, count, deviation);
      std::vector<double> natural(logits.begin(), logits.end());
      for (double& logit : natural) {
        logit *= std::numbers::ln2;
      }
      const auto expected = reference::softmax(natural);
      reference::on_all_paths([&] {
        std::vector<float> row = logits;
        const float sum = exp2_row(row.data(), count).sum;
        // The subtraction of the maximum rounds once, exp2 is within 2e-7, the sum adds count / 16 + 4 times.
        const double spread = 10.0 * static_cast<double>(deviation);
        const double tolerance = 0x1p-24 * (2.0 * spread + static_cast<double>(count) / 16.0 + 8.0) + 4e-7;
        for (std::size_t t = 0; t < count; ++t) {
          const double weight = static_cast<double>(row[t]) / static_cast<double>(sum);
          ASSERT_NEAR(weight, expected[t], tolerance * expected[t] + 2e-38) << t << " of " << count;
        }
      });
    }
  }
}

TEST(Softmax, PathsAgreeBitForBit) {
  reference::Random random(22);
  for (std::size_t count = 1; count < 200; ++count) {
    std::vector<float> logits = random_row(random, count, 5.0F);
    if (count % 3 == 0) {
      logits[random.below(count)] = -infinity;
    }
    std::vector<float> weights = logits;
    const Exp2Sum expected = portable::exp2_row(weights.data(), count);
    const std::vector<float> sums = random_row(random, count, 1.0F);
    std::vector<float> expected_sums = sums;
    // Two rows, the second the first once more, with factors that stand apart.
    const std::array<float, 3> factors{0.37F, -1.0F, 0.21F};
    for (const float factor : {factors[0], factors[2]}) {
      for (std::size_t t = 0; t < count; ++t) {
        expected_sums[t] = std::fma(weights[t], factor, expected_sums[t]);
      }
    }
    reference::on_all_paths([&] {
      std::vector<float> row = logits;
      const Exp2Sum found = exp2_row(row.data(), count);
      EXPECT_TRUE(reference::same_bytes(row, weights)) << count;
      EXPECT_EQ(std::bit_cast<std::uint32_t>(found.sum), std::bit_cast<std::uint32_t>(expected.sum)) << count;
      EXPECT_EQ(found.max, expected.max) << count;
      std::vector<float> own_sums = sums;
      row.insert(row.end(), weights.begin(), weights.end());
      add_scaled(
          {.first = row.data(), .stride = count, .count = 2, .factors = factors.data(), .factor_stride = 2},
          count, own_sums.data());
      EXPECT_TRUE(reference::same_bytes(own_sums, expected_sums)) << count;
    });
  }
}

TEST(Softmax, SoftCapIsCapTimesTanhAndPathsAgreeBitForBit) {
  reference::Random random(23);
  for (const float cap : {0.5F, 2.0F, 30.0F, 72.0F}) {
    for (const float deviation : {0.01F, 3.0F, 100.0F}) {
      const std::vector<float> logits = random_row(random, 1003, deviation);
      std::vector<float> expected = logits;
      portable::soft_cap(expected.data(), 0, expected.size(), cap);
      for (std::size_t t = 0; t < logits.size(); ++t) {
        const auto wide = static_cast<double>(cap);
        ASSERT_NEAR(expected[t], wide * std::tanh(static_cast<double>(logits[t]) / wide), 2e-7 * wide);
      }
      reference::on_all_paths([&] {
        std::vector<float> row = logits;
        soft_cap_row(row.data(), row.size(), cap);
        EXPECT_TRUE(reference::same_bytes(row, expected)) << cap;
      });
    }
  }
}

TEST(Softmax, MaskedLogitsHaveNoWeight) {
  reference::on_all_paths([] {
    for (const std::size_t count : {3U, 40U}) {
      std::vector<float> row(count, -infinity);
      row[1] = 3.0F;
      EXPECT_EQ(exp2_row(row.data(), count).sum, 1.0F);
      for (std::size_t t = 0; t < count; ++t) {
        EXPECT_EQ(row[t], t == 1 ? 1.0F : 0.0F);
      }
    }
  });
}

TEST(Softmax, WhatHasNoWeightsHasNoFiniteSum) {
  const std::vector<float> poisons{infinity, std::numeric_limits<float>::quiet_NaN(),
                                   std::bit_cast<float>(0xFFFFFFFFU), std::bit_cast<float>(0x7FC00001U)};
  reference::on_all_paths([&] {
    for (const std::size_t count : {1U, 5U, 40U, 50U}) {
      for (const float poison : poisons) {
        for (std::size_t at = 0; at < count; ++at) {
          std::vector<float> row(count, 0.5F);
          row[at] = poison;
          EXPECT_FALSE(compresskv::detail::is_finite(exp2_row(row.data(), count).sum))
              << poison << " at " << at << " of " << count;
          EXPECT_FALSE(compresskv::detail::is_finite(row[at])) << "the culprit must be found";
        }
      }
      std::vector<float> masked(count, -infinity);
      EXPECT_EQ(exp2_row(masked.data(), count).sum, 0.0F) << "all masked";
      EXPECT_EQ(masked, std::vector<float>(count, 0.0F));
      std::vector<float> poisoned(count, -infinity);
      poisoned.back() = std::numeric_limits<float>::quiet_NaN();
      EXPECT_TRUE(compresskv::detail::is_nan(exp2_row(poisoned.data(), count).sum)) << "no number but NaN";
    }
  });
}

}  // namespace
}  // namespace compresskv::kernel
