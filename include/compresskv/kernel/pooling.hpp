#pragma once

#include <algorithm>
#include <cstddef>
#include <span>

#include "compresskv/core/error.hpp"
#include "compresskv/core/float_mode.hpp"
#include "compresskv/kernel/code_path.hpp"
#include "compresskv/kernel/pool.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "compresskv/core/strict_float_begin.hpp"

namespace compresskv::kernel {

/// Throws ArgumentError for an even width: it would change the length.
inline void check_pool_width(std::size_t width) {
  compresskv::detail::require(width % 2 == 1, "pooling width is ", width,
                              ", must be odd so that every token keeps its place");
}

namespace portable {

/// `out[t] += pool(in)[t]` for `first <= t < last`.
inline void add_pooled(std::span<const float> in, Pool pool, std::size_t width, std::size_t first,
                       std::size_t last, std::span<float> out) {
  const std::size_t reach = width / 2;
  for (std::size_t t = first; t < last; ++t) {
    const std::size_t end = (std::min)(t + reach + 1, in.size());
    std::size_t j = t < reach ? 0 : t - reach;
    float value = in[j];
    while (++j < end) {
      value = pool == Pool::average ? value + in[j] : (value < in[j] ? in[j] : value);
    }
    out[t] += pool == Pool::average ? value / static_cast<float>(width) : value;
  }
}

}  // namespace portable

#if defined(__x86_64__)
namespace avx2 {

/// The same for `8 * registers` tokens from `t` on with all their neighbours inside.
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

/// The same for all of them; returns where it stopped.
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

/// Divides as many as fill registers; returns where it stopped.
[[gnu::target("avx2,fma")]] inline std::size_t divide(std::span<float> sums, float count) {
  const __m256 divisor = _mm256_set1_ps(count);
  std::size_t t = 0;
  for (; t + 8 <= sums.size(); t += 8) {
    _mm256_storeu_ps(&sums[t], _mm256_loadu_ps(&sums[t]) / divisor);
  }
  return t;
}

}  // namespace avx2
#endif

/// `out[t] += pool(in)[t]`, stride 1, same length. `in` must not be NaN. Cost: width adds a token.
inline void add_pooled(std::span<const float> in, Pool pool, std::size_t width, std::span<float> out) {
  std::size_t done = 0;
#if defined(__x86_64__)
  const std::size_t reach = width / 2;
  if (uses(CodePath::avx2) && in.size() >= width + 8) {
    portable::add_pooled(in, pool, width, 0, reach, out);
    const auto inside = pool == Pool::average ? avx2::add_pooled<Pool::average> : avx2::add_pooled<Pool::max>;
    done = inside(in.data(), width, reach, in.size() - reach, out.data());
  }
#endif
  portable::add_pooled(in, pool, width, done, in.size(), out);
}

/// Sums to means: each divided by `count`.
inline void divide(std::span<float> sums, std::size_t count) {
  const compresskv::detail::PlainFloats plain;
  const auto divisor = static_cast<float>(count);
  std::size_t t = 0;
#if defined(__x86_64__)
  if (uses(CodePath::avx2)) {
    t = avx2::divide(sums, divisor);
  }
#endif
  for (; t < sums.size(); ++t) {
    sums[t] /= divisor;
  }
}

}  // namespace compresskv::kernel

#include "compresskv/core/strict_float_end.hpp"
