#pragma once

#include <cstddef>

#if defined(__x86_64__)
#include <immintrin.h>

#include "compresskv/core/strict_float_begin.hpp"

namespace compresskv::kernel::avx2 {

/// Adds the products of whole blocks of 16 elements to their lanes, in float64. Returns how many elements.
[[gnu::target("avx2")]] inline std::size_t add_products(const float* a, const float* b, std::size_t count,
                                                        double* lanes) {
  __m256d sums[4] = {_mm256_loadu_pd(lanes), _mm256_loadu_pd(lanes + 4), _mm256_loadu_pd(lanes + 8),
                     _mm256_loadu_pd(lanes + 12)};
  std::size_t e = 0;
  for (; e + 16 <= count; e += 16) {
    for (std::size_t i = 0; i < 4; ++i) {
      const __m256d x = _mm256_cvtps_pd(_mm_loadu_ps(a + e + 4 * i));
      const __m256d y = _mm256_cvtps_pd(_mm_loadu_ps(b + e + 4 * i));
      sums[i] = _mm256_add_pd(sums[i], _mm256_mul_pd(x, y));
    }
  }
  for (std::size_t i = 0; i < 4; ++i) {
    _mm256_storeu_pd(lanes + 4 * i, sums[i]);
  }
  return e;
}

}  // namespace compresskv::kernel::avx2

#include "compresskv/core/strict_float_end.hpp"
#endif
