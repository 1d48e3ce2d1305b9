#pragma once

#include "compresskv/core/element.hpp"
#include "compresskv/kernel/lanes.hpp"

#if defined(__x86_64__)
#include <immintrin.h>

#include "compresskv/core/strict_float_begin.hpp"

namespace compresskv::kernel::avx2 {

[[gnu::target("avx2,fma,f16c"), gnu::always_inline]] inline __m256 load8(const float* from) {
  return _mm256_loadu_ps(from);
}
[[gnu::target("avx2,fma,f16c"), gnu::always_inline]] inline __m256 load8(const half* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
[[gnu::target("avx2,fma,f16c"), gnu::always_inline]] inline __m256 load8(const bfloat16* from) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

/// Lanes 0..7 and 8..15 folded, in the order of `fold`.
[[gnu::target("avx2,fma"), gnu::always_inline]] inline float fold(__m256 low, __m256 high) {
  const __m256 eight = low + high;
  const __m128 four = _mm256_castps256_ps128(eight) + _mm256_extractf128_ps(eight, 1);
  const __m128 two = four + _mm_movehl_ps(four, four);
  return _mm_cvtss_f32(two + _mm_shuffle_ps(two, two, 1));
}

}  // namespace compresskv::kernel::avx2

#include "compresskv/core/strict_float_end.hpp"
#endif
