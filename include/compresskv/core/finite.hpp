#pragma once

#include <bit>
#include <cstdint>

namespace compresskv::detail {

/// Tests by bits. `std::isfinite(x)` and `x != x` are folded to constants where the compiler may assume that
/// all numbers are finite (-ffast-math, -Ofast, -ffinite-math-only), and engines are built so.
constexpr bool is_nan(float x) { return (std::bit_cast<std::uint32_t>(x) & 0x7fffffffU) > 0x7f800000U; }
constexpr bool is_nan(double x) {
  return (std::bit_cast<std::uint64_t>(x) & 0x7fffffffffffffffU) > 0x7ff0000000000000U;
}
/// Neither infinite nor NaN.
constexpr bool is_finite(float x) { return (std::bit_cast<std::uint32_t>(x) & 0x7fffffffU) < 0x7f800000U; }
constexpr bool is_finite(double x) {
  return (std::bit_cast<std::uint64_t>(x) & 0x7fffffffffffffffU) < 0x7ff0000000000000U;
}

}  // namespace compresskv::detail
