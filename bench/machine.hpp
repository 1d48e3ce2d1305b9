#pragma once

#include <cmath>
#include <cstddef>

#include "compresskv/kernel/code_path.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

/// What this machine can do at most: the two sides of a roofline, on one thread.
namespace machine {

namespace detail {

#if defined(__x86_64__)
[[gnu::target("avx2,fma")]] inline float read_avx2(const float* data, std::size_t count) {
  __m256 sums[8] = {};
  for (std::size_t i = 0; i + 64 <= count; i += 64) {
#pragma GCC unroll 8
    for (std::size_t j = 0; j < 8; ++j) {
      sums[j] = _mm256_xor_ps(sums[j], _mm256_loadu_ps(data + i + 8 * j));
    }
  }
  __m256 all = sums[0];
  for (std::size_t j = 1; j < 8; ++j) {
    all = _mm256_xor_ps(all, sums[j]);
  }
  return _mm256_cvtss_f32(all);
}
#endif

inline float read_portable(const float* data, std::size_t count) {
  float sums[64] = {};
  for (std::size_t i = 0; i + 64 <= count; i += 64) {
    for (std::size_t j = 0; j < 64; ++j) {
      sums[j] += data[i + j];
    }
  }
  return sums[0] + sums[63];
}

/// Chains of multiply-adds side by side, which no operand comes from memory for. They start apart: of chains
/// that are alike the compiler makes one.
inline constexpr std::size_t chains = 12;

#if defined(__x86_64__)
[[gnu::target("avx2,fma")]] inline float multiply_adds_avx2(std::size_t rounds) {
  __m256 sums[chains];
  const __m256 x = _mm256_set1_ps(0.999F);
#pragma GCC unroll 12
  for (std::size_t i = 0; i < chains; ++i) {
    sums[i] = _mm256_set1_ps(static_cast<float>(i));
  }
  for (std::size_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (auto& sum : sums) {
      sum = _mm256_fmadd_ps(sum, x, x);
    }
  }
  __m256 all = sums[0];
  for (const auto& sum : sums) {
    all = _mm256_add_ps(all, sum);
  }
  return _mm256_cvtss_f32(all);
}

/// The same in 512-bit registers; with `pairs`, dot products of bfloat16 pairs.
template <bool pairs>
[[gnu::target("avx512f,avx512bf16")]] float multiply_adds_avx512(std::size_t rounds) {
  __m512 sums[chains];
  const __m512 x = _mm512_set1_ps(0.999F);
  const auto x_pairs = reinterpret_cast<__m512bh>(_mm512_set1_epi32(0x3F7F3F7F));
#pragma GCC unroll 12
  for (std::size_t i = 0; i < chains; ++i) {
    sums[i] = _mm512_set1_ps(static_cast<float>(i));
  }
  for (std::size_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (auto& sum : sums) {
      if constexpr (pairs) {
        sum = _mm512_dpbf16_ps(sum, x_pairs, x_pairs);
      } else {
        sum = _mm512_fmadd_ps(sum, x, x);
      }
    }
  }
  __m512 all = sums[0];
  for (const auto& sum : sums) {
    all = _mm512_add_ps(all, sum);
  }
  return _mm512_cvtss_f32(all);
}
#endif

inline float multiply_adds_portable(std::size_t rounds) {
  float sums[chains][16];
  for (std::size_t i = 0; i < chains; ++i) {
    for (float& sum : sums[i]) {
      sum = static_cast<float>(i);
    }
  }
  for (std::size_t i = 0; i < rounds; ++i) {
    for (auto& chain : sums) {
      for (float& sum : chain) {
        sum = std::fma(sum, 0.999F, 0.999F);
      }
    }
  }
  return sums[0][0] + sums[chains - 1][15];
}

}  // namespace detail

/// Reads `count` floats, a multiple of 64, once.
inline float read(const float* data, std::size_t count) {
#if defined(__x86_64__)
  if (compresskv::kernel::uses(compresskv::kernel::CodePath::avx2)) {
    return detail::read_avx2(data, count);
  }
#endif
  return detail::read_portable(data, count);
}

/// About `flops` operations as fast as they can be with the instructions of the path in use, in its widest
/// registers; with bfloat16 dot products where `bfloat16_pairs` and there are any.
inline float multiply_add(double flops, bool bfloat16_pairs) {
  const auto rounds = [&](double lanes) {
    return static_cast<std::size_t>(flops / (2.0 * lanes * static_cast<double>(detail::chains)));
  };
#if defined(__x86_64__)
  using compresskv::kernel::CodePath;
  using compresskv::kernel::uses;
  if (bfloat16_pairs && uses(CodePath::avx512_bf16)) {
    return detail::multiply_adds_avx512<true>(rounds(32));
  }
  if (uses(CodePath::avx512)) {
    return detail::multiply_adds_avx512<false>(rounds(16));
  }
  if (uses(CodePath::avx2)) {
    return detail::multiply_adds_avx2(rounds(8));
  }
#endif
  static_cast<void>(bfloat16_pairs);
  return detail::multiply_adds_portable(rounds(16));
}

}  // namespace machine
