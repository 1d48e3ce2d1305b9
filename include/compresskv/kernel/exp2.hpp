#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace compresskv::kernel {

/// One exp2 for all code paths: `2^n (1 + r (c1 + r (c2 + ...)))`, n the nearest integer to x and r = x - n,
/// |r| <= 1/2; c1 to c5 make the largest relative error of the polynomial least (1.1e-7). For arguments <= 0,
/// relative error below 2e-7; below -126 the result is 0, NaN stays NaN. Products are fused explicitly, so
/// that no compiler flag changes a bit; so must be one that makes the argument.
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
  float p = std::fma(c5, r, c4);
  p = std::fma(p, r, c3);
  p = std::fma(p, r, c2);
  p = std::fma(p, r, c1);
  const float power = std::bit_cast<float>(std::bit_cast<std::uint32_t>(shifted) << 23U);
  return std::fma(p * r, power, power);
}

}  // namespace portable

#if defined(__x86_64__)
namespace avx2 {

[[gnu::target("avx2,fma"), gnu::always_inline]] inline __m256 exp2(__m256 argument) {
  using namespace exp2_constants;
  const __m256 shifted = _mm256_add_ps(argument, _mm256_set1_ps(round_shift));
  const __m256 r = _mm256_sub_ps(argument, _mm256_sub_ps(shifted, _mm256_set1_ps(round_shift)));
  __m256 p = _mm256_fmadd_ps(_mm256_set1_ps(c5), r, _mm256_set1_ps(c4));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(c3));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(c2));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(c1));
  const __m256 power = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(shifted), 23));
  const __m256 value = _mm256_fmadd_ps(_mm256_mul_ps(p, r), power, power);
  const __m256 underflow = _mm256_cmp_ps(argument, _mm256_set1_ps(lowest), _CMP_LT_OQ);
  return _mm256_andnot_ps(underflow, value);
}

}  // namespace avx2

namespace avx512 {

[[gnu::target("avx2,fma,avx512f,avx512vl,avx512dq"), gnu::always_inline]] inline __m512 exp2(
    __m512 argument) {
  using namespace exp2_constants;
  const __m512 shifted = _mm512_add_ps(argument, _mm512_set1_ps(round_shift));
  const __m512 r = _mm512_sub_ps(argument, _mm512_sub_ps(shifted, _mm512_set1_ps(round_shift)));
  __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(c5), r, _mm512_set1_ps(c4));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c3));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c2));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c1));
  // "maskz": of the plain form, g++ 12 says that it uses what is not initialised.
  const __m512 power = _mm512_castsi512_ps(_mm512_maskz_slli_epi32(0xFFFF, _mm512_castps_si512(shifted), 23));
  const __mmask16 no_underflow = _mm512_cmp_ps_mask(argument, _mm512_set1_ps(lowest), _CMP_NLT_UQ);
  return _mm512_maskz_fmadd_ps(no_underflow, _mm512_mul_ps(p, r), power, power);
}

}  // namespace avx512
#endif

}  // namespace compresskv::kernel
