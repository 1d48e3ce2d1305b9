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

/// Queries of a `QueryBlock` that stand side by side: with two elements each, the floats of the widest
/// registers in use.
inline constexpr std::size_t abreast = 8;

/// Queries made ready for the dot products. Elements 2p and 2p + 1 of query q stand at
/// `data[((q / abreast) * places() + p) * 2 * abreast + q % abreast * 2]`; queries and elements that are not
/// there are zeros. Each query is then two lanes of a register and two elements of a key are one number for
/// all queries: no sum runs across a register until the end, and one load serves all products of two
/// elements.
///
/// With `pairs`, two bfloat16 elements stand in the place of one float.
struct QueryBlock {
  const float* data = nullptr;
  std::size_t count = 0;
  std::size_t head_dim = 0;
  bool pairs = false;

  /// Twos of floats that a query of `floats` has.
  static constexpr std::size_t places(std::size_t floats) { return (floats + 1) / 2; }
  std::size_t places() const { return places(pairs ? head_dim / 2 : head_dim); }

  /// Floats that `data` has for queries of `floats`.
  static constexpr std::size_t size(std::size_t count, std::size_t floats) {
    return (count + abreast - 1) / abreast * places(floats) * 2 * abreast;
  }
  /// Puts query `q` in its place.
  static void put(std::size_t q, const float* query, std::size_t floats, float* data) {
    float* place = data + (q / abreast * places(floats) * abreast + q % abreast) * 2;
    for (std::size_t e = 0; e < floats; ++e) {
      place[e / 2 * 2 * abreast + e % 2] = query[e];
    }
  }
};

/// Keys that meet all queries before the next ones come: eight sums hide the latency of the multiply-adds.
inline constexpr std::size_t keys_at_once = 8;

namespace detail {

/// Elements of a key with the zeros that fill its last place, whatever the type.
constexpr std::size_t filled(std::size_t head_dim) { return (head_dim + 3) / 4 * 4; }

/// Places that the sums take from one request of memory to the next.
inline constexpr std::size_t between = 4;

/// Bytes of keys between the sums and the requests of memory. The requests go to the second-level cache,
/// which has room for more of them at a time than the nearest. Measured (float32, eight queries, Zen 4): to
/// the nearest, 4 KiB ahead, takes 1.5 times as long, no requests 3.8 times.
inline constexpr std::size_t bytes_ahead = 24U << 10U;

/// Keys whose memory is asked for while others are multiplied, line by line. Rows read side by side are no
/// stream that a CPU predicts, and requests for all of a block's rows at once would stall.
template <class T>
class Ahead {
 public:
  /// Keys of `width` elements, `stride` apart, from `first` on.
  Ahead(const T* first, std::ptrdiff_t stride, std::size_t width)
      : next_(first),
        end_(first + width),
        stride_(stride),
        skip_(stride - static_cast<std::ptrdiff_t>((width + line - 1) / line * line)) {}

  /// Those from key `row` on.
  Ahead from(std::size_t row) const {
    Ahead later = *this;
    later.next_ += static_cast<std::ptrdiff_t>(row) * stride_;
    later.end_ += static_cast<std::ptrdiff_t>(row) * stride_;
    return later;
  }

  /// Asks for as many bytes as `count` keys have in `between` places, each of `place` elements.
  template <std::size_t count, std::size_t place>
  [[gnu::always_inline]] void request() {
    constexpr std::size_t lines = std::max<std::size_t>(between * count * place / line, 1);
#pragma GCC unroll 4
    for (std::size_t i = 0; i < lines; ++i) {
      __builtin_prefetch(next_, 0, 2);
      next_ += line;
      if (next_ >= end_) {
        next_ += skip_;
        end_ += stride_;
      }
    }
  }

 private:
  static constexpr std::size_t line = 64 / sizeof(T);

  const T* next_;
  const T* end_;
  std::ptrdiff_t stride_;
  std::ptrdiff_t skip_;
};

}  // namespace detail

/// Floats of memory that `logits` needs for keys that must be decoded or copied first.
constexpr std::size_t key_buffer_size(std::size_t head_dim) {
  return keys_at_once * detail::filled(head_dim);
}

namespace portable {

/// `out[q * out_stride + k] = scale * (query q . key k)` for `count` decoded keys. Even and odd elements have
/// a sum each, in order, each addition fused; at the end the two are added: the order of every path.
inline void dot(const float* const* keys, std::size_t count, const QueryBlock& queries, float scale,
                float* out, std::size_t out_stride) {
  for (std::size_t q = 0; q < queries.count; ++q) {
    const float* query = queries.data + (q / abreast * queries.places() * abreast + q % abreast) * 2;
    for (std::size_t k = 0; k < count; ++k) {
      float even = 0.0F;
      float odd = 0.0F;
      for (std::size_t p = 0; p < queries.places(); ++p) {
        even = std::fma(query[p * 2 * abreast], keys[k][2 * p], even);
        odd = std::fma(query[p * 2 * abreast + 1], keys[k][2 * p + 1], odd);
      }
      out[q * out_stride + k] = (even + odd) * scale;
    }
  }
}

}  // namespace portable

#if defined(__x86_64__)
namespace detail {

/// Copies what four keys, of which `keys` are wanted, have with up to `2 * pairs` queries. In `rows` even
/// queries come first, then odd ones, four floats each.
template <std::size_t pairs>
[[gnu::always_inline]] inline void copy_logits(const float* rows, std::size_t keys, std::size_t queries,
                                               float* out, std::size_t out_stride) {
#pragma GCC unroll 8
  for (std::size_t q = 0; q < 2 * pairs; ++q) {
    if (q >= queries) {
      return;
    }
    const float* from = rows + (q % 2 * pairs + q / 2) * 4;
    if (keys >= 4) {
      std::memcpy(out + q * out_stride, from, 4 * sizeof(float));
    } else {
      std::memcpy(out + q * out_stride, from, keys * sizeof(float));
    }
  }
}

}  // namespace detail

namespace avx2 {

/// What four keys have with four queries, times `scale`, to `out[query * out_stride + key]`; `keys` and
/// `queries` of them are wanted.
[[gnu::target("avx2,fma"), gnu::always_inline]] inline void store(const __m256* sums, float scale,
                                                                  std::size_t keys, std::size_t queries,
                                                                  float* out, std::size_t out_stride) {
  // In each 128 bits: two queries with the first key, then the same two with the second.
  const __m256 keys01 = _mm256_add_ps(_mm256_shuffle_ps(sums[0], sums[1], _MM_SHUFFLE(2, 0, 2, 0)),
                                      _mm256_shuffle_ps(sums[0], sums[1], _MM_SHUFFLE(3, 1, 3, 1)));
  const __m256 keys23 = _mm256_add_ps(_mm256_shuffle_ps(sums[2], sums[3], _MM_SHUFFLE(2, 0, 2, 0)),
                                      _mm256_shuffle_ps(sums[2], sums[3], _MM_SHUFFLE(3, 1, 3, 1)));
  const __m256 even = _mm256_shuffle_ps(keys01, keys23, _MM_SHUFFLE(2, 0, 2, 0));
  const __m256 odd = _mm256_shuffle_ps(keys01, keys23, _MM_SHUFFLE(3, 1, 3, 1));
  alignas(32) float rows[16];
  _mm256_store_ps(rows, _mm256_mul_ps(even, _mm256_set1_ps(scale)));
  _mm256_store_ps(rows + 8, _mm256_mul_ps(odd, _mm256_set1_ps(scale)));
  detail::copy_logits<2>(rows, keys, queries, out, out_stride);
}

/// Place `p` of a key, for all queries.
[[gnu::target("avx2,fma"), gnu::always_inline]] inline __m256 broadcast(const float* key, std::size_t p) {
  double both = 0.0;
  std::memcpy(&both, key + 2 * p, sizeof(both));
  return _mm256_castpd_ps(_mm256_set1_pd(both));
}
[[gnu::target("avx2,fma"), gnu::always_inline]] inline __m256 broadcast(const Eigen::bfloat16* key,
                                                                        std::size_t p) {
  int both = 0;
  std::memcpy(&both, key + 2 * p, sizeof(both));
  const __m256i to_upper_halves = _mm256_set1_epi64x(0x0302808001008080);
  return _mm256_castsi256_ps(_mm256_shuffle_epi8(_mm256_set1_epi32(both), to_upper_halves));
}

/// Sums of `count` keys with eight queries, four queries a register.
template <std::size_t count>
using Sums = __m256[2][count];

template <std::size_t count>
[[gnu::target("avx2,fma"), gnu::always_inline]] inline void clear(Sums<count>& sums) {
#pragma GCC unroll 8
  for (std::size_t k = 0; k < count; ++k) {
    sums[0][k] = _mm256_setzero_ps();
    sums[1][k] = _mm256_setzero_ps();
  }
}

/// `store` for all of them; `keys` and `queries` are wanted.
template <std::size_t count>
[[gnu::target("avx2,fma"), gnu::always_inline]] inline void store_all(const Sums<count>& sums, float scale,
                                                                      std::size_t keys, std::size_t queries,
                                                                      float* out, std::size_t out_stride) {
#pragma GCC unroll 2
  for (std::size_t k = 0; k < count; k += 4) {
    if (k < keys) {
      store(sums[0] + k, scale, keys - k, queries, out + k, out_stride);
      if (queries > 4) {
        store(sums[1] + k, scale, keys - k, queries - 4, out + k + 4 * out_stride, out_stride);
      }
    }
  }
}

/// Adds the products of place `p`.
template <std::size_t count, class T>
[[gnu::target("avx2,fma"), gnu::always_inline]] inline void add_place(const T* const* keys,
                                                                      const float* queries, std::size_t p,
                                                                      Sums<count>& sums) {
#pragma GCC unroll 8
  for (std::size_t k = 0; k < count; ++k) {
    const __m256 key = broadcast(keys[k], p);
    sums[0][k] = _mm256_fmadd_ps(_mm256_loadu_ps(queries + p * 2 * abreast), key, sums[0][k]);
    sums[1][k] = _mm256_fmadd_ps(_mm256_loadu_ps(queries + p * 2 * abreast + 8), key, sums[1][k]);
  }
}

/// `count` keys, of which `wanted_keys` are wanted, with `wanted` of the eight queries that stand at
/// `queries`.
///
/// On the way it asks for the memory of `count` keys `ahead`.
template <std::size_t count, class T, class S>
[[gnu::target("avx2,fma"), gnu::always_inline]] inline void multiply(
    const T* const* keys, std::size_t wanted_keys, detail::Ahead<S> ahead, const float* queries,
    std::size_t places, std::size_t wanted, float scale, float* out, std::size_t out_stride) {
  Sums<count> sums;
  clear<count>(sums);
  std::size_t p = 0;
  for (; p + detail::between <= places; p += detail::between) {
    ahead.template request<count, 2>();
#pragma GCC unroll 4
    for (std::size_t i = 0; i < detail::between; ++i) {
      add_place<count>(keys, queries, p + i, sums);
    }
  }
  for (; p < places; ++p) {
    add_place<count>(keys, queries, p, sums);
  }
  store_all<count>(sums, scale, wanted_keys, wanted, out, out_stride);
}

/// As portable::dot for eight keys, of which `count` are wanted; their elements fill whole places. It asks
/// for the memory of eight keys `ahead`. Sixteen registers hold the sums of four keys.
template <class T, class S>
[[gnu::target("avx2,fma")]] inline void dot(const T* const* keys, std::size_t count,
                                            const detail::Ahead<S>& ahead, const QueryBlock& queries,
                                            float scale, float* out, std::size_t out_stride) {
  const std::size_t places = queries.places();
  for (std::size_t q = 0; q < queries.count; q += abreast) {
    const std::size_t wanted = std::min(abreast, queries.count - q);
    for (std::size_t k = 0; k < count; k += 4) {
      multiply<4>(keys + k, count - k, ahead.from(k), queries.data + q * 2 * places, places, wanted, scale,
                  out + q * out_stride + k, out_stride);
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

/// As avx2::store, for eight queries.
[[gnu::target("avx2,fma,avx512f,avx512vl,avx512dq,avx512bw"), gnu::always_inline]] inline void store(
    const __m512* sums, float scale, std::size_t keys, std::size_t queries, float* out,
    std::size_t out_stride) {
  const __m512 keys01 =
      _mm512_add_ps(_mm512_maskz_shuffle_ps(0xFFFF, sums[0], sums[1], _MM_SHUFFLE(2, 0, 2, 0)),
                    _mm512_maskz_shuffle_ps(0xFFFF, sums[0], sums[1], _MM_SHUFFLE(3, 1, 3, 1)));
  const __m512 keys23 =
      _mm512_add_ps(_mm512_maskz_shuffle_ps(0xFFFF, sums[2], sums[3], _MM_SHUFFLE(2, 0, 2, 0)),
                    _mm512_maskz_shuffle_ps(0xFFFF, sums[2], sums[3], _MM_SHUFFLE(3, 1, 3, 1)));
  const __m512 even = _mm512_maskz_shuffle_ps(0xFFFF, keys01, keys23, _MM_SHUFFLE(2, 0, 2, 0));
  const __m512 odd = _mm512_maskz_shuffle_ps(0xFFFF, keys01, keys23, _MM_SHUFFLE(3, 1, 3, 1));
  alignas(64) float rows[32];
  _mm512_store_ps(rows, _mm512_mul_ps(even, _mm512_set1_ps(scale)));
  _mm512_store_ps(rows + 16, _mm512_mul_ps(odd, _mm512_set1_ps(scale)));
  detail::copy_logits<4>(rows, keys, queries, out, out_stride);
}

/// Place `p` of a key, for all queries.
[[gnu::target("avx2,fma,avx512f,avx512vl,avx512dq,avx512bw"), gnu::always_inline]] inline __m512 broadcast(
    const float* key, std::size_t p) {
  double both = 0.0;
  std::memcpy(&both, key + 2 * p, sizeof(both));
  return _mm512_castpd_ps(_mm512_set1_pd(both));
}
[[gnu::target("avx2,fma,avx512f,avx512vl,avx512dq,avx512bw"), gnu::always_inline]] inline __m512 broadcast(
    const Eigen::bfloat16* key, std::size_t p) {
  int both = 0;
  std::memcpy(&both, key + 2 * p, sizeof(both));
  const __m512i to_upper_halves = _mm512_set1_epi64(0x0302808001008080);
  return _mm512_castsi512_ps(_mm512_shuffle_epi8(_mm512_set1_epi32(both), to_upper_halves));
}

/// Adds the products of place `p` of eight keys with sixteen queries.
template <class T>
[[gnu::target("avx2,fma,avx512f,avx512vl,avx512dq,avx512bw"), gnu::always_inline]] inline void add_place(
    const T* const* keys, const float* queries, std::size_t places, std::size_t p,
    __m512 (&sums)[2][keys_at_once]) {
#pragma GCC unroll 8
  for (std::size_t k = 0; k < keys_at_once; ++k) {
    const __m512 key = broadcast(keys[k], p);
    sums[0][k] = _mm512_fmadd_ps(_mm512_loadu_ps(queries + p * 2 * abreast), key, sums[0][k]);
    sums[1][k] = _mm512_fmadd_ps(_mm512_loadu_ps(queries + (places + p) * 2 * abreast), key, sums[1][k]);
  }
}

/// As avx2::multiply for eight keys and sixteen queries, eight queries a register.
template <class T, class S>
[[gnu::target("avx2,fma,avx512f,avx512vl,avx512dq,avx512bw"), gnu::always_inline]] inline void multiply(
    const T* const* keys, std::size_t wanted_keys, detail::Ahead<S> ahead, const float* queries,
    std::size_t places, std::size_t wanted, float scale, float* out, std::size_t out_stride) {
  __m512 sums[2][keys_at_once];
#pragma GCC unroll 8
  for (std::size_t k = 0; k < keys_at_once; ++k) {
    sums[0][k] = _mm512_setzero_ps();
    sums[1][k] = _mm512_setzero_ps();
  }
  std::size_t p = 0;
  for (; p + detail::between <= places; p += detail::between) {
    ahead.template request<keys_at_once, 2>();
#pragma GCC unroll 4
    for (std::size_t i = 0; i < detail::between; ++i) {
      add_place(keys, queries, places, p + i, sums);
    }
  }
  for (; p < places; ++p) {
    add_place(keys, queries, places, p, sums);
  }
#pragma GCC unroll 2
  for (std::size_t u = 0; u < 2; ++u) {
#pragma GCC unroll 2
    for (std::size_t k = 0; k < keys_at_once; k += 4) {
      if (k < wanted_keys) {
        store(sums[u] + k, scale, wanted_keys - k, wanted - u * abreast, out + u * abreast * out_stride + k,
              out_stride);
      }
    }
  }
}

/// As avx2::dot; the same bits. Measured on Zen 4, whose wide registers compute no faster: eight queries take
/// a quarter longer in wide registers than in narrow ones, of which there are now enough for eight keys;
/// sixteen queries a twelfth less.
template <class T, class S>
[[gnu::target("avx2,fma,avx512f,avx512vl,avx512dq,avx512bw")]] inline void dot(
    const T* const* keys, std::size_t count, const detail::Ahead<S>& ahead, const QueryBlock& queries,
    float scale, float* out, std::size_t out_stride) {
  const std::size_t places = queries.places();
  for (std::size_t q = 0; q < queries.count; q += 2 * abreast) {
    const float* block = queries.data + q * 2 * places;
    const std::size_t wanted = std::min(2 * abreast, queries.count - q);
    float* const own = out + q * out_stride;
    if (wanted <= abreast) {
      avx2::multiply<keys_at_once>(keys, count, ahead, block, places, wanted, scale, own, out_stride);
    } else {
      avx512::multiply(keys, count, ahead, block, places, wanted, scale, own, out_stride);
    }
  }
}

/// As avx2::add_place, where a place of a bfloat16 key is two pairs: adds to each lane both products of a
/// pair.
[[gnu::target("avx2,fma,avx512f,avx512vl,avx512dq,avx512bw,avx512bf16"), gnu::always_inline]] inline void
add_pairs(const Eigen::bfloat16* const* keys, const float* queries, std::size_t p,
          avx2::Sums<keys_at_once>& sums) {
#pragma GCC unroll 8
  for (std::size_t k = 0; k < keys_at_once; ++k) {
    long long pairs = 0;
    std::memcpy(&pairs, keys[k] + 4 * p, sizeof(pairs));
    const auto key = reinterpret_cast<__m256bh>(_mm256_set1_epi64x(pairs));
#pragma GCC unroll 2
    for (std::size_t r = 0; r < 2; ++r) {
      const __m256 query = _mm256_loadu_ps(queries + p * 2 * abreast + 8 * r);
      sums[r][k] = _mm256_dpbf16_ps(sums[r][k], reinterpret_cast<__m256bh>(query), key);
    }
  }
}

/// Dot products of bfloat16 keys, where they stand, with queries in pairs. Products are exact and each of the
/// `head_dim` additions rounds once, as in the float32 paths, but in an order of its own; subnormal sums
/// become zero. Narrow registers here as well: measured, 0.8 of the time of wide ones.
[[gnu::target("avx2,fma,avx512f,avx512vl,avx512dq,avx512bw,avx512bf16")]] inline void dot_pairs(
    const Eigen::bfloat16* const* keys, std::size_t count, const detail::Ahead<Eigen::bfloat16>& ahead,
    const QueryBlock& queries, float scale, float* out, std::size_t out_stride) {
  const std::size_t places = queries.places();
  for (std::size_t q = 0; q < queries.count; q += abreast) {
    const float* block = queries.data + q * 2 * places;
    avx2::Sums<keys_at_once> sums;
    avx2::clear<keys_at_once>(sums);
    std::size_t p = 0;
    auto asked = ahead;
    for (; p + detail::between <= places; p += detail::between) {
      asked.request<keys_at_once, 4>();
#pragma GCC unroll 4
      for (std::size_t i = 0; i < detail::between; ++i) {
        add_pairs(keys, block, p + i, sums);
      }
    }
    for (; p < places; ++p) {
      add_pairs(keys, block, p, sums);
    }
    avx2::store_all<keys_at_once>(sums, scale, count, std::min(abreast, queries.count - q),
                                  out + q * out_stride, out_stride);
  }
}

}  // namespace avx512
#endif

namespace detail {

/// As portable::dot by the path in use. bfloat16 keys are taken as they are from AVX2 on.
template <class T, class S>
void dot(const T* const* keys, std::size_t count, [[maybe_unused]] const Ahead<S>& ahead,
         const QueryBlock& queries, float scale, float* out, std::size_t out_stride) {
#if defined(__x86_64__)
  if constexpr (std::same_as<T, Eigen::bfloat16>) {
    if (queries.pairs) {
      avx512::dot_pairs(keys, count, ahead, queries, scale, out, out_stride);
      return;
    }
  }
  if (uses(CodePath::avx512)) {
    avx512::dot(keys, count, ahead, queries, scale, out, out_stride);
    return;
  }
  if (uses(CodePath::avx2)) {
    avx2::dot(keys, count, ahead, queries, scale, out, out_stride);
    return;
  }
#endif
  if constexpr (std::same_as<T, float>) {
    portable::dot(keys, count, queries, scale, out, out_stride);
  }
}

/// What to ask for while the keys from row `row` of a run on are multiplied: those `bytes_ahead` on or, in
/// short runs, half of the run; near the end these once more.
template <class T>
Ahead<T> keys_ahead(const Run<const T>& keys, std::size_t row, std::size_t head_dim) {
  const std::size_t rows =
      std::clamp(bytes_ahead / (head_dim * sizeof(T)), keys_at_once, std::max(keys_at_once, keys.rows / 2));
  return {keys.row(row + rows + keys_at_once <= keys.rows ? row + rows : row), keys.row_stride, head_dim};
}

/// A key decoded to float32.
template <Stored T>
void bring(const Run<const T>& keys, std::size_t row, std::size_t head_dim, float* out) {
#if defined(__x86_64__)
  if constexpr (Element<T>) {
    if (keys.chunk >= head_dim && uses(CodePath::avx2)) {
      avx2::decode(keys.row(row), head_dim, out);
      return;
    }
  }
#endif
  decode_row(keys, row, head_dim, out);
}

/// A bfloat16 key as it is.
inline void bring(const Run<const Eigen::bfloat16>& keys, std::size_t row, std::size_t head_dim,
                  Eigen::bfloat16* out) {
  for (std::size_t e = 0; e < head_dim; ++e) {
    out[e] = keys.row(row)[static_cast<std::ptrdiff_t>(e / keys.chunk) * keys.chunk_stride +
                           static_cast<std::ptrdiff_t>(e % keys.chunk)];
  }
}

/// `logits` for keys that are multiplied as `T`: where they stand, if they are such, side by side and fill
/// their places; else brought to `buffer`.
template <class T, class Key>
void logits_of(const Run<const Key>& keys, std::size_t first, std::size_t count, const QueryBlock& queries,
               float scale, float* buffer, float* out, std::size_t out_stride) {
  const std::size_t head_dim = queries.head_dim;
  const std::size_t width = filled(head_dim);
  T* const brought = reinterpret_cast<T*>(buffer);
  bool stand = false;
  if constexpr (std::same_as<T, Key>) {
    stand = keys.chunk >= head_dim && width == head_dim;
  }
  if (width != head_dim) {
    std::fill_n(brought, keys_at_once * width, T(0));
  }
  const T* rows[keys_at_once];
  for (std::size_t i = 0; i < count; i += keys_at_once) {
    const std::size_t now = std::min(keys_at_once, count - i);
    for (std::size_t k = 0; k < now; ++k) {
      if constexpr (std::same_as<T, Key>) {
        if (stand) {
          rows[k] = keys.row(first + i + k);
          continue;
        }
      }
      rows[k] = brought + k * width;
      bring(keys, first + i + k, head_dim, brought + k * width);
    }
    std::fill(rows + now, rows + keys_at_once, rows[now - 1]);
    if constexpr (Element<Key>) {
      if (keys.chunk >= head_dim) {
        dot(rows, now, keys_ahead(keys, first + i, head_dim), queries, scale, out + i, out_stride);
        continue;
      }
    }
    dot(rows, now, Ahead<T>{brought, 0, width}, queries, scale, out + i, out_stride);
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
/// `out[q * out_stride + i] = scale * (query q . key first + i)`. Even and odd elements have a sum each, in
/// order, one rounding an addition, and the two are added at the end; sums of pairs have another order, with
/// no more roundings.
///
/// `buffer` has `key_buffer_size` floats. Cost: each key is read once, 2 * head_dim flops a query and key.
template <Stored T>
void logits(const Run<const T>& keys, std::size_t first, std::size_t count, const QueryBlock& queries,
            float scale, float* buffer, float* out, std::size_t out_stride) {
#if defined(__x86_64__)
  if constexpr (std::same_as<T, Eigen::bfloat16>) {
    if (uses(CodePath::avx2)) {
      detail::logits_of<T>(keys, first, count, queries, scale, buffer, out, out_stride);
      return;
    }
  }
#endif
  detail::logits_of<float>(keys, first, count, queries, scale, buffer, out, out_stride);
}

}  // namespace compresskv::kernel
