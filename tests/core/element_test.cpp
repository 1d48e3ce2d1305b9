#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <compresskv/core/element.hpp>
#include <compresskv/core/float_bits.hpp>
#include <cstdint>

namespace compresskv {
namespace {

TEST(Element, EveryHalfAndBfloat16IsItsFloat) {
  for (std::uint32_t bits = 0; bits < 0x10000U; ++bits) {
    const auto narrow = std::bit_cast<half>(static_cast<std::uint16_t>(bits));
    const int exponent = static_cast<int>((bits >> 10U) & 31U);
    const double mantissa = (bits & 1023U) / 1024.0;
    const double sign = (bits & 0x8000U) != 0 ? -1.0 : 1.0;
    if (exponent != 31) {
      const double expected =
          exponent == 0 ? std::ldexp(mantissa, -14) : std::ldexp(1.0 + mantissa, exponent - 15);
      ASSERT_EQ(static_cast<double>(to_float(narrow)), sign * expected) << bits;
    } else {
      ASSERT_EQ(!detail::is_finite(to_float(narrow)) && !detail::is_nan(to_float(narrow)),
                (bits & 1023U) == 0)
          << bits;
    }
    const auto brain = std::bit_cast<bfloat16>(static_cast<std::uint16_t>(bits));
    ASSERT_EQ(std::bit_cast<std::uint32_t>(to_float(brain)), bits << 16U);
  }
}

}  // namespace
}  // namespace compresskv
