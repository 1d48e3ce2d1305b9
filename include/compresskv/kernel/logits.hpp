#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>

#include "compresskv/core/element.hpp"
#include "compresskv/core/strict_float_begin.hpp"
#include "compresskv/kernel/code_path.hpp"
#include "compresskv/kernel/decode_row.hpp"
#include "compresskv/kernel/key_blocks.hpp"
#include "compresskv/kernel/logits_portable.hpp"
#include "compresskv/kernel/packed_queries.hpp"
#include "compresskv/kernel/x86/logits_avx2_avx512.hpp"
#include "compresskv/kernel/x86/logits_avx512_bf16.hpp"
#include "compresskv/view/run.hpp"

namespace compresskv::kernel {

namespace detail {

/// Elements of a copied key: whole steps, of whatever type.
constexpr std::size_t padded_width(std::size_t head_dim) { return (head_dim + 3) / 4 * 4; }

}  // namespace detail

/// Floats of memory that `logits` needs for keys of a kind, to copy or decode them.
constexpr std::size_t key_buffer_size(ElementKind kind, std::size_t head_dim) {
  return kind == ElementKind::float16 ? 2 * detail::decoded_stride(head_dim)
                                      : keys_per_block * detail::padded_width(head_dim);
}
template <Stored T>
constexpr std::size_t key_buffer_size(std::size_t head_dim) {
  return key_buffer_size(kind_of_element<T>(), head_dim);
}

namespace detail {

/// As portable::dot by the path in use. Other types than float32 need AVX2.
template <class T>
void dot(const ContiguousKeys<T>& keys, const PackedQueries& queries, float scale,
         [[maybe_unused]] float* buffer, float* out, std::size_t out_stride) {
#if defined(__x86_64__)
  if constexpr (std::same_as<T, bfloat16>) {
    if (queries.bf16_pairs) {
      avx512_bf16::dot(keys, queries, scale, out, out_stride);
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

/// Keys of a run from row `first` on. In short runs the prefetch distance is half of the run.
template <class T>
ContiguousKeys<T> contiguous_keys(const Run<const T>& keys, std::size_t first, std::size_t count,
                                  std::size_t head_dim) {
  return {.first = keys.row(first),
          .stride = keys.row_stride,
          .count = count,
          .rows_to_end = keys.rows - first,
          .prefetch_rows = std::clamp(prefetch_distance / (head_dim * sizeof(T)), keys_per_block,
                                      (std::max)(keys_per_block, keys.rows / 2))};
}

/// How many of `count` keys can be multiplied in place: whole blocks of them.
template <Stored T>
std::size_t count_in_place(const Run<const T>& keys, std::size_t count, std::size_t head_dim) {
  if constexpr (Element<T>) {
    const std::size_t whole = std::same_as<T, half> ? 2 * unrolled_steps : 4;
    if (keys.chunk >= head_dim && head_dim % whole == 0 && (std::same_as<T, float> || uses(CodePath::avx2))) {
      return count / keys_per_block * keys_per_block;
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
inline void copy_key(const Run<const bfloat16>& keys, std::size_t row, std::size_t head_dim, bfloat16* out) {
  for (std::size_t e = 0; e < head_dim; ++e) {
    out[e] = keys.row(row)[static_cast<std::ptrdiff_t>(e / keys.chunk) * keys.chunk_stride +
                           static_cast<std::ptrdiff_t>(e % keys.chunk)];
  }
}

/// `logits` for keys that are first copied to `buffer` as `T`, a block at a time, and multiplied by
/// `multiply`.
template <class T, class Key, class Multiply>
void logits_of_copied(const Run<const Key>& keys, std::size_t first, std::size_t count,
                      const PackedQueries& queries, float* buffer, float* out, const Multiply& multiply) {
  const std::size_t width = padded_width(queries.head_dim);
  T* const copied = reinterpret_cast<T*>(buffer);
  if (width != queries.head_dim) {
    std::fill_n(copied, keys_per_block * width, T(0.0F));
  }
  for (std::size_t i = 0; i < count; i += keys_per_block) {
    const std::size_t copies = (std::min)(keys_per_block, count - i);
    for (std::size_t k = 0; k < copies; ++k) {
      copy_key(keys, first + i + k, queries.head_dim, copied + k * width);
    }
    multiply(
        ContiguousKeys<T>{.first = copied, .stride = static_cast<std::ptrdiff_t>(width), .count = copies},
        out + i);
  }
}

}  // namespace detail

/// Whether the path in use multiplies bfloat16 keys with bfloat16 queries in place
/// (`PackedQueries::bf16_pairs`).
inline bool uses_bf16_pairs(ElementKind key, ElementKind query, std::size_t head_dim) {
  return key == ElementKind::bfloat16 && query == ElementKind::bfloat16 && head_dim % 2 == 0 &&
         uses(CodePath::avx512_bf16);
}

/// Attention logits of every query with `count` keys from row `first` of a run:
/// `out[q * out_stride + i] = scale * (query q . key first + i)`. Even and odd elements have a sum each, in
/// order, one rounding an addition, and the two are added at the end. With `bf16_pairs` the order is another;
/// there are no more roundings.
///
/// `buffer` has `key_buffer_size<T>` floats. Cost: each key is read once, 2 * head_dim flops a query and key.
template <Stored T>
void logits(const Run<const T>& keys, std::size_t first, std::size_t count, const PackedQueries& queries,
            float scale, float* buffer, float* out, std::size_t out_stride) {
  const std::size_t in_place = detail::count_in_place(keys, count, queries.head_dim);
  if constexpr (Element<T>) {
    if (in_place > 0) {
      detail::dot(detail::contiguous_keys(keys, first, in_place, queries.head_dim), queries, scale, buffer,
                  out, out_stride);
    }
  }
  first += in_place;
  count -= in_place;
  out += in_place;
  if (count == 0) {
    return;
  }
  if constexpr (std::same_as<T, bfloat16>) {
    // Each path multiplies either bfloat16 or float32: a program of bfloat16 caches compiles one of them.
    if (uses(CodePath::avx2)) {
      detail::logits_of_copied<T>(keys, first, count, queries, buffer, out,
                                  [&](const auto& copied, float* to) {
                                    detail::dot(copied, queries, scale, buffer, to, out_stride);
                                  });
    } else {
      detail::logits_of_copied<float>(
          keys, first, count, queries, buffer, out,
          [&](const auto& copied, float* to) { portable::dot(copied, queries, scale, to, out_stride); });
    }
  } else {
    detail::logits_of_copied<float>(
        keys, first, count, queries, buffer, out,
        [&](const auto& copied, float* to) { detail::dot(copied, queries, scale, buffer, to, out_stride); });
  }
}

}  // namespace compresskv::kernel

#include "compresskv/core/strict_float_end.hpp"
