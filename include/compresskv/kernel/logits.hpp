#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>

#include "compresskv/core/element.hpp"
#include "compresskv/kernel/code_path.hpp"
#include "compresskv/kernel/decode_row.hpp"
#include "compresskv/kernel/lanes.hpp"
#include "compresskv/view/run.hpp"

namespace compresskv::kernel {

/// Queries made ready for the dot products: float32 `[count][round_up_to_lanes(head_dim)]`, padded with
/// zeros.
struct QueryBlock {
  const float* data = nullptr;
  std::size_t count = 0;
  std::size_t head_dim = 0;
};

namespace portable {

/// `out[q * out_stride] = scale * (query q . key)` for one decoded key.
inline void dot_row(const float* key, const QueryBlock& queries, float scale, float* out,
                    std::size_t out_stride) {
  const std::size_t padded = round_up_to_lanes(queries.head_dim);
  for (std::size_t q = 0; q < queries.count; ++q) {
    const float* query = queries.data + q * padded;
    Lanes lanes{};
    for (std::size_t e = 0; e < queries.head_dim; ++e) {
      lanes[e % lane_count] = std::fma(query[e], key[e], lanes[e % lane_count]);
    }
    out[q * out_stride] = kernel::fold(lanes) * scale;
  }
}

}  // namespace portable

#if defined(__x86_64__)
namespace avx2 {

/// As portable::dot_row; reads `padded` elements of the key.
template <Element T>
[[gnu::target("avx2,fma,f16c")]] inline void dot_row(const T* key, const QueryBlock& queries, float scale,
                                                     float* out, std::size_t out_stride) {
  const std::size_t padded = round_up_to_lanes(queries.head_dim);
  std::size_t q = 0;
  // Four queries a pass: eight accumulators hide the latency of the multiply-adds and still fit the
  // registers.
  for (; q + 4 <= queries.count; q += 4) {
    const float* q0 = queries.data + q * padded;
    const float* q1 = q0 + padded;
    const float* q2 = q1 + padded;
    const float* q3 = q2 + padded;
    __m256 low0 = _mm256_setzero_ps();
    __m256 low1 = low0;
    __m256 low2 = low0;
    __m256 low3 = low0;
    __m256 high0 = low0;
    __m256 high1 = low0;
    __m256 high2 = low0;
    __m256 high3 = low0;
    for (std::size_t e = 0; e < padded; e += lane_count) {
      const __m256 low = load8(key + e);
      const __m256 high = load8(key + e + 8);
      low0 = _mm256_fmadd_ps(_mm256_loadu_ps(q0 + e), low, low0);
      high0 = _mm256_fmadd_ps(_mm256_loadu_ps(q0 + e + 8), high, high0);
      low1 = _mm256_fmadd_ps(_mm256_loadu_ps(q1 + e), low, low1);
      high1 = _mm256_fmadd_ps(_mm256_loadu_ps(q1 + e + 8), high, high1);
      low2 = _mm256_fmadd_ps(_mm256_loadu_ps(q2 + e), low, low2);
      high2 = _mm256_fmadd_ps(_mm256_loadu_ps(q2 + e + 8), high, high2);
      low3 = _mm256_fmadd_ps(_mm256_loadu_ps(q3 + e), low, low3);
      high3 = _mm256_fmadd_ps(_mm256_loadu_ps(q3 + e + 8), high, high3);
    }
    __m128 lane0 = fold_to_four(low0, high0);
    __m128 lane1 = fold_to_four(low1, high1);
    __m128 lane2 = fold_to_four(low2, high2);
    __m128 lane3 = fold_to_four(low3, high3);
    _MM_TRANSPOSE4_PS(lane0, lane1, lane2, lane3);
    const __m128 sums = _mm_add_ps(_mm_add_ps(lane0, lane2), _mm_add_ps(lane1, lane3));
    alignas(16) float scaled[4];
    _mm_store_ps(scaled, _mm_mul_ps(sums, _mm_set1_ps(scale)));
    for (std::size_t i = 0; i < 4; ++i) {
      out[(q + i) * out_stride] = scaled[i];
    }
  }
  for (; q < queries.count; ++q) {
    const float* query = queries.data + q * padded;
    __m256 low = _mm256_setzero_ps();
    __m256 high = low;
    for (std::size_t e = 0; e < padded; e += lane_count) {
      low = _mm256_fmadd_ps(_mm256_loadu_ps(query + e), load8(key + e), low);
      high = _mm256_fmadd_ps(_mm256_loadu_ps(query + e + 8), load8(key + e + 8), high);
    }
    out[q * out_stride] = fold(low, high) * scale;
  }
}

/// Keys side by side, `head_dim` a multiple of the lanes.
template <Element T>
[[gnu::target("avx2,fma,f16c")]] inline void dot_rows(const Run<const T>& keys, std::size_t first,
                                                      std::size_t count, const QueryBlock& queries,
                                                      float scale, float* out, std::size_t out_stride) {
  for (std::size_t i = 0; i < count; ++i) {
    avx2::dot_row(keys.row(first + i), queries, scale, out + i, out_stride);
  }
}

}  // namespace avx2
#endif

/// Attention logits of every query with `count` keys from row `first` of a run:
/// `out[q * out_stride + i] = scale * (query q . key first + i)`.
///
/// `row_buffer` has `round_up_to_lanes(head_dim)` floats, for keys that must be decoded first: quantised
/// ones, and layouts that do not hold a row side by side. Cost: each key is read once, 2 * head_dim flops a
/// query and key.
template <Stored T>
void logits(const Run<const T>& keys, std::size_t first, std::size_t count, const QueryBlock& queries,
            float scale, float* row_buffer, float* out, std::size_t out_stride) {
  const std::size_t head_dim = queries.head_dim;
#if defined(__x86_64__)
  if (code_path() == CodePath::avx2) {
    if constexpr (Element<T>) {
      if (keys.chunk >= head_dim && head_dim % lane_count == 0) {
        avx2::dot_rows(keys, first, count, queries, scale, out, out_stride);
        return;
      }
    }
    std::fill(row_buffer + head_dim, row_buffer + round_up_to_lanes(head_dim), 0.0F);
    for (std::size_t i = 0; i < count; ++i) {
      decode_row(keys, first + i, head_dim, row_buffer);
      avx2::dot_row(row_buffer, queries, scale, out + i, out_stride);
    }
    return;
  }
#endif
  for (std::size_t i = 0; i < count; ++i) {
    decode_row(keys, first + i, head_dim, row_buffer);
    portable::dot_row(row_buffer, queries, scale, out + i, out_stride);
  }
}

}  // namespace compresskv::kernel
