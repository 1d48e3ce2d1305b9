#include <gtest/gtest.h>

#include <bit>
#include <compresskv/core/float_bits.hpp>
#include <compresskv/core/float_mode.hpp>
#include <cstdint>
#include <limits>
#include <vector>

#include "reference/random.hpp"

namespace compresskv::detail {
namespace {

TEST(FloatBits, KnowWhatIsFinite) {
  using F = std::numeric_limits<float>;
  using D = std::numeric_limits<double>;
  for (const float value : {0.0F, -0.0F, F::denorm_min(), F::max(), F::lowest()}) {
    EXPECT_TRUE(is_finite(value));
    EXPECT_TRUE(is_finite(static_cast<double>(value)));
    EXPECT_FALSE(is_nan(value) || is_nan(static_cast<double>(value)));
  }
  EXPECT_TRUE(is_finite(D::max()));
  for (const std::uint32_t bits :
       {0x7F800000U, 0xFF800000U, 0x7FC00000U, 0xFFC00000U, 0x7F800001U, 0xFFFFFFFFU}) {
    const auto value = std::bit_cast<float>(bits);
    EXPECT_FALSE(is_finite(value)) << std::hex << bits;
    EXPECT_EQ(is_nan(value), (bits & 0x7FFFFFU) != 0);
    EXPECT_EQ(is_minus_infinity(value), bits == 0xFF800000U);
    const auto wide = std::bit_cast<double>(static_cast<std::uint64_t>(bits & 0xFF800000U) << 32U |
                                            0x7FF0000000000000U | (bits & 0x7FFFFFU));
    EXPECT_FALSE(is_finite(wide)) << std::hex << bits;
    EXPECT_EQ(is_nan(wide), (bits & 0x7FFFFFU) != 0);
  }
}

/// From the most negative to the most positive; zeros are one, NaN is outermost.
TEST(FloatBits, OrderAllFloats) {
  const std::vector<std::uint32_t> ascending{0xFFC00000U, 0xFF800000U, 0xFF7FFFFFU, 0xBF800000U, 0x80000002U,
                                             0x80000001U, 0x80000000U, 0x00000001U, 0x00000002U, 0x3F800000U,
                                             0x7F7FFFFFU, 0x7F800000U, 0x7FC00000U};
  for (std::size_t i = 1; i < ascending.size(); ++i) {
    EXPECT_LT(ordered(std::bit_cast<float>(ascending[i - 1])), ordered(std::bit_cast<float>(ascending[i])))
        << i;
  }
  EXPECT_EQ(ordered(0.0F), ordered(-0.0F));
  reference::Random random(17);
  for (int round = 0; round < 1000; ++round) {
    const auto a = static_cast<float>(random.below(2000)) - 1000.0F;
    const auto b = static_cast<float>(random.below(2000)) - 1000.0F;
    EXPECT_EQ(ordered(a) < ordered(b), a < b);
  }
}

#if defined(__x86_64__)
TEST(FloatMode, KeepsDenormalNumbersAndGivesTheModeBack) {
  const unsigned before = _mm_getcsr();
  for (const unsigned mode : {0U, 0x8000U, 0x8040U, 0xE040U, 0x6000U}) {
    _mm_setcsr((before & ~0xE040U) | mode);
    {
      const PlainFloats plain;
      EXPECT_EQ(_mm_getcsr() & 0xE040U, 0U);
      {
        const PlainFloats again;
        EXPECT_EQ(_mm_getcsr() & 0xE040U, 0U);
      }
      EXPECT_EQ(_mm_getcsr() & 0xE040U, 0U);
    }
    EXPECT_EQ(_mm_getcsr() & 0xE040U, mode);
  }
  _mm_setcsr(before);
}
#endif

}  // namespace
}  // namespace compresskv::detail
