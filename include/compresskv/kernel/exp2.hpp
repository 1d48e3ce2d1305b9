#pragma once

#include <bit>
#include <cstdint>

#include "compresskv/kernel/fused.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "compresskv/core/strict_float_begin.hpp"

namespace compresskv::kernel {

/// One exp2 for all code paths: `2^n (1 + r (c1 + r (c2 + ...)))`, n the nearest integer to x and r = x - n,
/// |r| <= 1/2; c1 to c5 make the largest relative error of the polynomial least (1.1e-7). For arguments <= 0,
/// relative error below 2e-7; below -126 the result is 0, NaN stays NaN.
///
/// Softmax by powers of two, with the factor log2(e) in the logits' scale, takes two steps less than by
/// powers of e.
namespace exp2_constants {
inline constexpr float lowest = -126.0F;  // 2^-126 is the last normal number
/// 1.5 * 2^23 + 127: adding it leaves n + 127 in the low bits, which 23 places up are the number 2^n.
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

#if defined(__x86_64__)
namespace avx2 {

[[gnu::target("avx2,fma"), gnu::always_inline]] inline __m256 exp2(__m256 argument) {
  using namespace exp2_constants;
  const __m256 shift = _mm256_set1_ps(round_shift);
  const __m256 shifted = argument + shift;
  const __m256 r = argument - (shifted - shift);
  __m256 p = _mm256_fmadd_ps(_mm256_set1_ps(c5), r, _mm256_set1_ps(c4));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(c3));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(c2));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(c1));
  const __m256 power = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(shifted), 23));
  const __m256 value = _mm256_fmadd_ps(p * r, power, power);
  const auto underflow = argument < _mm256_set1_ps(lowest);  // no, where it is NaN
  return _mm256_andnot_ps(reinterpret_cast<__m256>(underflow), value);
}

}  // namespace avx2

namespace avx512 {

[[gnu::target("avx2,fma,avx512f,avx512vl,avx512dq"), gnu::always_inline]] inline __m512 exp2(
    __m512 argument) {
  using namespace exp2_constants;
  const __m512 shift = _mm512_set1_ps(round_shift);
  const __m512 shifted = argument + shift;
  const __m512 r = argument - (shifted - shift);
  __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(c5), r, _mm512_set1_ps(c4));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c3));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c2));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c1));
  // "maskz": of the plain form, g++ 12 says that it uses what is not initialised.
  const __m512 power = _mm512_castsi512_ps(_mm512_maskz_slli_epi32(0xFFFF, _mm512_castps_si512(shifted), 23));
  // By the bits, as clang's comparison of numbers has the flags in it: from the first below `lowest` to -inf.
  constexpr std::uint32_t first = std::bit_cast<std::uint32_t>(lowest) + 1;
  const __m512i beyond =
      _mm512_sub_epi32(_mm512_castps_si512(argument), _mm512_set1_epi32(static_cast<int>(first)));
  const __mmask16 no_underflow =
      _mm512_cmpgt_epu32_mask(beyond, _mm512_set1_epi32(static_cast<int>(0xFF800000U - first)));
  return _mm512_maskz_fmadd_ps(no_underflow, p * r, power, power);
}

}  // namespace avx512
#endif

}  // namespace compresskv::kernel

#include "compresskv/core/strict_float_end.hpp"
