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

/// Folds the sums of four queries with one key, scales them and stores them `out_stride` apart.
[[gnu::target("avx2,fma"), gnu::always_inline]] inline void store_four(const __m256* low, const __m256* high,
                                                                       float scale, float* out,
                                                                       std::size_t out_stride) {
  __m128 lane0 = fold_to_four(low[0], high[0]);
  __m128 lane1 = fold_to_four(low[1], high[1]);
  __m128 lane2 = fold_to_four(low[2], high[2]);
  __m128 lane3 = fold_to_four(low[3], high[3]);
  _MM_TRANSPOSE4_PS(lane0, lane1, lane2, lane3);
  const __m128 sums = _mm_add_ps(_mm_add_ps(lane0, lane2), _mm_add_ps(lane1, lane3));
  alignas(16) float scaled[4];
  _mm_store_ps(scaled, _mm_mul_ps(sums, _mm_set1_ps(scale)));
  for (std::size_t i = 0; i < 4; ++i) {
    out[i * out_stride] = scaled[i];
  }
}

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
    const __m256 low[4] = {low0, low1, low2, low3};
    const __m256 high[4] = {high0, high1, high2, high3};
    store_four(low, high, scale, out + q * out_stride, out_stride);
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

/// Eight lanes of four queries times three keys, `sums[4 * key + query]`: twelve accumulators and their
/// operands fill the sixteen registers, and each load serves three or four multiply-adds. `padded` elements,
/// those of the other eight lanes left out.
[[gnu::target("avx2,fma"), gnu::always_inline]] inline void dot_half(const float* const* keys,
                                                                     const float* queries, std::size_t padded,
                                                                     __m256* sums) {
  const float* k0 = keys[0];
  const float* k1 = keys[1];
  const float* k2 = keys[2];
  const float* q0 = queries;
  const float* q1 = q0 + padded;
  const float* q2 = q1 + padded;
  const float* q3 = q2 + padded;
  __m256 s00 = _mm256_setzero_ps();
  __m256 s01 = s00;
  __m256 s02 = s00;
  __m256 s03 = s00;
  __m256 s10 = s00;
  __m256 s11 = s00;
  __m256 s12 = s00;
  __m256 s13 = s00;
  __m256 s20 = s00;
  __m256 s21 = s00;
  __m256 s22 = s00;
  __m256 s23 = s00;
  for (std::size_t e = 0; e < padded; e += lane_count) {
    const __m256 key0 = _mm256_loadu_ps(k0 + e);
    const __m256 key1 = _mm256_loadu_ps(k1 + e);
    const __m256 key2 = _mm256_loadu_ps(k2 + e);
    __m256 query = _mm256_loadu_ps(q0 + e);
    s00 = _mm256_fmadd_ps(query, key0, s00);
    s10 = _mm256_fmadd_ps(query, key1, s10);
    s20 = _mm256_fmadd_ps(query, key2, s20);
    query = _mm256_loadu_ps(q1 + e);
    s01 = _mm256_fmadd_ps(query, key0, s01);
    s11 = _mm256_fmadd_ps(query, key1, s11);
    s21 = _mm256_fmadd_ps(query, key2, s21);
    query = _mm256_loadu_ps(q2 + e);
    s02 = _mm256_fmadd_ps(query, key0, s02);
    s12 = _mm256_fmadd_ps(query, key1, s12);
    s22 = _mm256_fmadd_ps(query, key2, s22);
    query = _mm256_loadu_ps(q3 + e);
    s03 = _mm256_fmadd_ps(query, key0, s03);
    s13 = _mm256_fmadd_ps(query, key1, s13);
    s23 = _mm256_fmadd_ps(query, key2, s23);
  }
  sums[0] = s00;
  sums[1] = s01;
  sums[2] = s02;
  sums[3] = s03;
  sums[4] = s10;
  sums[5] = s11;
  sums[6] = s12;
  sums[7] = s13;
  sums[8] = s20;
  sums[9] = s21;
  sums[10] = s22;
  sums[11] = s23;
}

/// As dot_row for three decoded keys at `keys[k]`, the same bits: `out[q * out_stride + k]`.
[[gnu::target("avx2,fma,f16c")]] inline void dot_three(const float* const* keys, const QueryBlock& queries,
                                                       float scale, float* out, std::size_t out_stride) {
  const std::size_t padded = round_up_to_lanes(queries.head_dim);
  std::size_t q = 0;
  for (; q + 4 <= queries.count; q += 4) {
    __m256 low[12];
    __m256 high[12];
    const float* const upper[3] = {keys[0] + 8, keys[1] + 8, keys[2] + 8};
    dot_half(keys, queries.data + q * padded, padded, low);
    dot_half(upper, queries.data + q * padded + 8, padded, high);
    for (std::size_t k = 0; k < 3; ++k) {
      store_four(low + 4 * k, high + 4 * k, scale, out + q * out_stride + k, out_stride);
    }
  }
  if (q < queries.count) {
    const QueryBlock rest{
        .data = queries.data + q * padded, .count = queries.count - q, .head_dim = queries.head_dim};
    for (std::size_t k = 0; k < 3; ++k) {
      avx2::dot_row(keys[k], rest, scale, out + q * out_stride + k, out_stride);
    }
  }
}

/// Elements of a key up to which three are decoded on the stack at a time.
inline constexpr std::size_t longest_decoded = 512;

/// `padded` elements of a key as float32; float keys stay where they are.
[[gnu::target("avx2,fma,f16c"), gnu::always_inline]] inline const float* decoded(const float* key,
                                                                                 std::size_t, float*) {
  return key;
}
template <Element T>
[[gnu::target("avx2,fma,f16c"), gnu::always_inline]] inline const float* decoded(const T* key,
                                                                                 std::size_t padded,
                                                                                 float* buffer) {
  for (std::size_t e = 0; e < padded; e += 8) {
    _mm256_storeu_ps(buffer + e, load8(key + e));
  }
  return buffer;
}

/// Keys side by side, `head_dim` a multiple of the lanes.
template <Element T>
[[gnu::target("avx2,fma,f16c")]] inline void dot_rows(const Run<const T>& keys, std::size_t first,
                                                      std::size_t count, const QueryBlock& queries,
                                                      float scale, float* out, std::size_t out_stride) {
  std::size_t i = 0;
  if (queries.count >= 4 && queries.head_dim <= longest_decoded) {
    alignas(32) float buffer[3 * longest_decoded];
    for (; i + 3 <= count; i += 3) {
      const float* const rows[3] = {
          decoded(keys.row(first + i), queries.head_dim, buffer),
          decoded(keys.row(first + i + 1), queries.head_dim, buffer + longest_decoded),
          decoded(keys.row(first + i + 2), queries.head_dim, buffer + 2 * longest_decoded)};
      avx2::dot_three(rows, queries, scale, out + i, out_stride);
    }
  }
  for (; i < count; ++i) {
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
