#include <gtest/gtest.h>

#include <compresskv/kernel/pooling.hpp>
#include <cstddef>
#include <vector>

#include "reference/cache.hpp"
#include "reference/errors.hpp"
#include "reference/forced_path.hpp"
#include "reference/random.hpp"
#include "reference/scores.hpp"

namespace compresskv::kernel {
namespace {

std::vector<float> pooled(const std::vector<float>& in, Pool pool, std::size_t width) {
  std::vector<float> out(in.size(), 0.0F);
  add_pooled(in, pool, width, out);
  return out;
}

TEST(Pooling, AverageCountsPaddingAsZeros) {
  EXPECT_EQ(pooled({5, 10, 15, 20, 25, 30}, Pool::average, 5), (std::vector<float>{6, 10, 15, 20, 18, 15}));
  EXPECT_EQ(pooled({10}, Pool::average, 5), (std::vector<float>{2}));
  EXPECT_EQ(pooled({10, 20}, Pool::average, 5), (std::vector<float>{6, 6}));
}

TEST(Pooling, MaxIgnoresPadding) {
  EXPECT_EQ(pooled({-5, -1, -3, -4, -2, -6}, Pool::max, 3), (std::vector<float>{-1, -1, -1, -2, -2, -2}));
  EXPECT_EQ(pooled({-7}, Pool::max, 5), (std::vector<float>{-7}));
}

TEST(Pooling, TrailingAveragesATokenAndThoseBeforeIt) {
  EXPECT_EQ(pooled({3, 6, 9, 0, 0, 30}, Pool::trailing, 3), (std::vector<float>{1, 3, 6, 5, 3, 10}));
  EXPECT_EQ(pooled({10}, Pool::trailing, 5), (std::vector<float>{2}));
}

TEST(Pooling, WidthOneChangesNothing) {
  const std::vector<float> in{3, 1, 4, 1, 5};
  EXPECT_EQ(pooled(in, Pool::trailing, 1), in);
  EXPECT_EQ(pooled(in, Pool::average, 1), in);
  EXPECT_EQ(pooled(in, Pool::max, 1), in);
}

TEST(Pooling, AddsToWhatIsThere) {
  std::vector<float> out{100, 200, 300};
  add_pooled(std::vector<float>{3, 3, 3}, Pool::average, 3, out);
  EXPECT_EQ(out, (std::vector<float>{102, 203, 302}));
}

TEST(Pooling, NothingInNothingOut) { EXPECT_TRUE(pooled({}, Pool::average, 5).empty()); }

TEST(Pooling, IsTheReferencesOverAllLengthsAndWidths) {
  reference::Random random(31);
  for (std::size_t count = 1; count < 40; ++count) {
    std::vector<float> in(count);
    for (float& x : in) {
      x = static_cast<float>(random.uniform());
    }
    for (std::size_t width = 1; width < 50; width += 2) {
      const auto average = pooled(in, Pool::average, width);
      const auto max = pooled(in, Pool::max, width);
      const auto trailing = pooled(in, Pool::trailing, width);
      const std::vector<double> exact(in.begin(), in.end());
      const auto expected = reference::pooled(exact, Pool::average, width);
      const auto expected_max = reference::pooled(exact, Pool::max, width);
      const auto expected_trailing = reference::pooled(exact, Pool::trailing, width);
      for (std::size_t t = 0; t < count; ++t) {
        // Positive terms: one rounding an addition, one for the division.
        ASSERT_NEAR(average[t], expected[t], 0x1p-24 * static_cast<double>(width + 1) * expected[t]);
        ASSERT_NEAR(trailing[t], expected_trailing[t],
                    0x1p-24 * static_cast<double>(width + 1) * expected_trailing[t]);
        ASSERT_EQ(static_cast<double>(max[t]), expected_max[t]);
      }
    }
  }
}

TEST(Pooling, PathsAgreeBitForBit) {
  reference::Random random(32);
  for (std::size_t count = 1; count < 120; ++count) {
    std::vector<float> in(count);
    for (float& x : in) {
      x = random.gaussian();
    }
    for (const std::size_t width : {1U, 3U, 5U, 7U, 31U}) {
      for (const Pool pool : {Pool::average, Pool::max, Pool::trailing}) {
        const reference::ForcedPath portable(CodePath::portable);
        const auto expected = pooled(in, pool, width);
        reference::on_all_paths([&] {
          ASSERT_TRUE(reference::same_bytes(pooled(in, pool, width), expected)) << count << " x " << width;
        });
      }
    }
  }
}

TEST(Pooling, EvenWidthsAreRejected) {
  for (const std::size_t width : {0U, 2U, 4U, 100U}) {
    reference::expect_error<ArgumentError>([&] { check_pool_width(width); },
                                           {"pooling width is " + std::to_string(width), "must be odd"});
  }
  EXPECT_NO_THROW(check_pool_width(1));
  EXPECT_NO_THROW(check_pool_width(5));
}

}  // namespace
}  // namespace compresskv::kernel
