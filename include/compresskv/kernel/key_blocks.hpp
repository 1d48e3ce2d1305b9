#pragma once

#include <algorithm>
#include <cstddef>

#include "compresskv/core/strict_float_begin.hpp"

namespace compresskv::kernel {

/// Keys that meet all queries before the next ones come: eight sums hide the latency of the multiply-adds.
inline constexpr std::size_t keys_per_block = 8;

namespace detail {

/// Steps (see `PackedQueries`) by which the products' loops are unrolled: a cache line of float32 and of
/// bfloat16 pairs, so that each round prefetches one line of a key.
inline constexpr std::size_t unrolled_steps = 8;

/// Prefetch distance in bytes of keys. Prefetches go to the second-level cache, which holds more outstanding
/// ones than the first. They are needed: no CPU takes rows that are read side by side for a stream. Measured
/// (float32, eight queries, Zen 4): 4 KiB ahead to the first-level cache takes 1.5 times as long, without any
/// it is 3.9 times.
inline constexpr std::size_t prefetch_distance = 24U << 10U;

/// Floats between two blocks of decoded keys: whole pages and a half. A load waits for an earlier store whose
/// address has the same last twelve bits.
constexpr std::size_t decoded_stride(std::size_t head_dim) {
  return (keys_per_block * head_dim + 1023) / 1024 * 1024 + 512;
}

/// Keys with contiguous elements that fill whole steps (of half: `unrolled_steps` of them), row after row.
/// Rows up to a multiple of `keys_per_block` can be read; the values beyond `count` have no meaning.
template <class T>
struct ContiguousKeys {
  const T* first = nullptr;
  std::ptrdiff_t stride = 0;
  std::size_t count = 0;
  std::size_t rows_to_end = 0;    ///< rows of the run from `first` on: none beyond them is prefetched
  std::size_t prefetch_rows = 0;  ///< prefetch distance in rows

  const T* row(std::size_t index) const { return first + static_cast<std::ptrdiff_t>(index) * stride; }
};

/// Walks over keys, a block at a time. The products loop over all keys of a tile inside of one function, as a
/// call for each block took a fifth longer; what these loops share is here.
template <class T>
class KeyBlockCursor {
 public:
  explicit KeyBlockCursor(const ContiguousKeys<T>& keys) : keys_(keys) {}

  [[gnu::always_inline]] bool more() const { return at_ < keys_.count; }
  /// First key of the block.
  [[gnu::always_inline]] std::size_t first() const { return at_; }
  /// Keys of the block: fewer than `keys_per_block` in the last one.
  [[gnu::always_inline]] std::size_t size() const { return (std::min)(keys_per_block, keys_.count - at_); }

 protected:
  /// Points at the rows of a block and sets its prefetch offset, which is 0 near the end of the run. One line
  /// a block is prefetched at three times the distance: its page is then known when the other lines follow.
  /// That takes 0.9 of the time in float32.
  [[gnu::always_inline]] void point(std::size_t at) {
    rows_[0] = keys_.row(at);
#pragma GCC unroll 8
    for (std::size_t k = 1; k < keys_per_block; ++k) {
      rows_[k] = rows_[k - 1] + keys_.stride;
    }
    const std::size_t ahead = keys_.prefetch_rows;
    prefetch_offset_ = at + ahead + keys_per_block <= keys_.rows_to_end
                           ? static_cast<std::ptrdiff_t>(ahead) * keys_.stride
                           : 0;
    __builtin_prefetch(keys_.row(at + 3 * ahead < keys_.rows_to_end ? at + 3 * ahead : at), 0, 2);
  }

  ContiguousKeys<T> keys_;
  std::size_t at_ = 0;
  std::ptrdiff_t prefetch_offset_ = 0;
  const T* rows_[keys_per_block];
};

/// Blocks of keys that are multiplied in place; those of half: x86/key_blocks_avx2.hpp.
template <class T>
class KeyBlocks : public KeyBlockCursor<T> {
 public:
  KeyBlocks(const ContiguousKeys<T>& keys, std::size_t, float*) : KeyBlockCursor<T>(keys) { this->point(0); }

  [[gnu::always_inline]] void next() {
    this->at_ += keys_per_block;
    if (this->more()) {
      this->point(this->at_);
    }
  }

  /// Element `e` of key `k`.
  [[gnu::always_inline]] const T* element(std::size_t k, std::size_t e) const { return this->rows_[k] + e; }
  /// Step `s + i` of key `k`, `s` being a multiple of `unrolled_steps`.
  [[gnu::always_inline]] const T* step(std::size_t k, std::size_t s, std::size_t i) const {
    return element(k, 2 * (s + i));
  }

  /// Whether the products of the panel from query `q` on prefetch: the first panel does, for all of them.
  [[gnu::always_inline]] static bool prefetches(std::size_t q) { return q == 0; }

  /// Goes along with the products of keys `k` to `k + count` from step `s` on, `unrolled_steps` of `width`
  /// elements each: prefetches the same elements of later keys.
  template <std::size_t count, std::size_t width>
  [[gnu::always_inline]] void prefetch(std::size_t k, std::size_t s) const {
#pragma GCC unroll 8
    for (std::size_t i = 0; i < count; ++i) {
      __builtin_prefetch(element(k + i, s * width) + this->prefetch_offset_, 0, 2);
    }
  }
};

}  // namespace detail
}  // namespace compresskv::kernel

#include "compresskv/core/strict_float_end.hpp"
