#pragma once

#include <cstddef>

#if defined(__x86_64__)
#include <immintrin.h>

#include <limits>

#include "compresskv/core/strict_float_begin.hpp"

// The blocks of eight of kernel/scaled_deviation.hpp; each function returns how many elements it has done.

namespace compresskv::kernel::avx2 {

[[gnu::target("avx2")]] inline std::size_t widen(const float* row, std::size_t count, float* least,
                                                 float* largest, bool& finite) {
  const __m256i exponent = _mm256_set1_epi32(0x7F800000);
  __m256i bad = _mm256_setzero_si256();
  std::size_t e = 0;
  for (; e + 8 <= count; e += 8) {
    const __m256 values = _mm256_loadu_ps(row + e);
    const __m256i bits = _mm256_and_si256(_mm256_castps_si256(values), exponent);
    bad = _mm256_or_si256(bad, _mm256_cmpeq_epi32(bits, exponent));
    // Of equal ones, and where one is NaN, the second stays.
    _mm256_storeu_ps(least + e, _mm256_min_ps(values, _mm256_loadu_ps(least + e)));
    _mm256_storeu_ps(largest + e, _mm256_max_ps(values, _mm256_loadu_ps(largest + e)));
  }
  finite = _mm256_testz_si256(bad, bad) != 0;
  return e;
}

/// Four elements between their bounds, as `portable::scaled` has it.
[[gnu::target("avx2"), gnu::always_inline]] inline __m128 scaled4(const float* row, const float* least,
                                                                  const float* largest) {
  const __m256d most = _mm256_set1_pd(static_cast<double>((std::numeric_limits<float>::max)()));
  const __m256d none = _mm256_set1_pd(std::numeric_limits<double>::infinity());
  const __m256d from = _mm256_cvtps_pd(_mm_loadu_ps(least));
  const __m256d spread = _mm256_sub_pd(_mm256_cvtps_pd(_mm_loadu_ps(largest)), from);
  const __m256d some = _mm256_cmp_pd(spread, _mm256_setzero_pd(), _CMP_GT_OQ);
  const __m256d share = _mm256_div_pd(_mm256_sub_pd(_mm256_cvtps_pd(_mm_loadu_ps(row)), from),
                                      _mm256_blendv_pd(none, spread, some));
  return _mm256_cvtpd_ps(_mm256_max_pd(_mm256_sub_pd(_mm256_setzero_pd(), most), _mm256_min_pd(most, share)));
}

[[gnu::target("avx2")]] inline std::size_t scale(const float* row, std::size_t count, const float* least,
                                                 const float* largest, float* scaled, double* sums) {
  __m256d low = _mm256_loadu_pd(sums);
  __m256d high = _mm256_loadu_pd(sums + 4);
  std::size_t e = 0;
  for (; e + 8 <= count; e += 8) {
    const __m128 first = scaled4(row + e, least + e, largest + e);
    const __m128 second = scaled4(row + e + 4, least + e + 4, largest + e + 4);
    _mm_storeu_ps(scaled + e, first);
    _mm_storeu_ps(scaled + e + 4, second);
    low = _mm256_add_pd(low, _mm256_cvtps_pd(first));
    high = _mm256_add_pd(high, _mm256_cvtps_pd(second));
  }
  _mm256_storeu_pd(sums, low);
  _mm256_storeu_pd(sums + 4, high);
  return e;
}

[[gnu::target("avx2")]] inline std::size_t add_squares(const float* scaled, std::size_t count, double mean,
                                                       double* sums) {
  const __m256d middle = _mm256_set1_pd(mean);
  __m256d low = _mm256_loadu_pd(sums);
  __m256d high = _mm256_loadu_pd(sums + 4);
  std::size_t e = 0;
  for (; e + 8 <= count; e += 8) {
    const __m256d first = _mm256_sub_pd(_mm256_cvtps_pd(_mm_loadu_ps(scaled + e)), middle);
    const __m256d second = _mm256_sub_pd(_mm256_cvtps_pd(_mm_loadu_ps(scaled + e + 4)), middle);
    low = _mm256_add_pd(low, _mm256_mul_pd(first, first));
    high = _mm256_add_pd(high, _mm256_mul_pd(second, second));
  }
  _mm256_storeu_pd(sums, low);
  _mm256_storeu_pd(sums + 4, high);
  return e;
}

}  // namespace compresskv::kernel::avx2

#include "compresskv/core/strict_float_end.hpp"
#endif
