#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include "compresskv/core/element.hpp"
#include "compresskv/kernel/code_path.hpp"
#include "compresskv/kernel/decode_row.hpp"
#include "compresskv/kernel/fused.hpp"
#include "compresskv/kernel/lanes.hpp"
#include "compresskv/view/run.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "compresskv/core/strict_float_begin.hpp"

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

/// Elements of a copied key: whole places, of whatever type.
constexpr std::size_t copied_width(std::size_t head_dim) { return (head_dim + 3) / 4 * 4; }

/// Floats from eight decoded keys to the eight after them: whole pages and a half. A load waits for a store
/// before it that is alike in the last twelve bits of its address.
constexpr std::size_t decoded_size(std::size_t head_dim) {
  return (keys_at_once * head_dim + 1023) / 1024 * 1024 + 512;
}

}  // namespace detail

/// Floats of memory that `logits` needs for keys of a kind that must be copied or decoded first.
constexpr std::size_t key_buffer_size(ElementKind kind, std::size_t head_dim) {
  return kind == ElementKind::float16 ? 2 * detail::decoded_size(head_dim)
                                      : keys_at_once * detail::copied_width(head_dim);
}
template <Stored T>
constexpr std::size_t key_buffer_size(std::size_t head_dim) {
  return key_buffer_size(kind_of_element<T>(), head_dim);
}

namespace detail {

/// Places that the products take between two looks ahead: a cache line of float32 and of bfloat16 pairs.
inline constexpr std::size_t places_at_once = 8;

/// Bytes of keys between the products and the requests of memory. The requests go to the second-level cache,
/// which has room for more of them at a time than the nearest. Rows read side by side are no stream that a
/// CPU predicts. Measured (float32, eight queries, Zen 4): to the nearest cache, 4 KiB ahead, takes 1.5 times
/// as long, no requests 3.9 times.
inline constexpr std::size_t bytes_ahead = 24U << 10U;

/// Keys whose elements stand side by side and fill whole places (of half: `places_at_once` of them), row
/// after row. Rows are there up to a multiple of eight; what follows the `count` wanted ones has no meaning.
template <class T>
struct KeyRows {
  const T* first = nullptr;
  std::ptrdiff_t stride = 0;
  std::size_t count = 0;
  std::size_t reach = 0;  ///< rows of the run from `first` on, whose memory may be asked for
  std::size_t lead = 0;   ///< rows from those that are multiplied to those that are asked for

  const T* row(std::size_t index) const { return first + static_cast<std::ptrdiff_t>(index) * stride; }
};

/// Eight keys after eight keys, as the products want them. The loops of the products run over all keys of a
/// tile, since a call for each eight took a fifth longer; what these loops share is here.
template <class T>
class BlocksOfEight {
 public:
  explicit BlocksOfEight(const KeyRows<T>& keys) : keys_(keys) {}

  [[gnu::always_inline]] bool more() const { return at_ < keys_.count; }
  /// The first of them, and how many are wanted.
  [[gnu::always_inline]] std::size_t at() const { return at_; }
  [[gnu::always_inline]] std::size_t wanted() const { return (std::min)(keys_at_once, keys_.count - at_); }

 protected:
  /// Points at eight rows, and says how far on memory is to be asked for: not at all near the end of what
  /// there is. One line is asked for three times as far ahead, so that its page is known when the others
  /// come: 0.9 of the time of float32.
  [[gnu::always_inline]] void point(std::size_t at) {
    rows_[0] = keys_.row(at);
#pragma GCC unroll 8
    for (std::size_t k = 1; k < keys_at_once; ++k) {
      rows_[k] = rows_[k - 1] + keys_.stride;
    }
    const std::size_t lead = keys_.lead;
    ahead_ = at + lead + keys_at_once <= keys_.reach ? static_cast<std::ptrdiff_t>(lead) * keys_.stride : 0;
    __builtin_prefetch(keys_.row(at + 3 * lead < keys_.reach ? at + 3 * lead : at), 0, 2);
  }

  KeyRows<T> keys_;
  std::size_t at_ = 0;
  std::ptrdiff_t ahead_ = 0;
  const T* rows_[keys_at_once];
};

template <class T>
class KeyBlocks : public BlocksOfEight<T> {
 public:
  KeyBlocks(const KeyRows<T>& keys, std::size_t, float*) : BlocksOfEight<T>(keys) { this->point(0); }

  [[gnu::always_inline]] void next() {
    this->at_ += keys_at_once;
    if (this->more()) {
      this->point(this->at_);
    }
  }

  /// Element `e` of key `k`.
  [[gnu::always_inline]] const T* element(std::size_t k, std::size_t e) const { return this->rows_[k] + e; }
  /// Place `p + i` of key `k`, `p` being a multiple of `places_at_once`.
  [[gnu::always_inline]] const T* place(std::size_t k, std::size_t p, std::size_t i) const {
    return element(k, 2 * (p + i));
  }

  /// Whether it is for query `q` and its neighbours to look ahead: once for all queries.
  [[gnu::always_inline]] static bool looks_ahead(std::size_t q) { return q == 0; }

  /// What is done beside the products of `places_at_once` places from `p` on, of `width` elements each, of
  /// keys `k` to `k + count`: asks for the memory of later keys.
  template <std::size_t count, std::size_t width>
  [[gnu::always_inline]] void look_ahead(std::size_t k, std::size_t p) const {
#pragma GCC unroll 8
    for (std::size_t i = 0; i < count; ++i) {
      __builtin_prefetch(element(k + i, p * width) + this->ahead_, 0, 2);
    }
  }
};

}  // namespace detail

namespace portable {

/// `out[q * out_stride + k] = scale * (query q . key k)`. Even and odd elements have a sum each, in order,
/// each addition fused; at the end the two are added: the order of every path.
inline void dot(const detail::KeyRows<float>& keys, const QueryBlock& queries, float scale, float* out,
                std::size_t out_stride) {
  for (std::size_t q = 0; q < queries.count; ++q) {
    const float* query = queries.data + (q / abreast * queries.places() * abreast + q % abreast) * 2;
    for (std::size_t k = 0; k < keys.count; ++k) {
      const float* key = keys.row(k);
      float even = 0.0F;
      float odd = 0.0F;
      for (std::size_t p = 0; p < queries.places(); ++p) {
        even = fused(query[p * 2 * abreast], key[2 * p], even);
        odd = fused(query[p * 2 * abreast + 1], key[2 * p + 1], odd);
      }
      out[q * out_stride + k] = (even + odd) * scale;
    }
  }
}

}  // namespace portable

#if defined(__x86_64__)
namespace detail {

/// Of half: eight keys are decoded while the eight before them are multiplied. `buffer` has room for both;
/// `places_at_once` of the first key come first, then those of the second: so one register points at all.
template <>
class KeyBlocks<Eigen::half> : public BlocksOfEight<Eigen::half> {
 public:
  [[gnu::target("avx2,fma,f16c"), gnu::always_inline]] KeyBlocks(const KeyRows<Eigen::half>& keys,
                                                                 std::size_t head_dim, float* buffer)
      : BlocksOfEight(keys), now_(buffer), later_(buffer + decoded_size(head_dim)) {
    point(0);
    for (std::size_t e = 0; e < head_dim; e += 2 * places_at_once) {
#pragma GCC unroll 8
      for (std::size_t k = 0; k < keys_at_once; ++k) {
        decode(k, e, now_);
      }
    }
    point_later();
  }

  [[gnu::always_inline]] void next() {
    at_ += keys_at_once;
    std::swap(now_, later_);
    point_later();
  }

  [[gnu::always_inline]] const float* place(std::size_t k, std::size_t p, std::size_t i) const {
    return now_ + 2 * (p * keys_at_once + k * places_at_once + i);
  }

  /// Further queries decode once more: with a branch that spares it, eight queries took a twentieth longer.
  [[gnu::always_inline]] static bool looks_ahead(std::size_t) { return true; }

  template <std::size_t count, std::size_t width>
  [[gnu::target("avx2,fma,f16c"), gnu::always_inline]] void look_ahead(std::size_t k, std::size_t p) const {
#pragma GCC unroll 8
    for (std::size_t i = 0; i < count; ++i) {
      __builtin_prefetch(rows_[k + i] + ahead_ + p * width, 0, 2);
      decode(k + i, p * width, later_);
    }
  }

 private:
  /// `places_at_once` of a key from element `e` on.
  [[gnu::target("avx2,fma,f16c"), gnu::always_inline]] void decode(std::size_t k, std::size_t e,
                                                                   float* keys) const {
    float* const to = keys + e * keys_at_once + k * 2 * places_at_once;
    _mm256_storeu_ps(to, avx2::load8(rows_[k] + e));
    _mm256_storeu_ps(to + 8, avx2::load8(rows_[k] + e + 8));
  }

  /// At the keys to decode next; after the last ones come the same once more.
  [[gnu::always_inline]] void point_later() {
    point(at_ + keys_at_once < keys_.count ? at_ + keys_at_once : keys_.count - keys_at_once);
  }

  float* now_;
  float* later_;
};

}  // namespace detail

namespace avx2 {

/// What four keys have with four queries, times `scale`, to `out[query * out_stride + key]`.
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

/// Both elements of a place, for all queries.
[[gnu::target("avx2,fma,f16c"), gnu::always_inline]] inline __m256 broadcast(const float* place) {
  double both = 0.0;
  std::memcpy(&both, place, sizeof(both));
  return _mm256_castpd_ps(_mm256_set1_pd(both));
}
[[gnu::target("avx2,fma,f16c"), gnu::always_inline]] inline __m256 broadcast(const Eigen::bfloat16* place) {
  int both = 0;
  std::memcpy(&both, place, sizeof(both));
  const __m256i to_upper_halves = _mm256_set1_epi64x(0x0302808001008080);
  return _mm256_castsi256_ps(_mm256_shuffle_epi8(_mm256_set1_epi32(both), to_upper_halves));
}

/// Sums of `count` keys with eight queries, four queries a register.
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

/// `store` for all of them.
template <std::size_t count>
[[gnu::target("avx2,fma,f16c"), gnu::always_inline]] inline void store_all(const Sums<count>& sums,
                                                                           float scale, float* out,
                                                                           std::size_t out_stride) {
#pragma GCC unroll 2
  for (std::size_t k = 0; k < count; k += 4) {
    store(sums[0] + k, scale, out + k, out_stride);
    store(sums[1] + k, scale, out + k + 4 * out_stride, out_stride);
  }
}

/// The same where `keys` and `queries` of them are wanted.
template <std::size_t count>
[[gnu::target("avx2,fma,f16c"), gnu::always_inline]] inline void store_wanted(const Sums<count>& sums,
                                                                              float scale, std::size_t keys,
                                                                              std::size_t queries, float* out,
                                                                              std::size_t out_stride) {
  if (keys >= count && queries >= abreast) {
    store_all<count>(sums, scale, out, out_stride);
    return;
  }
  float rows[abreast * count];
  store_all<count>(sums, scale, rows, count);
  for (std::size_t q = 0; q < (std::min)(queries, abreast); ++q) {
    std::copy_n(rows + q * count, (std::min)(keys, count), out + q * out_stride);
  }
}

/// Adds the products of place `p + i` of keys `k` to `k + count` with the eight queries at `queries`.
template <std::size_t count, class Block>
[[gnu::target("avx2,fma,f16c"), gnu::always_inline]] inline void add_place(const Block& block, std::size_t k,
                                                                           const float* queries,
                                                                           std::size_t p, std::size_t i,
                                                                           Sums<count>& sums) {
  const float* own = queries + (p + i) * 2 * abreast;
#pragma GCC unroll 8
  for (std::size_t j = 0; j < count; ++j) {
    const __m256 key = broadcast(block.place(k + j, p, i));
    sums[0][j] = _mm256_fmadd_ps(_mm256_loadu_ps(own), key, sums[0][j]);
    sums[1][j] = _mm256_fmadd_ps(_mm256_loadu_ps(own + 8), key, sums[1][j]);
  }
}

/// Keys `k` to `k + count` with `wanted` of the eight queries at `queries`; `out` is where those of the block
/// go. With `ahead` it looks ahead.
template <std::size_t count, class Block>
[[gnu::target("avx2,fma,f16c"), gnu::always_inline]] inline void multiply(
    const Block& block, std::size_t k, bool ahead, const float* queries, std::size_t places,
    std::size_t wanted, float scale, float* out, std::size_t out_stride) {
  Sums<count> sums;
  clear<count>(sums);
  std::size_t p = 0;
  for (; p + detail::places_at_once <= places; p += detail::places_at_once) {
    if (ahead) {
      block.template look_ahead<count, 2>(k, p);
    }
#pragma GCC unroll 8
    for (std::size_t i = 0; i < detail::places_at_once; ++i) {
      add_place<count>(block, k, queries, p, i, sums);
    }
  }
  for (; p < places; ++p) {
    add_place<count>(block, k, queries, p, 0, sums);
  }
  store_wanted<count>(sums, scale, block.wanted() - k, wanted, out + k, out_stride);
}

/// As portable::dot. Sixteen registers hold the sums of four keys.
template <class T>
[[gnu::target("avx2,fma,f16c")]] inline void dot(const detail::KeyRows<T>& keys, const QueryBlock& queries,
                                                 float scale, float* buffer, float* out,
                                                 std::size_t out_stride) {
  const std::size_t places = queries.places();
  for (detail::KeyBlocks<T> block(keys, queries.head_dim, buffer); block.more(); block.next()) {
    for (std::size_t q = 0; q < queries.count; q += abreast) {
      for (std::size_t k = 0; k < block.wanted(); k += 4) {
        multiply<4>(block, k, block.looks_ahead(q), queries.data + q * 2 * places, places, queries.count - q,
                    scale, out + q * out_stride + block.at(), out_stride);
      }
    }
  }
}

}  // namespace avx2

namespace avx512 {

/// As avx2::store, for eight queries.
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

/// Both elements of a place, for all queries.
[[gnu::target("avx2,fma,f16c,avx512f,avx512vl,avx512dq,avx512bw"), gnu::always_inline]] inline __m512
broadcast(const float* place) {
  double both = 0.0;
  std::memcpy(&both, place, sizeof(both));
  return _mm512_castpd_ps(_mm512_set1_pd(both));
}
[[gnu::target("avx2,fma,f16c,avx512f,avx512vl,avx512dq,avx512bw"), gnu::always_inline]] inline __m512
broadcast(const Eigen::bfloat16* place) {
  int both = 0;
  std::memcpy(&both, place, sizeof(both));
  const __m512i to_upper_halves = _mm512_set1_epi64(0x0302808001008080);
  return _mm512_castsi512_ps(_mm512_shuffle_epi8(_mm512_set1_epi32(both), to_upper_halves));
}

/// As avx2::add_place for eight keys and sixteen queries, eight queries a register.
template <class Block>
[[gnu::target("avx2,fma,f16c,avx512f,avx512vl,avx512dq,avx512bw"), gnu::always_inline]] inline void add_place(
    const Block& block, const float* queries, std::size_t places, std::size_t p, std::size_t i,
    __m512 (&sums)[2][keys_at_once]) {
  const float* own = queries + (p + i) * 2 * abreast;
#pragma GCC unroll 8
  for (std::size_t k = 0; k < keys_at_once; ++k) {
    const __m512 key = broadcast(block.place(k, p, i));
    sums[0][k] = _mm512_fmadd_ps(_mm512_loadu_ps(own), key, sums[0][k]);
    sums[1][k] = _mm512_fmadd_ps(_mm512_loadu_ps(own + places * 2 * abreast), key, sums[1][k]);
  }
}

/// As avx2::multiply for eight keys and sixteen queries, all of which are wanted.
template <class Block>
[[gnu::target("avx2,fma,f16c,avx512f,avx512vl,avx512dq,avx512bw"), gnu::always_inline]] inline void multiply(
    const Block& block, bool ahead, const float* queries, std::size_t places, float scale, float* out,
    std::size_t out_stride) {
  __m512 sums[2][keys_at_once];
#pragma GCC unroll 8
  for (std::size_t k = 0; k < keys_at_once; ++k) {
    sums[0][k] = _mm512_setzero_ps();
    sums[1][k] = _mm512_setzero_ps();
  }
  std::size_t p = 0;
  for (; p + detail::places_at_once <= places; p += detail::places_at_once) {
    if (ahead) {
      block.template look_ahead<keys_at_once, 2>(0, p);
    }
#pragma GCC unroll 8
    for (std::size_t i = 0; i < detail::places_at_once; ++i) {
      add_place(block, queries, places, p, i, sums);
    }
  }
  for (; p < places; ++p) {
    add_place(block, queries, places, p, 0, sums);
  }
#pragma GCC unroll 2
  for (std::size_t u = 0; u < 2; ++u) {
#pragma GCC unroll 2
    for (std::size_t k = 0; k < keys_at_once; k += 4) {
      store(sums[u] + k, scale, out + u * abreast * out_stride + k, out_stride);
    }
  }
}

/// As avx2::dot; the same bits. Measured on Zen 4, whose wide registers compute no faster: eight queries take
/// 1.4 times as long in wide registers as in narrow ones, of which there are now enough for eight keys.
/// Sixteen queries take as long: wide registers for CPUs where they compute twice as much.
template <class T>
[[gnu::target("avx2,fma,f16c,avx512f,avx512vl,avx512dq,avx512bw")]] inline void dot(
    const detail::KeyRows<T>& keys, const QueryBlock& queries, float scale, float* buffer, float* out,
    std::size_t out_stride) {
  const std::size_t places = queries.places();
  for (detail::KeyBlocks<T> block(keys, queries.head_dim, buffer); block.more(); block.next()) {
    float* const own = out + block.at();
    std::size_t q = 0;
    for (; q + 2 * abreast <= queries.count && block.wanted() == keys_at_once; q += 2 * abreast) {
      avx512::multiply(block, block.looks_ahead(q), queries.data + q * 2 * places, places, scale,
                       own + q * out_stride, out_stride);
    }
    for (; q < queries.count; q += abreast) {
      avx2::multiply<keys_at_once>(block, 0, block.looks_ahead(q), queries.data + q * 2 * places, places,
                                   queries.count - q, scale, own + q * out_stride, out_stride);
    }
  }
}

/// As avx2::add_place, where a place of a bfloat16 key is two pairs: adds to each lane both products of a
/// pair.
[[gnu::target("avx2,fma,f16c,avx512f,avx512vl,avx512dq,avx512bw,avx512bf16"), gnu::always_inline]] inline void
add_pairs(const detail::KeyBlocks<Eigen::bfloat16>& block, const float* queries, std::size_t p,
          avx2::Sums<keys_at_once>& sums) {
#pragma GCC unroll 8
  for (std::size_t k = 0; k < keys_at_once; ++k) {
    long long pairs = 0;
    std::memcpy(&pairs, block.element(k, 4 * p), sizeof(pairs));
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
/// become zero. Narrow registers here as well: measured, 0.9 of the time of wide ones.
[[gnu::target("avx2,fma,f16c,avx512f,avx512vl,avx512dq,avx512bw,avx512bf16")]] inline void dot_pairs(
    const detail::KeyRows<Eigen::bfloat16>& keys, const QueryBlock& queries, float scale, float* out,
    std::size_t out_stride) {
  const std::size_t places = queries.places();
  for (detail::KeyBlocks<Eigen::bfloat16> block(keys, 0, nullptr); block.more(); block.next()) {
    for (std::size_t q = 0; q < queries.count; q += abreast) {
      const float* own_queries = queries.data + q * 2 * places;
      avx2::Sums<keys_at_once> sums;
      avx2::clear<keys_at_once>(sums);
      std::size_t p = 0;
      for (; p + detail::places_at_once <= places; p += detail::places_at_once) {
        if (block.looks_ahead(q)) {
          block.look_ahead<keys_at_once, 4>(0, p);
        }
#pragma GCC unroll 8
        for (std::size_t i = 0; i < detail::places_at_once; ++i) {
          add_pairs(block, own_queries, p + i, sums);
        }
      }
      for (; p < places; ++p) {
        add_pairs(block, own_queries, p, sums);
      }
      avx2::store_wanted<keys_at_once>(sums, scale, block.wanted(), queries.count - q,
                                       out + q * out_stride + block.at(), out_stride);
    }
  }
}

}  // namespace avx512
#endif

namespace detail {

/// As portable::dot by the path in use. Other types than float32 need AVX2.
template <class T>
void dot(const KeyRows<T>& keys, const QueryBlock& queries, float scale, [[maybe_unused]] float* buffer,
         float* out, std::size_t out_stride) {
#if defined(__x86_64__)
  if constexpr (std::same_as<T, Eigen::bfloat16>) {
    if (queries.pairs) {
      avx512::dot_pairs(keys, queries, scale, out, out_stride);
      return;
    }
  }
  if (uses(CodePath::avx512)) {
    avx512::dot(keys, queries, scale, buffer, out, out_stride);
    return;
  }
  if (uses(CodePath::avx2)) {
    avx2::dot(keys, queries, scale, buffer, out, out_stride);
    return;
  }
#endif
  if constexpr (std::same_as<T, float>) {
    portable::dot(keys, queries, scale, out, out_stride);
  }
}

/// Keys of a run from row `first` on. Those asked for are `bytes_ahead` later or, in short runs, half of the
/// run.
template <class T>
KeyRows<T> key_rows(const Run<const T>& keys, std::size_t first, std::size_t count, std::size_t head_dim) {
  return {.first = keys.row(first),
          .stride = keys.row_stride,
          .count = count,
          .reach = keys.rows - first,
          .lead = std::clamp(bytes_ahead / (head_dim * sizeof(T)), keys_at_once,
                             (std::max)(keys_at_once, keys.rows / 2))};
}

/// How many of `count` keys can be multiplied where they stand, by eights.
template <Stored T>
std::size_t ready(const Run<const T>& keys, std::size_t count, std::size_t head_dim) {
  if constexpr (Element<T>) {
    const std::size_t whole = std::same_as<T, Eigen::half> ? 2 * places_at_once : 4;
    if (keys.chunk >= head_dim && head_dim % whole == 0 && (std::same_as<T, float> || uses(CodePath::avx2))) {
      return count / keys_at_once * keys_at_once;
    }
  }
  return 0;
}

/// A key decoded to float32.
template <Stored T>
void copy_key(const Run<const T>& keys, std::size_t row, std::size_t head_dim, float* out) {
  decode_row(keys, row, head_dim, out);
}

/// A bfloat16 key as it is.
inline void copy_key(const Run<const Eigen::bfloat16>& keys, std::size_t row, std::size_t head_dim,
                     Eigen::bfloat16* out) {
  for (std::size_t e = 0; e < head_dim; ++e) {
    out[e] = keys.row(row)[static_cast<std::ptrdiff_t>(e / keys.chunk) * keys.chunk_stride +
                           static_cast<std::ptrdiff_t>(e % keys.chunk)];
  }
}

/// `logits` for keys that are copied to `buffer` as `T` first, eight at a time.
template <class T, class Key>
void logits_of_copied(const Run<const Key>& keys, std::size_t first, std::size_t count,
                      const QueryBlock& queries, float scale, float* buffer, float* out,
                      std::size_t out_stride) {
  const std::size_t width = copied_width(queries.head_dim);
  T* const copied = reinterpret_cast<T*>(buffer);
  if (width != queries.head_dim) {
    std::fill_n(copied, keys_at_once * width, T(0));
  }
  for (std::size_t i = 0; i < count; i += keys_at_once) {
    const std::size_t now = (std::min)(keys_at_once, count - i);
    for (std::size_t k = 0; k < now; ++k) {
      copy_key(keys, first + i + k, queries.head_dim, copied + k * width);
    }
    dot(KeyRows<T>{.first = copied, .stride = static_cast<std::ptrdiff_t>(width), .count = now}, queries,
        scale, buffer, out + i, out_stride);
  }
}

}  // namespace detail

/// Whether this path multiplies bfloat16 keys with bfloat16 queries as they stand (`QueryBlock::pairs`).
inline bool in_pairs(ElementKind key, ElementKind query, std::size_t head_dim) {
  return key == ElementKind::bfloat16 && query == ElementKind::bfloat16 && head_dim % 2 == 0 &&
         uses(CodePath::avx512_bf16);
}

/// Attention logits of every query with `count` keys from row `first` of a run:
/// `out[q * out_stride + i] = scale * (query q . key first + i)`. Even and odd elements have a sum each, in
/// order, one rounding an addition, and the two are added at the end; sums of pairs have another order, with
/// no more roundings.
///
/// `buffer` has `key_buffer_size<T>` floats. Cost: each key is read once, 2 * head_dim flops a query and key.
template <Stored T>
void logits(const Run<const T>& keys, std::size_t first, std::size_t count, const QueryBlock& queries,
            float scale, float* buffer, float* out, std::size_t out_stride) {
  const std::size_t ready = detail::ready(keys, count, queries.head_dim);
  if constexpr (Element<T>) {
    if (ready > 0) {
      detail::dot(detail::key_rows(keys, first, ready, queries.head_dim), queries, scale, buffer, out,
                  out_stride);
    }
  }
  first += ready;
  count -= ready;
  out += ready;
  if constexpr (std::same_as<T, Eigen::bfloat16>) {
    if (queries.pairs) {
      detail::logits_of_copied<T>(keys, first, count, queries, scale, buffer, out, out_stride);
      return;
    }
  }
  detail::logits_of_copied<float>(keys, first, count, queries, scale, buffer, out, out_stride);
}

}  // namespace compresskv::kernel

#include "compresskv/core/strict_float_end.hpp"
