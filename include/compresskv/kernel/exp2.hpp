#pragma once

#include <cstdint>

#include "compresskv/core/strict_float_begin.hpp"
#include "compresskv/kernel/fused.hpp"

namespace compresskv::kernel {

/// The exp2 of all code paths: `2^n (1 + r (c1 + r (c2 + ...)))`, n the nearest integer to x and r = x - n,
/// |r| <= 1/2; c1 to c5 make the largest relative error of the polynomial least (1.1e-7). For arguments <= 0,
/// relative error below 2e-7; below -126 the result is 0, NaN stays NaN.
///
/// Softmax takes powers of two, with the factor log2(e) in the logits' scale: two operations less than powers
/// of e.
namespace exp2_constants {
inline constexpr float lowest = -126.0F;  // 2^-126 is the last normal number
/// 1.5 * 2^23 + 127: adding it leaves n + 127 in the low bits, which shifted left by 23 are the float 2^n.
inline constexpr float round_shift = 12583039.0F;
inline constexpr float c1 = 0.693147004F;
inline constexpr float c2 = 0.240222424F;
inline constexpr float c3 = 0.0555073395F;
inline constexpr float c4 = 0.00967151765F;
inline constexpr float c5 = 0.00132647203F;
}  // namespace exp2_constants

namespace portable {

inline float exp2(float argument) {
  using namespace exp2_constants;
  if (argument < lowest) {
    return 0.0F;
  }
  const float shifted = argument + round_shift;
  const float r = argument - (shifted - round_shift);
  float p = fused(c5, r, c4);
  p = fused(p, r, c3);
  p = fused(p, r, c2);
  p = fused(p, r, c1);
  const auto power = __builtin_bit_cast(float, __builtin_bit_cast(std::uint32_t, shifted) << 23U);
  return fused(p * r, power, power);
}

}  // namespace portable

}  // namespace compresskv::kernel

#include "compresskv/core/strict_float_end.hpp"
