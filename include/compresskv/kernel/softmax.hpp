#pragma once

#include <cmath>
#include <cstddef>
#include <limits>

#include "compresskv/kernel/code_path.hpp"
#include "compresskv/kernel/exp.hpp"
#include "compresskv/kernel/lanes.hpp"

namespace compresskv::kernel {

/// What `exp_row` knows of a row beside its values.
struct ExpSum {
  float max;  ///< highest logit; NaN ones are not looked at
  float sum;  ///< of `e^(logit - max)`
};

namespace portable {

inline float row_max(const float* row, std::size_t count) {
  float max = -std::numeric_limits<float>::infinity();
  for (std::size_t t = 0; t < count; ++t) {
    max = row[t] > max ? row[t] : max;
  }
  return max;
}

inline void exp_tail(float* row, std::size_t first, std::size_t count, float max, Lanes& lanes) {
  for (std::size_t t = first; t < count; ++t) {
    row[t] = exp(row[t] - max);
    lanes[t % lane_count] += row[t];
  }
}

inline ExpSum exp_row(float* row, std::size_t count) {
  const float max = row_max(row, count);
  Lanes lanes{};
  exp_tail(row, 0, count, max, lanes);
  return {.max = max, .sum = kernel::fold(lanes)};
}

inline void soft_cap(float* row, std::size_t first, std::size_t count, float cap) {
  const float inverse = 1.0F / cap;
  for (std::size_t t = first; t < count; ++t) {
    // tanh |x| = (1 - e^-2|x|) / (1 + e^-2|x|), so that one exp serves all code paths.
    const float decay = exp(-2.0F * std::fabs(row[t] * inverse));
    row[t] = std::copysign(cap * ((1.0F - decay) / (1.0F + decay)), row[t]);
  }
}

inline void add_scaled(const float* row, float factor, std::size_t first, std::size_t count, float* sums) {
  for (std::size_t t = first; t < count; ++t) {
    sums[t] = std::fma(row[t], factor, sums[t]);
  }
}

}  // namespace portable

#if defined(__x86_64__)
namespace avx2 {

[[gnu::target("avx2,fma")]] inline float row_max(const float* row, std::size_t count) {
  __m256 max0 = _mm256_set1_ps(-std::numeric_limits<float>::infinity());
  __m256 max1 = max0;
  std::size_t t = 0;
  for (; t + lane_count <= count; t += lane_count) {
    // With the row first, a NaN in it gives way to the maximum so far, as in the portable path.
    max0 = _mm256_max_ps(_mm256_loadu_ps(row + t), max0);
    max1 = _mm256_max_ps(_mm256_loadu_ps(row + t + 8), max1);
  }
  alignas(32) float lanes[8];
  _mm256_store_ps(lanes, _mm256_max_ps(max0, max1));
  const float head = portable::row_max(lanes, 8);
  const float tail = portable::row_max(row + t, count - t);
  return tail > head ? tail : head;
}

[[gnu::target("avx2,fma")]] inline ExpSum exp_row(float* row, std::size_t count) {
  const float max = avx2::row_max(row, count);
  const __m256 shift = _mm256_set1_ps(max);
  __m256 low = _mm256_setzero_ps();
  __m256 high = low;
  std::size_t t = 0;
  for (; t + lane_count <= count; t += lane_count) {
    const __m256 e0 = avx2::exp(_mm256_sub_ps(_mm256_loadu_ps(row + t), shift));
    const __m256 e1 = avx2::exp(_mm256_sub_ps(_mm256_loadu_ps(row + t + 8), shift));
    _mm256_storeu_ps(row + t, e0);
    _mm256_storeu_ps(row + t + 8, e1);
    low = _mm256_add_ps(low, e0);
    high = _mm256_add_ps(high, e1);
  }
  Lanes lanes;
  _mm256_storeu_ps(lanes.data(), low);
  _mm256_storeu_ps(lanes.data() + 8, high);
  portable::exp_tail(row, t, count, max, lanes);
  return {.max = max, .sum = kernel::fold(lanes)};
}

[[gnu::target("avx2,fma")]] inline void soft_cap(float* row, std::size_t count, float cap) {
  const __m256 inverse = _mm256_set1_ps(1.0F / cap);
  const __m256 sign = _mm256_set1_ps(-0.0F);
  const __m256 one = _mm256_set1_ps(1.0F);
  std::size_t t = 0;
  for (; t + 8 <= count; t += 8) {
    const __m256 logit = _mm256_loadu_ps(row + t);
    const __m256 magnitude = _mm256_andnot_ps(sign, _mm256_mul_ps(logit, inverse));
    const __m256 decay = avx2::exp(_mm256_mul_ps(_mm256_set1_ps(-2.0F), magnitude));
    const __m256 capped = _mm256_mul_ps(_mm256_set1_ps(cap),
                                        _mm256_div_ps(_mm256_sub_ps(one, decay), _mm256_add_ps(one, decay)));
    _mm256_storeu_ps(row + t, _mm256_or_ps(capped, _mm256_and_ps(sign, logit)));
  }
  portable::soft_cap(row, t, count, cap);
}

[[gnu::target("avx2,fma")]] inline void add_scaled(const float* row, float factor, std::size_t count,
                                                   float* sums) {
  const __m256 factors = _mm256_set1_ps(factor);
  std::size_t t = 0;
  for (; t + 8 <= count; t += 8) {
    _mm256_storeu_ps(sums + t, _mm256_fmadd_ps(_mm256_loadu_ps(row + t), factors, _mm256_loadu_ps(sums + t)));
  }
  portable::add_scaled(row, factor, t, count, sums);
}

}  // namespace avx2

namespace avx512 {

/// Sixteen lanes in one register; the same bits.
[[gnu::target("avx2,fma,avx512f,avx512vl,avx512dq")]] inline ExpSum exp_row(float* row, std::size_t count) {
  const float max = avx2::row_max(row, count);
  const __m512 shift = _mm512_set1_ps(max);
  __m512 sums = _mm512_setzero_ps();
  std::size_t t = 0;
  for (; t + lane_count <= count; t += lane_count) {
    const __m512 e = avx512::exp(_mm512_sub_ps(_mm512_loadu_ps(row + t), shift));
    _mm512_storeu_ps(row + t, e);
    sums = _mm512_add_ps(sums, e);
  }
  Lanes lanes;
  _mm512_storeu_ps(lanes.data(), sums);
  portable::exp_tail(row, t, count, max, lanes);
  return {.max = max, .sum = kernel::fold(lanes)};
}

}  // namespace avx512
#endif

/// Replaces `count` logits by `e^(logit - max)`: softmax but for the division by the sum. -inf gives 0; a
/// NaN, a +inf or a row of -inf alone gives a sum that is not finite.
inline ExpSum exp_row(float* row, std::size_t count) {
#if defined(__x86_64__)
  if (uses(CodePath::avx512)) {
    return avx512::exp_row(row, count);
  }
  if (uses(CodePath::avx2)) {
    return avx2::exp_row(row, count);
  }
#endif
  return portable::exp_row(row, count);
}

/// `row[t] = cap * tanh(row[t] / cap)`, absolute error below 2e-7 cap. NaN stays NaN.
inline void soft_cap_row(float* row, std::size_t count, float cap) {
#if defined(__x86_64__)
  if (uses(CodePath::avx2)) {
    avx2::soft_cap(row, count, cap);
    return;
  }
#endif
  portable::soft_cap(row, 0, count, cap);
}

/// `sums[t] += factor * row[t]`, one rounding each.
inline void add_scaled(const float* row, float factor, std::size_t count, float* sums) {
#if defined(__x86_64__)
  if (uses(CodePath::avx2)) {
    avx2::add_scaled(row, factor, count, sums);
    return;
  }
#endif
  portable::add_scaled(row, factor, 0, count, sums);
}

}  // namespace compresskv::kernel
