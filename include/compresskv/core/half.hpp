#pragma once

#include <bit>
#include <cstdint>

namespace compresskv {

/// The two 16-bit floating-point types of caches: storage that converts to float32 and back.
///
/// Each is one `std::uint16_t`, and may lie over memory of any other type (`may_alias`): an engine's own half
/// is looked at through it, see `as_half` in compresskv/core/element.hpp.

/// IEEE 754 binary16: 1 sign, 5 exponent and 10 fraction bits.
struct [[gnu::may_alias]] half {
  std::uint16_t bits;

  half() = default;
  /// The nearest half, ties to even. 65,520 and more become infinite; NaN stays NaN.
  explicit constexpr half(float value) : bits(nearest(std::bit_cast<std::uint32_t>(value))) {}
  /// Exact.
  explicit constexpr operator float() const {
    const std::uint32_t sign = (bits & 0x8000U) << 16U;
    const std::uint32_t magnitude = bits & 0x7fffU;
    if (magnitude < 0x0400U) {  // zero, or subnormal: a multiple of 2^-24
      const float steps = static_cast<float>(magnitude) * 0x1p-24F;
      return std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(steps));
    }
    const std::uint32_t exponent_change = magnitude >= 0x7c00U ? 224U << 23U : 112U << 23U;
    return std::bit_cast<float>(sign | ((magnitude << 13U) + exponent_change));
  }

 private:
  static constexpr std::uint16_t nearest(std::uint32_t value) {
    const std::uint32_t sign = (value >> 16U) & 0x8000U;
    const std::uint32_t magnitude = value & 0x7fff'ffffU;
    std::uint32_t result = 0;
    if (magnitude > 0x7f80'0000U) {
      result = 0x7e00U | ((magnitude >> 13U) & 0x01ffU);
    } else if (magnitude >= 0x477f'f000U) {
      result = 0x7c00U;
    } else if (magnitude >= 0x3880'0000U) {
      result = (magnitude - (112U << 23U) + 0x0fffU + ((magnitude >> 13U) & 1U)) >> 13U;
    } else if (magnitude > 0x3300'0000U) {  // above 2^-25: rounds to a subnormal
      const std::uint32_t shift = 126U - (magnitude >> 23U);
      const std::uint32_t fraction = (magnitude & 0x007f'ffffU) | 0x0080'0000U;
      const std::uint32_t kept = fraction >> shift;
      result = (fraction + (1U << (shift - 1U)) - 1U + (kept & 1U)) >> shift;
    }
    return static_cast<std::uint16_t>(sign | result);
  }
};

/// The upper 16 bits of a float32: 1 sign, 8 exponent and 7 fraction bits.
struct [[gnu::may_alias]] bfloat16 {
  std::uint16_t bits;

  bfloat16() = default;
  /// The nearest bfloat16, ties to even; NaN stays NaN.
  explicit constexpr bfloat16(float value) : bits(nearest(std::bit_cast<std::uint32_t>(value))) {}
  /// Exact.
  explicit constexpr operator float() const {
    return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16U);
  }

 private:
  static constexpr std::uint16_t nearest(std::uint32_t value) {
    if ((value & 0x7fff'ffffU) > 0x7f80'0000U) {
      return static_cast<std::uint16_t>((value >> 16U) | 0x0040U);
    }
    return static_cast<std::uint16_t>((value + 0x7fffU + ((value >> 16U) & 1U)) >> 16U);
  }
};

static_assert(sizeof(half) == 2 && sizeof(bfloat16) == 2);

}  // namespace compresskv
