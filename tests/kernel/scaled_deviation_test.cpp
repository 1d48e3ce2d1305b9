// Bounds of rows and deviations scaled by them, against float64 and, bit for bit, between code paths.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <compresskv/core/float_mode.hpp>
#include <compresskv/kernel/scaled_deviation.hpp>
#include <cstddef>
#include <limits>
#include <vector>

#include "reference/forced_path.hpp"
#include "reference/random.hpp"

namespace compresskv {
namespace {

struct Bounded {
  std::vector<float> least;
  std::vector<float> largest;
  kernel::Bounds bounds() { return {least.data(), largest.data()}; }
};

constexpr float largest_float = (std::numeric_limits<float>::max)();

/// In float64 throughout, but for each scaled element, which is a float32.
double slow_deviation(const std::vector<float>& row, const Bounded& by) {
  std::vector<double> scaled;
  for (std::size_t e = 0; e < row.size(); ++e) {
    const double spread = static_cast<double>(by.largest[e]) - static_cast<double>(by.least[e]);
    const double share =
        spread > 0.0 ? (static_cast<double>(row[e]) - static_cast<double>(by.least[e])) / spread : 0.0;
    scaled.push_back(
        std::clamp(share, -static_cast<double>(largest_float), static_cast<double>(largest_float)));
  }
  double mean = 0.0;
  for (const double share : scaled) {
    mean += share / static_cast<double>(scaled.size());
  }
  double squares = 0.0;
  for (const double share : scaled) {
    squares += (share - mean) * (share - mean);
  }
  return std::sqrt(squares / static_cast<double>(scaled.size() - 1));
}

TEST(ScaledDeviation, IsTheSlowOneOnEveryPathAndBitForBit) {
  for (const std::size_t head_dim : {2U, 3U, 7U, 8U, 9U, 16U, 31U, 64U, 127U, 128U, 260U}) {
    for (const float size : {1.0F, 1e-40F, 1e30F}) {
      SCOPED_TRACE(testing::Message() << head_dim << " elements of size " << size);
      reference::Random random(head_dim);
      std::vector<std::vector<float>> rows(5, std::vector<float>(head_dim));
      for (auto& row : rows) {
        for (float& element : row) {
          element = size * random.gaussian();
        }
        row[head_dim / 2] = 3.0F;  // no spread
      }
      std::vector<float> target(head_dim);
      for (float& element : target) {
        element = size * random.gaussian();
      }
      std::vector<float> found;
      reference::on_all_paths([&] {
        Bounded by{rows[0], rows[0]};
        for (const auto& row : rows) {
          EXPECT_TRUE(kernel::widen(row.data(), head_dim, by.bounds()));
        }
        for (std::size_t e = 0; e < head_dim; ++e) {
          for (const auto& row : rows) {
            EXPECT_LE(by.least[e], row[e]);
            EXPECT_GE(by.largest[e], row[e]);
          }
          EXPECT_TRUE(
              std::any_of(rows.begin(), rows.end(), [&](const auto& r) { return r[e] == by.least[e]; }));
          EXPECT_TRUE(
              std::any_of(rows.begin(), rows.end(), [&](const auto& r) { return r[e] == by.largest[e]; }));
        }
        std::vector<float> scaled(head_dim);
        const float deviation = kernel::scaled_deviation(target.data(), head_dim, by.bounds(), scaled.data());
        const double expected = slow_deviation(target, by);
        EXPECT_NEAR(static_cast<double>(deviation), expected, 1e-6 * expected);
        scaled.push_back(deviation);
        if (found.empty()) {
          found = scaled;
        }
        EXPECT_EQ(scaled, found);
      });
    }
  }
}

TEST(ScaledDeviation, StaysWithinFloat32) {
  const detail::PlainFloats plain;  // with -Ofast the program takes denormal numbers for zero
  for (const std::size_t head_dim : {8U, 11U}) {
    reference::on_all_paths([&] {
      // Denormal spreads and rows far outside of them; the largest spreads that there are.
      Bounded narrow{std::vector<float>(head_dim, 0.0F), std::vector<float>(head_dim, 1e-45F)};
      std::vector<float> row(head_dim, largest_float);
      row[1] = -largest_float;
      std::vector<float> scaled(head_dim);
      const float deviation = kernel::scaled_deviation(row.data(), head_dim, narrow.bounds(), scaled.data());
      EXPECT_NEAR(static_cast<double>(deviation), slow_deviation(row, narrow),
                  1e-6 * static_cast<double>(largest_float));
      EXPECT_EQ(scaled[0], largest_float);
      EXPECT_EQ(scaled[1], -largest_float);
      Bounded wide{std::vector<float>(head_dim, -largest_float), std::vector<float>(head_dim, largest_float)};
      kernel::scaled_deviation(row.data(), head_dim, wide.bounds(), scaled.data());
      EXPECT_EQ(scaled[0], 1.0F);
      EXPECT_EQ(scaled[1], 0.0F);
    });
  }
}

TEST(ScaledDeviation, OneElementHasNone) {
  Bounded by{{1.0F}, {2.0F}};
  const float row = 5.0F;
  float scaled = 0.0F;
  EXPECT_EQ(kernel::scaled_deviation(&row, 1, by.bounds(), &scaled), 0.0F);
}

TEST(ScaledDeviation, SaysWhereARowIsNotFinite) {
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
                          -std::numeric_limits<float>::infinity()}) {
    for (std::size_t at = 0; at < 19; ++at) {
      reference::on_all_paths([&] {
        std::vector<float> row(19, 0.5F);
        row[at] = bad;
        Bounded by{std::vector<float>(19, 0.0F), std::vector<float>(19, 1.0F)};
        EXPECT_FALSE(kernel::widen(row.data(), row.size(), by.bounds()));
      });
    }
  }
}

}  // namespace
}  // namespace compresskv
