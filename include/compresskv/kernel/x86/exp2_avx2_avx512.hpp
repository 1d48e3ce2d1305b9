#pragma once

#include <bit>
#include <cstdint>

#include "compresskv/kernel/exp2.hpp"

#if defined(__x86_64__)
#include <immintrin.h>

#include "compresskv/core/strict_float_begin.hpp"

// Two widths side by side. One template cannot serve both: its target attribute cannot depend on its
// argument, and without that attribute neither g++ nor clang inlines the intrinsics. A macro could; the
// library has none.
namespace compresskv::kernel {

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

}  // namespace compresskv::kernel

#include "compresskv/core/strict_float_end.hpp"
#endif
