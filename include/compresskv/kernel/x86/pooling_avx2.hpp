#pragma once

#include <cstddef>
#include <span>

#include "compresskv/kernel/pooling_portable.hpp"

#if defined(__x86_64__)
#include <immintrin.h>

#include "compresskv/core/strict_float_begin.hpp"

namespace compresskv::kernel::avx2 {

/// As portable::add_pooled for `8 * registers` tokens from `t` on, all of whose neighbours exist.
template <Pool pool, std::size_t registers>
[[gnu::target("avx2,fma"), gnu::always_inline]] inline void add_pooled_at(const float* in, std::size_t width,
                                                                          std::size_t t, float* out) {
  const float* from = in + t - width / 2;
  __m256 values[registers];
#pragma GCC unroll 4
  for (std::size_t i = 0; i < registers; ++i) {
    values[i] = _mm256_loadu_ps(from + 8 * i);
  }
  for (std::size_t j = 1; j < width; ++j) {
#pragma GCC unroll 4
    for (std::size_t i = 0; i < registers; ++i) {
      const __m256 next = _mm256_loadu_ps(from + j + 8 * i);
      // Of equal numbers the second operand, as the portable path keeps the first.
      values[i] = pool == Pool::average ? values[i] + next : _mm256_max_ps(next, values[i]);
    }
  }
  const __m256 divisor = _mm256_set1_ps(static_cast<float>(width));
#pragma GCC unroll 4
  for (std::size_t i = 0; i < registers; ++i) {
    const __m256 value = pool == Pool::average ? values[i] / divisor : values[i];
    _mm256_storeu_ps(out + t + 8 * i, _mm256_loadu_ps(out + t + 8 * i) + value);
  }
}

/// As portable::add_pooled for what fills registers; returns where it stopped.
template <Pool pool>
[[gnu::target("avx2,fma")]] inline std::size_t add_pooled(const float* in, std::size_t width,
                                                          std::size_t first, std::size_t last, float* out) {
  std::size_t t = first;
  for (; t + 32 <= last; t += 32) {
    add_pooled_at<pool, 4>(in, width, t, out);
  }
  for (; t + 8 <= last; t += 8) {
    add_pooled_at<pool, 1>(in, width, t, out);
  }
  return t;
}

/// Divides what fills registers; returns where it stopped.
[[gnu::target("avx2,fma")]] inline std::size_t divide(std::span<float> sums, float count) {
  const __m256 divisor = _mm256_set1_ps(count);
  std::size_t t = 0;
  for (; t + 8 <= sums.size(); t += 8) {
    _mm256_storeu_ps(&sums[t], _mm256_loadu_ps(&sums[t]) / divisor);
  }
  return t;
}

}  // namespace compresskv::kernel::avx2

#include "compresskv/core/strict_float_end.hpp"
#endif
