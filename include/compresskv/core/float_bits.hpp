#pragma once

#include <bit>
#include <cstdint>

/// NaN, infinity and order by bits: the compiler's own tests are dropped under -ffinite-math-only, and
/// comparisons with NaN then say anything. Values come by reference: passed as a number, a NaN would be
/// undefined under such flags.
namespace compresskv::detail {

constexpr bool is_finite(const float& value) {
  return (std::bit_cast<std::uint32_t>(value) & 0x7F800000U) != 0x7F800000U;
}
constexpr bool is_finite(const double& value) {
  return (std::bit_cast<std::uint64_t>(value) & 0x7FF0000000000000U) != 0x7FF0000000000000U;
}

constexpr bool is_nan(const float& value) {
  return (std::bit_cast<std::uint32_t>(value) & 0x7FFFFFFFU) > 0x7F800000U;
}
constexpr bool is_nan(const double& value) {
  return (std::bit_cast<std::uint64_t>(value) & 0x7FFFFFFFFFFFFFFFU) > 0x7FF0000000000000U;
}

inline constexpr float minus_infinity = std::bit_cast<float>(0xFF800000U);

constexpr bool is_minus_infinity(const float& value) {
  return std::bit_cast<std::uint32_t>(value) == 0xFF800000U;
}

/// An integer that is greater where the number is, equal for -0 and 0. NaN has a place too, beyond the
/// infinity of its sign: a total order of whatever is given.
constexpr std::int32_t ordered(const float& value) {
  const auto bits = std::bit_cast<std::int32_t>(value);
  const std::int32_t sign = bits >> 31;  // 0 or -1
  return ((bits & 0x7FFFFFFF) ^ sign) - sign;
}

}  // namespace compresskv::detail
