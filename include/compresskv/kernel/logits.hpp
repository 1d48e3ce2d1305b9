#pragma once

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "compresskv/core/element.hpp"
#include "compresskv/kernel/code_path.hpp"
#include "compresskv/kernel/decode_row.hpp"
#include "compresskv/kernel/lanes.hpp"
#include "compresskv/view/run.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace compresskv::kernel {

/// Queries of a `QueryBlock` that stand side by side: the floats of the widest registers in use.
inline constexpr std::size_t abreast = 16;

/// Queries made ready for the dot products. Element e of query q stands at
/// `data[((q / abreast) * head_dim + e) * abreast + q % abreast]`; places of queries that are not there hold
/// zeros. Each query is then a lane of a register, each key element a number for all lanes, and no sum runs
/// across a register.
///
/// With `pairs`, two bfloat16 elements stand in the place of one float: 2e and 2e + 1 where e would be.
struct QueryBlock {
  const float* data = nullptr;
  std::size_t count = 0;
  std::size_t head_dim = 0;
  bool pairs = false;

  /// Floats that `data` has.
  static constexpr std::size_t size(std::size_t count, std::size_t head_dim) {
    return (count + abreast - 1) / abreast * abreast * head_dim;
  }
  /// Puts query `q` in its place.
  static void put(std::size_t q, const float* query, std::size_t head_dim, float* data) {
    float* place = data + q / abreast * abreast * head_dim + q % abreast;
    for (std::size_t e = 0; e < head_dim; ++e) {
      place[e * abreast] = query[e];
    }
  }
};

/// Keys that meet all queries before the next ones come: with eight queries abreast, eight sums hide the
/// latency of the multiply-adds and leave registers for their operands.
inline constexpr std::size_t keys_at_once = 8;

namespace detail {

/// Elements that the sums take from one request of memory to the next.
inline constexpr std::size_t between = 8;

/// Asks for as many bytes of a later key, up to its `end`, as `count` keys have in `between` elements, and
/// says where to go on. Rows read side by side are no stream that a CPU predicts, and requests for all of the
/// next rows at once would stall. Measured: float32 keys in memory take two thirds of the time.
template <std::size_t count, class T>
[[gnu::always_inline]] inline const T* request(const T* next, const T* end) {
  constexpr std::size_t line = 64 / sizeof(T);
  for (std::size_t i = 0; i < std::max<std::size_t>(between * count / line, 1) && next < end; ++i) {
    __builtin_prefetch(next);
    next += line;
  }
  return next;
}

}  // namespace detail

namespace portable {

/// `out[q * out_stride + k] = scale * (query q . key k)` for `count` decoded keys. Sums run over the elements
/// in order, each addition fused: the order of every path.
inline void dot(const float* const* keys, std::size_t count, const QueryBlock& queries, float scale,
                float* out, std::size_t out_stride) {
  for (std::size_t q = 0; q < queries.count; ++q) {
    const float* query = queries.data + q / abreast * abreast * queries.head_dim + q % abreast;
    for (std::size_t k = 0; k < count; ++k) {
      float sum = 0.0F;
      for (std::size_t e = 0; e < queries.head_dim; ++e) {
        sum = std::fma(query[e * abreast], keys[k][e], sum);
      }
      out[q * out_stride + k] = sum * scale;
    }
  }
}

}  // namespace portable

#if defined(__x86_64__)
namespace avx2 {

/// Sums of eight keys, a register of eight queries each, times `scale` to `out[query * out_stride + key]`;
/// `keys` and `queries` of them are wanted.
[[gnu::target("avx2,fma"), gnu::always_inline]] inline void store(const __m256* sums, float scale,
                                                                  std::size_t keys, std::size_t queries,
                                                                  float* out, std::size_t out_stride) {
  const __m256 a0 = _mm256_unpacklo_ps(sums[0], sums[1]);
  const __m256 a1 = _mm256_unpackhi_ps(sums[0], sums[1]);
  const __m256 a2 = _mm256_unpacklo_ps(sums[2], sums[3]);
  const __m256 a3 = _mm256_unpackhi_ps(sums[2], sums[3]);
  const __m256 a4 = _mm256_unpacklo_ps(sums[4], sums[5]);
  const __m256 a5 = _mm256_unpackhi_ps(sums[4], sums[5]);
  const __m256 a6 = _mm256_unpacklo_ps(sums[6], sums[7]);
  const __m256 a7 = _mm256_unpackhi_ps(sums[6], sums[7]);
  const __m256 b0 = _mm256_shuffle_ps(a0, a2, _MM_SHUFFLE(1, 0, 1, 0));
  const __m256 b1 = _mm256_shuffle_ps(a0, a2, _MM_SHUFFLE(3, 2, 3, 2));
  const __m256 b2 = _mm256_shuffle_ps(a1, a3, _MM_SHUFFLE(1, 0, 1, 0));
  const __m256 b3 = _mm256_shuffle_ps(a1, a3, _MM_SHUFFLE(3, 2, 3, 2));
  const __m256 b4 = _mm256_shuffle_ps(a4, a6, _MM_SHUFFLE(1, 0, 1, 0));
  const __m256 b5 = _mm256_shuffle_ps(a4, a6, _MM_SHUFFLE(3, 2, 3, 2));
  const __m256 b6 = _mm256_shuffle_ps(a5, a7, _MM_SHUFFLE(1, 0, 1, 0));
  const __m256 b7 = _mm256_shuffle_ps(a5, a7, _MM_SHUFFLE(3, 2, 3, 2));
  const __m256 rows[8] = {_mm256_permute2f128_ps(b0, b4, 0x20), _mm256_permute2f128_ps(b1, b5, 0x20),
                          _mm256_permute2f128_ps(b2, b6, 0x20), _mm256_permute2f128_ps(b3, b7, 0x20),
                          _mm256_permute2f128_ps(b0, b4, 0x31), _mm256_permute2f128_ps(b1, b5, 0x31),
                          _mm256_permute2f128_ps(b2, b6, 0x31), _mm256_permute2f128_ps(b3, b7, 0x31)};
  const __m256 factor = _mm256_set1_ps(scale);
  for (std::size_t q = 0; q < queries; ++q) {
    const __m256 row = _mm256_mul_ps(rows[q], factor);
    if (keys == keys_at_once) {
      _mm256_storeu_ps(out + q * out_stride, row);
    } else {
      alignas(32) float values[keys_at_once];
      _mm256_store_ps(values, row);
      std::memcpy(out + q * out_stride, values, keys * sizeof(float));
    }
  }
}

/// The elements of four bytes of a key, each for all lanes.
[[gnu::target("avx2,fma"), gnu::always_inline]] inline void broadcast(const float* key, __m256* elements) {
  elements[0] = _mm256_broadcast_ss(key);
}
[[gnu::target("avx2,fma"), gnu::always_inline]] inline void broadcast(const Eigen::bfloat16* key,
                                                                      __m256* elements) {
  int bits = 0;
  std::memcpy(&bits, key, sizeof(bits));
  const __m256i both = _mm256_set1_epi32(bits);
  elements[0] = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
  elements[1] = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(-0x10000)));
}

/// Sums of `count` keys with `8 * registers` queries.
template <std::size_t count, std::size_t registers>
using Sums = __m256[registers][count];

/// Adds the products of the elements that stand in four bytes from `e` on.
template <std::size_t count, std::size_t registers, class T>
[[gnu::target("avx2,fma"), gnu::always_inline]] inline void add_products(const T* const* keys,
                                                                         const float* queries, std::size_t e,
                                                                         Sums<count, registers>& sums) {
  constexpr std::size_t step = sizeof(float) / sizeof(T);
#pragma GCC unroll 8
  for (std::size_t k = 0; k < count; ++k) {
    __m256 elements[step];
    broadcast(keys[k] + e, elements);
#pragma GCC unroll 2
    for (std::size_t i = 0; i < step; ++i) {
#pragma GCC unroll 2
      for (std::size_t r = 0; r < registers; ++r) {
        const __m256 query = _mm256_loadu_ps(queries + (e + i) * abreast + 8 * r);
        sums[r][k] = _mm256_fmadd_ps(query, elements[i], sums[r][k]);
      }
    }
  }
}

/// `count` keys times the `8 * registers` queries that stand at `queries`: `out[r * keys_at_once + k]`.
/// Measured: four keys with sixteen queries 0.8 of the peak, eight with eight 0.67; the loads set the pace.
///
/// On the way it asks the memory for the keys that are `ahead` elements on (`detail::request`).
template <std::size_t count, std::size_t registers, class T>
[[gnu::target("avx2,fma"), gnu::always_inline]] inline void multiply(const T* const* keys,
                                                                     std::ptrdiff_t ahead,
                                                                     const float* queries,
                                                                     std::size_t head_dim, __m256* out) {
  Sums<count, registers> sums;
#pragma GCC unroll 2
  for (std::size_t r = 0; r < registers; ++r) {
#pragma GCC unroll 8
    for (std::size_t k = 0; k < count; ++k) {
      sums[r][k] = _mm256_setzero_ps();
    }
  }
  constexpr std::size_t step = sizeof(float) / sizeof(T);
  std::size_t e = 0;
  for (std::size_t k = 0; k < count; ++k) {
    const T* const end = keys[k] + ahead + head_dim;
    for (const T* next = keys[k] + ahead; next < end && e + detail::between <= head_dim;
         e += detail::between) {
      next = detail::request<count>(next, end);
#pragma GCC unroll 8
      for (std::size_t i = 0; i < detail::between; i += step) {
        add_products<count, registers>(keys, queries, e + i, sums);
      }
    }
  }
  for (; e < head_dim; e += step) {
    add_products<count, registers>(keys, queries, e, sums);
  }
#pragma GCC unroll 2
  for (std::size_t r = 0; r < registers; ++r) {
#pragma GCC unroll 8
    for (std::size_t k = 0; k < count; ++k) {
      out[r * keys_at_once + k] = sums[r][k];
    }
  }
}

/// As portable::dot for eight keys, of which `count` are wanted. `head_dim` of bfloat16 keys is even. The
/// keys that come next are `ahead` elements on.
template <class T>
[[gnu::target("avx2,fma")]] inline void dot(const T* const* keys, std::size_t count, std::ptrdiff_t ahead,
                                            const QueryBlock& queries, float scale, float* out,
                                            std::size_t out_stride) {
  for (std::size_t q = 0; q < queries.count; q += abreast) {
    const float* block = queries.data + q * queries.head_dim;
    const std::size_t wanted = std::min(abreast, queries.count - q);
    __m256 sums[2 * keys_at_once];
    if (wanted <= 8) {
      multiply<8, 1>(keys, ahead, block, queries.head_dim, sums);
    } else {
      multiply<4, 2>(keys, ahead, block, queries.head_dim, sums);
      multiply<4, 2>(keys + 4, ahead, block, queries.head_dim, sums + 4);
    }
    for (std::size_t r = 0; 8 * r < wanted; ++r) {
      store(sums + r * keys_at_once, scale, count, std::min<std::size_t>(8, wanted - 8 * r),
            out + (q + 8 * r) * out_stride, out_stride);
    }
  }
}

/// `count` elements side by side as float32.
template <Element T>
[[gnu::target("avx2,fma,f16c")]] inline void decode(const T* key, std::size_t count, float* out) {
  std::size_t e = 0;
  for (; e + 8 <= count; e += 8) {
    _mm256_storeu_ps(out + e, load8(key + e));
  }
  for (; e < count; ++e) {
    out[e] = to_float(key[e]);
  }
}

}  // namespace avx2

namespace avx512 {

/// As avx2::store, for up to sixteen queries.
[[gnu::target("avx2,fma,avx512f,avx512vl,avx512dq"), gnu::always_inline]] inline void store(
    const __m512* sums, float scale, std::size_t keys, std::size_t queries, float* out,
    std::size_t out_stride) {
  __m256 half[keys_at_once];
  for (std::size_t k = 0; k < keys_at_once; ++k) {
    half[k] = _mm512_maskz_extractf32x8_ps(0xFF, sums[k], 0);
  }
  avx2::store(half, scale, keys, std::min<std::size_t>(8, queries), out, out_stride);
  for (std::size_t k = 0; k < keys_at_once; ++k) {
    half[k] = _mm512_maskz_extractf32x8_ps(0xFF, sums[k], 1);
  }
  avx2::store(half, scale, keys, queries - 8, out + 8 * out_stride, out_stride);
}

/// Adds the products of element `e` of eight keys with sixteen queries.
[[gnu::target("avx2,fma,avx512f,avx512vl,avx512dq"), gnu::always_inline]] inline void add_products(
    const float* const* keys, const float* queries, std::size_t e, __m512 (&sums)[keys_at_once]) {
#pragma GCC unroll 8
  for (std::size_t k = 0; k < keys_at_once; ++k) {
    sums[k] = _mm512_fmadd_ps(_mm512_loadu_ps(queries + e * abreast), _mm512_set1_ps(keys[k][e]), sums[k]);
  }
}

/// As avx2::multiply for eight keys and the sixteen queries that stand at `queries`.
[[gnu::target("avx2,fma,avx512f,avx512vl,avx512dq"), gnu::always_inline]] inline void multiply(
    const float* const* keys, std::ptrdiff_t ahead, const float* queries, std::size_t head_dim, __m512* out) {
  __m512 sums[keys_at_once];
#pragma GCC unroll 8
  for (std::size_t k = 0; k < keys_at_once; ++k) {
    sums[k] = _mm512_setzero_ps();
  }
  std::size_t e = 0;
  for (std::size_t k = 0; k < keys_at_once; ++k) {
    const float* const end = keys[k] + ahead + head_dim;
    for (const float* next = keys[k] + ahead; next < end && e + detail::between <= head_dim;
         e += detail::between) {
      next = detail::request<keys_at_once>(next, end);
#pragma GCC unroll 8
      for (std::size_t i = 0; i < detail::between; ++i) {
        add_products(keys, queries, e + i, sums);
      }
    }
  }
  for (; e < head_dim; ++e) {
    add_products(keys, queries, e, sums);
  }
#pragma GCC unroll 8
  for (std::size_t k = 0; k < keys_at_once; ++k) {
    out[k] = sums[k];
  }
}

/// As portable::dot for eight keys, of which `count` are wanted; the same bits. Up to eight queries of a
/// block fit the narrow registers.
[[gnu::target("avx2,fma,avx512f,avx512vl,avx512dq")]] inline void dot(const float* const* keys,
                                                                      std::size_t count, std::ptrdiff_t ahead,
                                                                      const QueryBlock& queries, float scale,
                                                                      float* out, std::size_t out_stride) {
  for (std::size_t q = 0; q < queries.count; q += abreast) {
    const float* block = queries.data + q * queries.head_dim;
    const std::size_t wanted = std::min(abreast, queries.count - q);
    if (wanted <= 8) {
      __m256 sums[keys_at_once];
      avx2::multiply<8, 1>(keys, ahead, block, queries.head_dim, sums);
      avx2::store(sums, scale, count, wanted, out + q * out_stride, out_stride);
    } else {
      __m512 sums[keys_at_once];
      avx512::multiply(keys, ahead, block, queries.head_dim, sums);
      avx512::store(sums, scale, count, wanted, out + q * out_stride, out_stride);
    }
  }
}

/// Elements 2e and 2e + 1 of a bfloat16 key.
inline int pair(const Eigen::bfloat16* key, std::size_t e) {
  int bits = 0;
  std::memcpy(&bits, key + 2 * e, sizeof(bits));
  return bits;
}

/// Adds to each lane both products of a query's pair with the key's.
[[gnu::target("avx2,fma,avx512f,avx512vl,avx512dq,avx512bf16"), gnu::always_inline]] inline void add_pair(
    __m256& sums, const float* queries, int key) {
  sums = _mm256_dpbf16_ps(sums, reinterpret_cast<__m256bh>(_mm256_loadu_ps(queries)),
                          reinterpret_cast<__m256bh>(_mm256_set1_epi32(key)));
}
[[gnu::target("avx2,fma,avx512f,avx512vl,avx512dq,avx512bf16"), gnu::always_inline]] inline void add_pair(
    __m512& sums, const float* queries, int key) {
  sums = _mm512_dpbf16_ps(sums, reinterpret_cast<__m512bh>(_mm512_loadu_ps(queries)),
                          reinterpret_cast<__m512bh>(_mm512_set1_epi32(key)));
}

/// Adds the products of pair `e` of eight keys; `Register` has eight or sixteen queries.
template <class Register>
[[gnu::target("avx2,fma,avx512f,avx512vl,avx512dq,avx512bf16"), gnu::always_inline]] inline void add_pairs(
    const Eigen::bfloat16* const* keys, const float* queries, std::size_t e, Register (&sums)[keys_at_once]) {
#pragma GCC unroll 8
  for (std::size_t k = 0; k < keys_at_once; ++k) {
    add_pair(sums[k], queries + e * abreast, pair(keys[k], e));
  }
}

/// As `multiply`, from pairs.
template <class Register>
[[gnu::target("avx2,fma,avx512f,avx512vl,avx512dq,avx512bf16"), gnu::always_inline]] inline void
multiply_pairs(const Eigen::bfloat16* const* keys, std::ptrdiff_t ahead, const float* queries,
               std::size_t pairs, Register* out) {
  Register sums[keys_at_once];
#pragma GCC unroll 8
  for (std::size_t k = 0; k < keys_at_once; ++k) {
    sums[k] = Register{};
  }
  constexpr std::size_t between = detail::between / 2;
  std::size_t e = 0;
  for (std::size_t k = 0; k < keys_at_once; ++k) {
    const Eigen::bfloat16* const end = keys[k] + ahead + 2 * pairs;
    for (const Eigen::bfloat16* next = keys[k] + ahead; next < end && e + between <= pairs; e += between) {
      next = detail::request<keys_at_once>(next, end);
#pragma GCC unroll 4
      for (std::size_t i = 0; i < between; ++i) {
        add_pairs(keys, queries, e + i, sums);
      }
    }
  }
  for (; e < pairs; ++e) {
    add_pairs(keys, queries, e, sums);
  }
#pragma GCC unroll 8
  for (std::size_t k = 0; k < keys_at_once; ++k) {
    out[k] = sums[k];
  }
}

/// Dot products of bfloat16 keys, where they stand, with queries in pairs. Products are exact and each of the
/// `head_dim` additions rounds once, as in the float32 paths, but in an order of its own; subnormal sums
/// become zero.
[[gnu::target("avx2,fma,avx512f,avx512vl,avx512dq,avx512bf16")]] inline void dot_pairs(
    const Eigen::bfloat16* const* keys, std::size_t count, std::ptrdiff_t ahead, const QueryBlock& queries,
    float scale, float* out, std::size_t out_stride) {
  const std::size_t pairs = queries.head_dim / 2;
  for (std::size_t q = 0; q < queries.count; q += abreast) {
    const float* block = queries.data + q * pairs;
    const std::size_t wanted = std::min(abreast, queries.count - q);
    if (wanted <= 8) {
      __m256 sums[keys_at_once];
      multiply_pairs(keys, ahead, block, pairs, sums);
      avx2::store(sums, scale, count, wanted, out + q * out_stride, out_stride);
    } else {
      __m512 sums[keys_at_once];
      multiply_pairs(keys, ahead, block, pairs, sums);
      avx512::store(sums, scale, count, wanted, out + q * out_stride, out_stride);
    }
  }
}

}  // namespace avx512
#endif

namespace detail {

/// As portable::dot by the path in use.
inline void dot(const float* const* keys, std::size_t count, std::ptrdiff_t ahead, const QueryBlock& queries,
                float scale, float* out, std::size_t out_stride) {
#if defined(__x86_64__)
  if (uses(CodePath::avx512)) {
    avx512::dot(keys, count, ahead, queries, scale, out, out_stride);
    return;
  }
  if (uses(CodePath::avx2)) {
    avx2::dot(keys, count, ahead, queries, scale, out, out_stride);
    return;
  }
#endif
  portable::dot(keys, count, queries, scale, out, out_stride);
}

/// A key decoded to `buffer`.
template <Stored T>
void decode(const Run<const T>& keys, std::size_t row, std::size_t head_dim, float* buffer) {
#if defined(__x86_64__)
  if constexpr (Element<T>) {
    if (keys.chunk >= head_dim && uses(CodePath::avx2)) {
      avx2::decode(keys.row(row), head_dim, buffer);
      return;
    }
  }
#endif
  decode_row(keys, row, head_dim, buffer);
}

/// Copies a bfloat16 key as it is.
inline void copy_key(const Run<const Eigen::bfloat16>& keys, std::size_t row, std::size_t head_dim,
                     Eigen::bfloat16* out) {
  for (std::size_t e = 0; e < head_dim; ++e) {
    out[e] = keys.row(row)[static_cast<std::ptrdiff_t>(e / keys.chunk) * keys.chunk_stride +
                           static_cast<std::ptrdiff_t>(e % keys.chunk)];
  }
}

/// Whether the path in use takes bfloat16 keys of even length as they are.
inline bool takes_bfloat16(const QueryBlock& queries) {
  return queries.pairs || (code_path() == CodePath::avx2 && queries.head_dim % 2 == 0);
}

#if defined(__x86_64__)
inline void dot(const Eigen::bfloat16* const* keys, std::size_t count, std::ptrdiff_t ahead,
                const QueryBlock& queries, float scale, float* out, std::size_t out_stride) {
  if (queries.pairs) {
    avx512::dot_pairs(keys, count, ahead, queries, scale, out, out_stride);
  } else {
    avx2::dot(keys, count, ahead, queries, scale, out, out_stride);
  }
}
#endif

/// `logits` for keys that come as `T`: where they stand, if they are such and side by side, else through
/// `bring(row, place)` in `buffer`.
template <class T, class Key, class Bring>
void logits_of(const Run<const Key>& keys, std::size_t first, std::size_t count, const QueryBlock& queries,
               float scale, T* buffer, float* out, std::size_t out_stride, Bring&& bring) {
  const std::size_t head_dim = queries.head_dim;
  const T* rows[keys_at_once];
  for (std::size_t i = 0; i < count; i += keys_at_once) {
    const std::size_t now = std::min(keys_at_once, count - i);
    std::ptrdiff_t ahead = 0;
    for (std::size_t k = 0; k < now; ++k) {
      rows[k] = buffer + k * head_dim;
      if constexpr (std::same_as<T, Key>) {
        if (keys.chunk >= head_dim) {
          rows[k] = keys.row(first + i + k);
          ahead =
              i + 2 * keys_at_once <= count ? static_cast<std::ptrdiff_t>(keys_at_once) * keys.row_stride : 0;
          continue;
        }
      }
      bring(first + i + k, buffer + k * head_dim);
    }
    std::fill(rows + now, rows + keys_at_once, rows[now - 1]);
    dot(rows, now, ahead, queries, scale, out + i, out_stride);
  }
}

}  // namespace detail

/// Whether this path multiplies bfloat16 keys with bfloat16 queries as they stand (`QueryBlock::pairs`).
template <class Key, class Query>
bool in_pairs(std::size_t head_dim) {
  return std::same_as<Key, Eigen::bfloat16> && std::same_as<Query, Eigen::bfloat16> && head_dim % 2 == 0 &&
         uses(CodePath::avx512_bf16);
}

/// Attention logits of every query with `count` keys from row `first` of a run:
/// `out[q * out_stride + i] = scale * (query q . key first + i)`. Each sum runs over the elements in order,
/// one rounding each; that of pairs in another order, with as many roundings.
///
/// `buffer` has `keys_at_once * head_dim` floats, for keys that must be decoded first. Cost: each key is read
/// once, 2 * head_dim flops a query and key.
template <Stored T>
void logits(const Run<const T>& keys, std::size_t first, std::size_t count, const QueryBlock& queries,
            float scale, float* buffer, float* out, std::size_t out_stride) {
  const std::size_t head_dim = queries.head_dim;
#if defined(__x86_64__)
  if constexpr (std::same_as<T, Eigen::bfloat16>) {
    if (detail::takes_bfloat16(queries)) {
      detail::logits_of(
          keys, first, count, queries, scale, reinterpret_cast<Eigen::bfloat16*>(buffer), out, out_stride,
          [&](std::size_t row, Eigen::bfloat16* place) { detail::copy_key(keys, row, head_dim, place); });
      return;
    }
  }
#endif
  detail::logits_of(keys, first, count, queries, scale, buffer, out, out_stride,
                    [&](std::size_t row, float* place) { detail::decode(keys, row, head_dim, place); });
}

}  // namespace compresskv::kernel
