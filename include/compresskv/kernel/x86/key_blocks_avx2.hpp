#pragma once

#include <cstddef>
#include <utility>

#include "compresskv/core/element.hpp"
#include "compresskv/kernel/key_blocks.hpp"
#include "compresskv/kernel/x86/lanes_avx2.hpp"

#if defined(__x86_64__)
#include <immintrin.h>

#include "compresskv/core/strict_float_begin.hpp"

namespace compresskv::kernel::detail {

/// Blocks of half keys: a block is decoded while the one before it is multiplied. `buffer` has room for both,
/// `decoded_stride` apart. Decoded keys are interleaved by `unrolled_steps`, so that one register addresses
/// all keys of a block.
template <>
class KeyBlocks<half> : public KeyBlockCursor<half> {
 public:
  [[gnu::target("avx2,fma,f16c"), gnu::always_inline]] KeyBlocks(const ContiguousKeys<half>& keys,
                                                                 std::size_t head_dim, float* buffer)
      : KeyBlockCursor(keys), current_(buffer), next_(buffer + decoded_stride(head_dim)) {
    point(0);
    for (std::size_t e = 0; e < head_dim; e += 2 * unrolled_steps) {
#pragma GCC unroll 8
      for (std::size_t k = 0; k < keys_per_block; ++k) {
        decode(k, e, current_);
      }
    }
    point_at_next();
  }

  [[gnu::always_inline]] void next() {
    at_ += keys_per_block;
    std::swap(current_, next_);
    point_at_next();
  }

  [[gnu::always_inline]] const float* step(std::size_t k, std::size_t s, std::size_t i) const {
    return current_ + 2 * (s * keys_per_block + k * unrolled_steps + i);
  }

  /// Every panel does, and decodes once more: with a branch that spares it, eight queries took a twentieth
  /// longer.
  [[gnu::always_inline]] static bool prefetches(std::size_t) { return true; }

  /// Prefetches as any block does, and decodes the next one.
  template <std::size_t count, std::size_t width>
  [[gnu::target("avx2,fma,f16c"), gnu::always_inline]] void prefetch(std::size_t k, std::size_t s) const {
#pragma GCC unroll 8
    for (std::size_t i = 0; i < count; ++i) {
      __builtin_prefetch(rows_[k + i] + prefetch_offset_ + s * width, 0, 2);
      decode(k + i, s * width, next_);
    }
  }

 private:
  /// `unrolled_steps` of a key from element `e` on.
  [[gnu::target("avx2,fma,f16c"), gnu::always_inline]] void decode(std::size_t k, std::size_t e,
                                                                   float* keys) const {
    float* const to = keys + e * keys_per_block + k * 2 * unrolled_steps;
    _mm256_storeu_ps(to, avx2::load8(rows_[k] + e));
    _mm256_storeu_ps(to + 8, avx2::load8(rows_[k] + e + 8));
  }

  /// At the block to decode next; after the last one, at the last one again.
  [[gnu::always_inline]] void point_at_next() {
    point(at_ + keys_per_block < keys_.count ? at_ + keys_per_block : keys_.count - keys_per_block);
  }

  float* current_;
  float* next_;
};

}  // namespace compresskv::kernel::detail

#include "compresskv/core/strict_float_end.hpp"
#endif
