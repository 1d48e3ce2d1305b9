#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace compresskv::kernel {

/// One exp polynomial for all code paths (Cephes' coefficients, degree 6 after range reduction to |r| <= ln 2
/// / 2). For arguments <= 0, relative error below 2e-7; below -87 the result is 0, NaN stays NaN. Products
/// are fused explicitly, so that no compiler flag changes a bit.
namespace exp_constants {
inline constexpr float lowest = -87.0F;  // e^-87 is the last that stays a normal number
inline constexpr float log2_e = 1.44269504F;
inline constexpr float round_shift =
    12582912.0F;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
inline constexpr float ln2_high = 0.693359375F;
inline constexpr float ln2_low = -2.12194440e-4F;
inline constexpr float p0 = 1.9875691500e-4F;
inline constexpr float p1 = 1.3981999507e-3F;
inline constexpr float p2 = 8.3334519073e-3F;
inline constexpr float p3 = 4.1665795894e-2F;
inline constexpr float p4 = 1.6666665459e-1F;
inline constexpr float p5 = 5.0000001201e-1F;
}  // namespace exp_constants

namespace portable {

inline float exp(float argument) {
  using namespace exp_constants;
  if (!(argument >= lowest)) {
    return argument < lowest ? 0.0F : argument;
  }
  const float shifted = std::fma(argument, log2_e, round_shift);
  const float n = shifted - round_shift;
  float r = std::fma(n, -ln2_high, argument);
  r = std::fma(n, -ln2_low, r);
  float p = std::fma(p0, r, p1);
  p = std::fma(p, r, p2);
  p = std::fma(p, r, p3);
  p = std::fma(p, r, p4);
  p = std::fma(p, r, p5);
  const float square = r * r;
  const float value = std::fma(p, square, r) + 1.0F;
  return std::bit_cast<float>(std::bit_cast<std::uint32_t>(value) +
                              (std::bit_cast<std::uint32_t>(shifted) << 23U));
}

}  // namespace portable

#if defined(__x86_64__)
namespace avx2 {

[[gnu::target("avx2,fma"), gnu::always_inline]] inline __m256 exp(__m256 argument) {
  using namespace exp_constants;
  const __m256 x = _mm256_max_ps(_mm256_set1_ps(lowest), argument);
  const __m256 shifted = _mm256_fmadd_ps(x, _mm256_set1_ps(log2_e), _mm256_set1_ps(round_shift));
  const __m256 n = _mm256_sub_ps(shifted, _mm256_set1_ps(round_shift));
  __m256 r = _mm256_fmadd_ps(n, _mm256_set1_ps(-ln2_high), x);
  r = _mm256_fmadd_ps(n, _mm256_set1_ps(-ln2_low), r);
  __m256 p = _mm256_fmadd_ps(_mm256_set1_ps(p0), r, _mm256_set1_ps(p1));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(p2));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(p3));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(p4));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(p5));
  const __m256 square = _mm256_mul_ps(r, r);
  const __m256 value = _mm256_add_ps(_mm256_fmadd_ps(p, square, r), _mm256_set1_ps(1.0F));
  const __m256i power = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
  const __m256 scaled = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(value), power));
  const __m256 underflow = _mm256_cmp_ps(argument, _mm256_set1_ps(lowest), _CMP_LT_OQ);
  // Of a NaN the shift by `power` would make a number: whatever went in, NaN must come out.
  const __m256 not_a_number = _mm256_cmp_ps(argument, argument, _CMP_UNORD_Q);
  return _mm256_or_ps(_mm256_andnot_ps(underflow, scaled), not_a_number);
}

}  // namespace avx2

namespace avx512 {

[[gnu::target("avx2,fma,avx512f,avx512vl,avx512dq"), gnu::always_inline]] inline __m512 exp(__m512 argument) {
  using namespace exp_constants;
  // "maskz": of the plain forms of some, g++ 12 says that they use what is not initialised.
  constexpr __mmask16 all = 0xFFFF;
  const __m512 x = _mm512_maskz_max_ps(all, _mm512_set1_ps(lowest), argument);
  const __m512 shifted = _mm512_fmadd_ps(x, _mm512_set1_ps(log2_e), _mm512_set1_ps(round_shift));
  const __m512 n = _mm512_sub_ps(shifted, _mm512_set1_ps(round_shift));
  __m512 r = _mm512_fmadd_ps(n, _mm512_set1_ps(-ln2_high), x);
  r = _mm512_fmadd_ps(n, _mm512_set1_ps(-ln2_low), r);
  __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(p0), r, _mm512_set1_ps(p1));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(p2));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(p3));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(p4));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(p5));
  const __m512 square = _mm512_mul_ps(r, r);
  const __m512 value = _mm512_add_ps(_mm512_fmadd_ps(p, square, r), _mm512_set1_ps(1.0F));
  const __m512i power = _mm512_maskz_slli_epi32(all, _mm512_castps_si512(shifted), 23);
  const __m512 scaled = _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(value), power));
  const __mmask16 underflow = _mm512_cmp_ps_mask(argument, _mm512_set1_ps(lowest), _CMP_LT_OQ);
  const __mmask16 not_a_number = _mm512_cmp_ps_mask(argument, argument, _CMP_UNORD_Q);
  const __m512 number = _mm512_mask_mov_ps(scaled, underflow, _mm512_setzero_ps());
  return _mm512_mask_mov_ps(number, not_a_number, argument);
}

}  // namespace avx512
#endif

}  // namespace compresskv::kernel
