// half and bfloat16 against Eigen's types of these names: every value of 16 bits, and floats at and beside
// every tie.

#include <gtest/gtest.h>

#include <Eigen/Core>
#include <bit>
#include <compresskv/core/float_bits.hpp>
#include <compresskv/core/half.hpp>
#include <cstdint>
#include <type_traits>

namespace compresskv {
namespace {

static_assert(std::is_trivially_copyable_v<half> && std::is_trivially_default_constructible_v<half>);
static_assert(std::is_trivially_copyable_v<bfloat16> && std::is_trivially_default_constructible_v<bfloat16>);

template <class T, class Reference>
void expect_exact_floats() {
  for (std::uint32_t bits = 0; bits <= 0xffffU; ++bits) {
    const auto narrow = static_cast<std::uint16_t>(bits);
    const auto value = static_cast<float>(std::bit_cast<T>(narrow));
    const auto expected = static_cast<float>(std::bit_cast<Reference>(narrow));
    ASSERT_EQ(detail::is_nan(value), detail::is_nan(expected)) << bits;
    if (!detail::is_nan(value)) {
      ASSERT_EQ(std::bit_cast<std::uint32_t>(value), std::bit_cast<std::uint32_t>(expected)) << bits;
    }
  }
}

template <class T, class Reference>
void expect_nearest(std::uint32_t bits) {
  const auto value = std::bit_cast<float>(bits);
  const T rounded(value);
  const Reference expected(value);
  ASSERT_EQ(detail::is_nan(static_cast<float>(rounded)), detail::is_nan(value)) << bits;
  if (!detail::is_nan(value)) {
    ASSERT_EQ(rounded.bits, std::bit_cast<std::uint16_t>(expected)) << bits;
  }
}

template <class T, class Reference>
void expect_nearest_around_ties() {
  for (std::uint32_t upper = 0; upper <= 0xffffU; ++upper) {
    const auto exact =
        std::bit_cast<std::uint32_t>(static_cast<float>(std::bit_cast<T>(static_cast<std::uint16_t>(upper))));
    for (const std::uint32_t tie : {0U, 0x0800U, 0x1000U, 0x8000U, 0x4000U, 0x2000U}) {
      for (const std::uint32_t beside : {0U, 1U, ~0U}) {
        expect_nearest<T, Reference>(exact + tie + beside);
      }
    }
  }
  // Subnormal halves have fewer places: all floats at a stride that is no power of two.
  for (std::uint64_t bits = 0; bits <= 0xffff'ffffU; bits += 9973) {
    expect_nearest<T, Reference>(static_cast<std::uint32_t>(bits));
  }
}

/// Floats of one sign stand in the order of their bits, evenly between two neighbours of a shorter type.
template <class T>
void expect_ties_to_even(std::uint16_t infinity) {
  const auto float_bits = [](std::uint32_t bits) {
    return std::bit_cast<std::uint32_t>(
        static_cast<float>(std::bit_cast<T>(static_cast<std::uint16_t>(bits))));
  };
  const auto rounded = [](std::uint32_t bits) { return T(std::bit_cast<float>(bits)).bits; };
  for (std::uint32_t bits = 1; bits + 1 < infinity; ++bits) {
    const std::uint32_t tie = float_bits(bits) + (float_bits(bits + 1) - float_bits(bits)) / 2;
    const std::uint32_t even = bits + (bits & 1U);
    ASSERT_EQ(rounded(tie), even) << bits;
    ASSERT_EQ(rounded(tie | 0x8000'0000U), even | 0x8000U) << bits;
    ASSERT_EQ(rounded(tie - 1), bits) << bits;
    ASSERT_EQ(rounded(tie + 1), bits + 1) << bits;
  }
}

TEST(Half, IsExactAsFloat) { expect_exact_floats<half, Eigen::half>(); }
TEST(Half, IsTheNearest) { expect_nearest_around_ties<half, Eigen::half>(); }
TEST(Half, TiesGoToEven) { expect_ties_to_even<half>(0x7c00); }
TEST(Bfloat16, IsExactAsFloat) { expect_exact_floats<bfloat16, Eigen::bfloat16>(); }
TEST(Bfloat16, IsTheNearest) { expect_nearest_around_ties<bfloat16, Eigen::bfloat16>(); }
TEST(Bfloat16, TiesGoToEven) { expect_ties_to_even<bfloat16>(0x7f80); }

}  // namespace
}  // namespace compresskv
