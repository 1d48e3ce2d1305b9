#pragma once

#include <cstddef>

#include "compresskv/core/float_bits.hpp"
#include "compresskv/kernel/lanes.hpp"
#include "compresskv/kernel/softmax_portable.hpp"
#include "compresskv/kernel/x86/exp2_avx2_avx512.hpp"

#if defined(__x86_64__)
#include <immintrin.h>

#include "compresskv/core/strict_float_begin.hpp"

// `exp2_row` stands here in two widths; why not as one template: x86/exp2_avx2_avx512.hpp. The other
// functions gain nothing from wider registers.
namespace compresskv::kernel {

namespace avx2 {

[[gnu::target("avx2,fma")]] inline float row_max(const float* row, std::size_t count) {
  __m256 max0 = _mm256_set1_ps(compresskv::detail::minus_infinity);
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

[[gnu::target("avx2,fma")]] inline Exp2Sum exp2_row(float* row, std::size_t count) {
  const float max = avx2::row_max(row, count);
  const float shift = portable::shift_of(max);
  const __m256 shifts = _mm256_set1_ps(shift);
  __m256 low = _mm256_setzero_ps();
  __m256 high = low;
  std::size_t t = 0;
  for (; t + lane_count <= count; t += lane_count) {
    const __m256 e0 = avx2::exp2(_mm256_loadu_ps(row + t) - shifts);
    const __m256 e1 = avx2::exp2(_mm256_loadu_ps(row + t + 8) - shifts);
    _mm256_storeu_ps(row + t, e0);
    _mm256_storeu_ps(row + t + 8, e1);
    low = low + e0;
    high = high + e1;
  }
  Lanes lanes;
  _mm256_storeu_ps(lanes.data(), low);
  _mm256_storeu_ps(lanes.data() + 8, high);
  portable::exp2_tail(row, t, count, shift, lanes);
  return {.max = max, .sum = kernel::fold(lanes)};
}

[[gnu::target("avx2,fma")]] inline void soft_cap(float* row, std::size_t count, float cap) {
  const __m256 inverse = _mm256_set1_ps(1.0F / cap);
  const __m256 sign = _mm256_set1_ps(-0.0F);
  const __m256 one = _mm256_set1_ps(1.0F);
  std::size_t t = 0;
  for (; t + 8 <= count; t += 8) {
    const __m256 logit = _mm256_loadu_ps(row + t);
    const __m256 magnitude = _mm256_andnot_ps(sign, logit * inverse);
    const __m256 decay = avx2::exp2(_mm256_set1_ps(-2.0F * log2_e) * magnitude);
    const __m256 capped = _mm256_set1_ps(cap) * ((one - decay) / (one + decay));
    _mm256_storeu_ps(row + t, _mm256_or_ps(capped, _mm256_and_ps(sign, logit)));
  }
  portable::soft_cap(row, t, count, cap);
}

/// The totals of some tokens stay in registers while all rows are taken in: added, or the largest kept.
template <bool largest, std::size_t registers>
[[gnu::target("avx2,fma"), gnu::always_inline]] inline void fold_scaled_at(const ScaledRows& rows,
                                                                           std::size_t t, float* totals) {
  __m256 own[registers];
#pragma GCC unroll 4
  for (std::size_t i = 0; i < registers; ++i) {
    own[i] = _mm256_loadu_ps(totals + t + 8 * i);
  }
  for (std::size_t row = 0; row < rows.count; ++row) {
    const __m256 factor = _mm256_set1_ps(rows.factor(row));
#pragma GCC unroll 4
    for (std::size_t i = 0; i < registers; ++i) {
      const __m256 weights = _mm256_loadu_ps(rows.row(row) + t + 8 * i);
      if constexpr (largest) {
        own[i] = _mm256_max_ps(weights * factor, own[i]);
      } else {
        own[i] = _mm256_fmadd_ps(weights, factor, own[i]);
      }
    }
  }
#pragma GCC unroll 4
  for (std::size_t i = 0; i < registers; ++i) {
    _mm256_storeu_ps(totals + t + 8 * i, own[i]);
  }
}

/// How many tokens were taken in: whole registers of them.
template <bool largest>
[[gnu::target("avx2,fma"), gnu::always_inline]] inline std::size_t fold_scaled(const ScaledRows& rows,
                                                                               std::size_t tokens,
                                                                               float* totals) {
  std::size_t t = 0;
  for (; t + 32 <= tokens; t += 32) {
    fold_scaled_at<largest, 4>(rows, t, totals);
  }
  for (; t + 8 <= tokens; t += 8) {
    fold_scaled_at<largest, 1>(rows, t, totals);
  }
  return t;
}

[[gnu::target("avx2,fma")]] inline void add_scaled(const ScaledRows& rows, std::size_t tokens, float* sums) {
  portable::add_scaled(rows, fold_scaled<false>(rows, tokens, sums), tokens, sums);
}

[[gnu::target("avx2,fma")]] inline void max_scaled(const ScaledRows& rows, std::size_t tokens,
                                                   float* maxima) {
  portable::max_scaled(rows, fold_scaled<true>(rows, tokens, maxima), tokens, maxima);
}

}  // namespace avx2

namespace avx512 {

/// All lanes in one register; the same bits.
[[gnu::target("avx2,fma,avx512f,avx512vl,avx512dq")]] inline Exp2Sum exp2_row(float* row, std::size_t count) {
  const float max = avx2::row_max(row, count);
  const float shift = portable::shift_of(max);
  const __m512 shifts = _mm512_set1_ps(shift);
  __m512 sums = _mm512_setzero_ps();
  std::size_t t = 0;
  for (; t + lane_count <= count; t += lane_count) {
    const __m512 e = avx512::exp2(_mm512_loadu_ps(row + t) - shifts);
    _mm512_storeu_ps(row + t, e);
    sums = sums + e;
  }
  Lanes lanes;
  _mm512_storeu_ps(lanes.data(), sums);
  portable::exp2_tail(row, t, count, shift, lanes);
  return {.max = max, .sum = kernel::fold(lanes)};
}

}  // namespace avx512

}  // namespace compresskv::kernel

#include "compresskv/core/strict_float_end.hpp"
#endif
