#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>

#include "compresskv/core/element.hpp"
#include "compresskv/kernel/key_blocks.hpp"
#include "compresskv/kernel/packed_queries.hpp"
#include "compresskv/kernel/x86/key_blocks_avx2.hpp"

#if defined(__x86_64__)
#include <immintrin.h>

#include "compresskv/core/strict_float_begin.hpp"

// Dot products of packed queries and keys in two widths, side by side; why not as one template:
// x86/exp2_avx2_avx512.hpp. What 512-bit registers do not speed up, the AVX-512 functions take from `avx2`.
namespace compresskv::kernel {

namespace avx2 {

/// Writes the sums of four keys with four queries, times `scale`, to `out[query * out_stride + key]`.
[[gnu::target("avx2,fma,f16c"), gnu::always_inline]] inline void store(const __m256* sums, float scale,
                                                                       float* out, std::size_t out_stride) {
  // In each 128 bits: two queries with the first key, then the same two with the second.
  const __m256 keys01 = _mm256_shuffle_ps(sums[0], sums[1], _MM_SHUFFLE(2, 0, 2, 0)) +
                        _mm256_shuffle_ps(sums[0], sums[1], _MM_SHUFFLE(3, 1, 3, 1));
  const __m256 keys23 = _mm256_shuffle_ps(sums[2], sums[3], _MM_SHUFFLE(2, 0, 2, 0)) +
                        _mm256_shuffle_ps(sums[2], sums[3], _MM_SHUFFLE(3, 1, 3, 1));
  const __m256 factor = _mm256_set1_ps(scale);
  const __m256 even = _mm256_shuffle_ps(keys01, keys23, _MM_SHUFFLE(2, 0, 2, 0)) * factor;
  const __m256 odd = _mm256_shuffle_ps(keys01, keys23, _MM_SHUFFLE(3, 1, 3, 1)) * factor;
  _mm_storeu_ps(out, _mm256_castps256_ps128(even));
  _mm_storeu_ps(out + out_stride, _mm256_castps256_ps128(odd));
  _mm_storeu_ps(out + 2 * out_stride, _mm256_extractf128_ps(even, 1));
  _mm_storeu_ps(out + 3 * out_stride, _mm256_extractf128_ps(odd, 1));
}

/// The two elements of a key's step, for all queries.
[[gnu::target("avx2,fma,f16c"), gnu::always_inline]] inline __m256 broadcast(const float* step) {
  double both = 0.0;
  std::memcpy(&both, step, sizeof(both));
  return _mm256_castpd_ps(_mm256_set1_pd(both));
}
[[gnu::target("avx2,fma,f16c"), gnu::always_inline]] inline __m256 broadcast(const bfloat16* step) {
  int both = 0;
  std::memcpy(&both, step, sizeof(both));
  const __m256i to_upper_halves = _mm256_set1_epi64x(0x0302808001008080);
  return _mm256_castsi256_ps(_mm256_shuffle_epi8(_mm256_set1_epi32(both), to_upper_halves));
}

/// Sums of `count` keys with a panel of queries, four queries a register.
template <std::size_t count>
using Sums = __m256[2][count];

template <std::size_t count>
[[gnu::target("avx2,fma,f16c"), gnu::always_inline]] inline void clear(Sums<count>& sums) {
#pragma GCC unroll 8
  for (std::size_t k = 0; k < count; ++k) {
    sums[0][k] = _mm256_setzero_ps();
    sums[1][k] = _mm256_setzero_ps();
  }
}

/// `store` of all sums.
template <std::size_t count>
[[gnu::target("avx2,fma,f16c"), gnu::always_inline]] inline void store_whole_block(const Sums<count>& sums,
                                                                                   float scale, float* out,
                                                                                   std::size_t out_stride) {
#pragma GCC unroll 2
  for (std::size_t k = 0; k < count; k += 4) {
    store(sums[0] + k, scale, out + k, out_stride);
    store(sums[1] + k, scale, out + k + 4 * out_stride, out_stride);
  }
}

/// The same for `keys` and `queries` alone where those are fewer.
template <std::size_t count>
[[gnu::target("avx2,fma,f16c"), gnu::always_inline]] inline void store_block(const Sums<count>& sums,
                                                                             float scale, std::size_t keys,
                                                                             std::size_t queries, float* out,
                                                                             std::size_t out_stride) {
  if (keys >= count && queries >= queries_per_panel) {
    store_whole_block<count>(sums, scale, out, out_stride);
    return;
  }
  float rows[queries_per_panel * count];
  store_whole_block<count>(sums, scale, rows, count);
  for (std::size_t q = 0; q < (std::min)(queries, queries_per_panel); ++q) {
    std::copy_n(rows + q * count, (std::min)(keys, count), out + q * out_stride);
  }
}

/// Adds the products of step `s + i` of keys `k` to `k + count` with a panel.
template <std::size_t count, class Block>
[[gnu::target("avx2,fma,f16c"), gnu::always_inline]] inline void add_step(const Block& block, std::size_t k,
                                                                          const float* panel, std::size_t s,
                                                                          std::size_t i, Sums<count>& sums) {
  const float* own = panel + (s + i) * PackedQueries::floats_per_step;
#pragma GCC unroll 8
  for (std::size_t j = 0; j < count; ++j) {
    const __m256 key = broadcast(block.step(k + j, s, i));
    sums[0][j] = _mm256_fmadd_ps(_mm256_loadu_ps(own), key, sums[0][j]);
    sums[1][j] = _mm256_fmadd_ps(_mm256_loadu_ps(own + 8), key, sums[1][j]);
  }
}

/// Keys `k` to `k + count` of a block with the first `queries` of a panel; `out` is that of the block.
template <std::size_t count, class Block>
[[gnu::target("avx2,fma,f16c"), gnu::always_inline]] inline void multiply_panel(
    const Block& block, std::size_t k, bool prefetch, const float* panel, std::size_t steps,
    std::size_t queries, float scale, float* out, std::size_t out_stride) {
  Sums<count> sums;
  clear<count>(sums);
  std::size_t s = 0;
  for (; s + detail::unrolled_steps <= steps; s += detail::unrolled_steps) {
    if (prefetch) {
      block.template prefetch<count, 2>(k, s);
    }
#pragma GCC unroll 8
    for (std::size_t i = 0; i < detail::unrolled_steps; ++i) {
      add_step<count>(block, k, panel, s, i, sums);
    }
  }
  for (; s < steps; ++s) {
    add_step<count>(block, k, panel, s, 0, sums);
  }
  store_block<count>(sums, scale, block.size() - k, queries, out + k, out_stride);
}

/// As portable::dot. Sixteen registers hold the sums of four keys.
template <class T>
[[gnu::target("avx2,fma,f16c")]] inline void dot(const detail::ContiguousKeys<T>& keys,
                                                 const PackedQueries& queries, float scale, float* buffer,
                                                 float* out, std::size_t out_stride) {
  const std::size_t steps = queries.steps();
  for (detail::KeyBlocks<T> block(keys, queries.head_dim, buffer); block.more(); block.next()) {
    for (std::size_t q = 0; q < queries.count; q += queries_per_panel) {
      for (std::size_t k = 0; k < block.size(); k += 4) {
        multiply_panel<4>(block, k, block.prefetches(q), queries.data + q * 2 * steps, steps,
                          queries.count - q, scale, out + q * out_stride + block.first(), out_stride);
      }
    }
  }
}

}  // namespace avx2

namespace avx512 {

/// As avx2::store, for a panel of queries.
[[gnu::target("avx2,fma,f16c,avx512f,avx512vl,avx512dq,avx512bw"), gnu::always_inline]] inline void store(
    const __m512* sums, float scale, float* out, std::size_t out_stride) {
  const __m512 keys01 = _mm512_maskz_shuffle_ps(0xFFFF, sums[0], sums[1], _MM_SHUFFLE(2, 0, 2, 0)) +
                        _mm512_maskz_shuffle_ps(0xFFFF, sums[0], sums[1], _MM_SHUFFLE(3, 1, 3, 1));
  const __m512 keys23 = _mm512_maskz_shuffle_ps(0xFFFF, sums[2], sums[3], _MM_SHUFFLE(2, 0, 2, 0)) +
                        _mm512_maskz_shuffle_ps(0xFFFF, sums[2], sums[3], _MM_SHUFFLE(3, 1, 3, 1));
  alignas(64) float rows[32];
  const __m512 factor = _mm512_set1_ps(scale);
  _mm512_store_ps(rows, _mm512_maskz_shuffle_ps(0xFFFF, keys01, keys23, _MM_SHUFFLE(2, 0, 2, 0)) * factor);
  _mm512_store_ps(rows + 16,
                  _mm512_maskz_shuffle_ps(0xFFFF, keys01, keys23, _MM_SHUFFLE(3, 1, 3, 1)) * factor);
#pragma GCC unroll 4
  for (std::size_t q = 0; q < 4; ++q) {
    _mm_storeu_ps(out + 2 * q * out_stride, _mm_load_ps(rows + 4 * q));
    _mm_storeu_ps(out + (2 * q + 1) * out_stride, _mm_load_ps(rows + 16 + 4 * q));
  }
}

/// As avx2::broadcast.
[[gnu::target("avx2,fma,f16c,avx512f,avx512vl,avx512dq,avx512bw"), gnu::always_inline]] inline __m512
broadcast(const float* step) {
  double both = 0.0;
  std::memcpy(&both, step, sizeof(both));
  return _mm512_castpd_ps(_mm512_set1_pd(both));
}
[[gnu::target("avx2,fma,f16c,avx512f,avx512vl,avx512dq,avx512bw"), gnu::always_inline]] inline __m512
broadcast(const bfloat16* step) {
  int both = 0;
  std::memcpy(&both, step, sizeof(both));
  const __m512i to_upper_halves = _mm512_set1_epi64(0x0302808001008080);
  return _mm512_castsi512_ps(_mm512_shuffle_epi8(_mm512_set1_epi32(both), to_upper_halves));
}

/// As avx2::add_step for a block of keys and two panels, a panel a register.
template <class Block>
[[gnu::target("avx2,fma,f16c,avx512f,avx512vl,avx512dq,avx512bw"), gnu::always_inline]] inline void add_step(
    const Block& block, const float* panels, std::size_t steps, std::size_t s, std::size_t i,
    __m512 (&sums)[2][keys_per_block]) {
  const float* own = panels + (s + i) * PackedQueries::floats_per_step;
#pragma GCC unroll 8
  for (std::size_t k = 0; k < keys_per_block; ++k) {
    const __m512 key = broadcast(block.step(k, s, i));
    sums[0][k] = _mm512_fmadd_ps(_mm512_loadu_ps(own), key, sums[0][k]);
    sums[1][k] =
        _mm512_fmadd_ps(_mm512_loadu_ps(own + steps * PackedQueries::floats_per_step), key, sums[1][k]);
  }
}

/// As avx2::multiply_panel for a whole block of keys and two whole panels.
template <class Block>
[[gnu::target("avx2,fma,f16c,avx512f,avx512vl,avx512dq,avx512bw"), gnu::always_inline]] inline void
multiply_two_panels(const Block& block, bool prefetch, const float* panels, std::size_t steps, float scale,
                    float* out, std::size_t out_stride) {
  __m512 sums[2][keys_per_block];
#pragma GCC unroll 8
  for (std::size_t k = 0; k < keys_per_block; ++k) {
    sums[0][k] = _mm512_setzero_ps();
    sums[1][k] = _mm512_setzero_ps();
  }
  std::size_t s = 0;
  for (; s + detail::unrolled_steps <= steps; s += detail::unrolled_steps) {
    if (prefetch) {
      block.template prefetch<keys_per_block, 2>(0, s);
    }
#pragma GCC unroll 8
    for (std::size_t i = 0; i < detail::unrolled_steps; ++i) {
      add_step(block, panels, steps, s, i, sums);
    }
  }
  for (; s < steps; ++s) {
    add_step(block, panels, steps, s, 0, sums);
  }
#pragma GCC unroll 2
  for (std::size_t u = 0; u < 2; ++u) {
#pragma GCC unroll 2
    for (std::size_t k = 0; k < keys_per_block; k += 4) {
      store(sums[u] + k, scale, out + u * queries_per_panel * out_stride + k, out_stride);
    }
  }
}

/// As avx2::dot; the same bits. Two panels go through 512-bit registers, a single one through 256-bit
/// registers, of which there are now enough for eight keys. Measured on Zen 4, which computes no faster in
/// 512 bits: a single panel takes 1.4 times as long in them, two panels take as long. CPUs that compute twice
/// as much in 512 bits should gain by the latter.
template <class T>
[[gnu::target("avx2,fma,f16c,avx512f,avx512vl,avx512dq,avx512bw")]] inline void dot(
    const detail::ContiguousKeys<T>& keys, const PackedQueries& queries, float scale, float* buffer,
    float* out, std::size_t out_stride) {
  const std::size_t steps = queries.steps();
  for (detail::KeyBlocks<T> block(keys, queries.head_dim, buffer); block.more(); block.next()) {
    float* const own = out + block.first();
    std::size_t q = 0;
    for (; q + 2 * queries_per_panel <= queries.count && block.size() == keys_per_block;
         q += 2 * queries_per_panel) {
      multiply_two_panels(block, block.prefetches(q), queries.data + q * 2 * steps, steps, scale,
                          own + q * out_stride, out_stride);
    }
    for (; q < queries.count; q += queries_per_panel) {
      avx2::multiply_panel<keys_per_block>(block, 0, block.prefetches(q), queries.data + q * 2 * steps, steps,
                                           queries.count - q, scale, own + q * out_stride, out_stride);
    }
  }
}

}  // namespace avx512
}  // namespace compresskv::kernel

#include "compresskv/core/strict_float_end.hpp"
#endif
