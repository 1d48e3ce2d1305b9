#pragma once

#include <Eigen/Core>
#include <array>
#include <bit>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace compresskv {

/// Element types that stand for themselves. Arithmetic is always float32.
template <class T>
concept Element = std::same_as < std::remove_const_t<T>,
float > || std::same_as<std::remove_const_t<T>, Eigen::half> ||
    std::same_as<std::remove_const_t<T>, Eigen::bfloat16>;

/// Exact: every half and every bfloat16 is a float32.
[[gnu::always_inline]] inline float to_float(float value) { return value; }
[[gnu::always_inline]] inline float to_float(Eigen::half value) { return static_cast<float>(value); }
[[gnu::always_inline]] inline float to_float(Eigen::bfloat16 value) {
  return __builtin_bit_cast(float, static_cast<std::uint32_t>(std::bit_cast<std::uint16_t>(value)) << 16U);
}

/// ggml's Q8_0: 32 elements `scale * quants[i]`, 34 bytes.
struct BlockQ8_0 {
  static constexpr std::size_t elements = 32;
  std::uint16_t scale;  ///< bits of a half
  std::array<std::int8_t, 32> quants;
};

/// ggml's Q4_0: 32 elements `scale * (nibble - 8)`, 18 bytes; low nibbles hold elements 0..15, high
/// ones 16..31.
struct BlockQ4_0 {
  static constexpr std::size_t elements = 32;
  std::uint16_t scale;  ///< bits of a half
  std::array<std::uint8_t, 16> quants;
};

static_assert(sizeof(BlockQ8_0) == 34 && sizeof(BlockQ4_0) == 18);

/// Exact but for the one rounding of the product.
inline void decode_block(const BlockQ8_0& block, float* out) {
  const float scale = to_float(std::bit_cast<Eigen::half>(block.scale));
  for (std::size_t i = 0; i < 32; ++i) {
    out[i] = scale * static_cast<float>(block.quants[i]);
  }
}
inline void decode_block(const BlockQ4_0& block, float* out) {
  const float scale = to_float(std::bit_cast<Eigen::half>(block.scale));
  for (std::size_t i = 0; i < 16; ++i) {
    out[i] = scale * static_cast<float>((block.quants[i] & 15) - 8);
    out[i + 16] = scale * static_cast<float>((block.quants[i] >> 4) - 8);
  }
}

/// Element types that come in blocks along a row: a run of them counts in blocks.
template <class T>
concept ElementBlock =
    std::same_as<std::remove_const_t<T>, BlockQ8_0> || std::same_as<std::remove_const_t<T>, BlockQ4_0>;

/// int8 rows with a scale and a zero point each, held apart: element = scale * (quant - zero). See
/// `Run<AffineInt8>`.
struct AffineInt8 {};

/// Whatever a cache may hold.
template <class T>
concept Stored = Element<T> || ElementBlock<T> || std::same_as<std::remove_const_t<T>, AffineInt8>;

/// Elements that one `T` stands for along a row.
template <Stored T>
constexpr std::size_t elements_per_unit() {
  if constexpr (ElementBlock<T>) {
    return std::remove_const_t<T>::elements;
  } else {
    return 1;
  }
}

/// Bytes of one row of `head_dim` elements, scale and zero point included.
template <Stored T>
constexpr std::size_t row_bytes(std::size_t head_dim) {
  if constexpr (std::same_as<std::remove_const_t<T>, AffineInt8>) {
    return head_dim + 2 * sizeof(float);
  } else {
    return head_dim / elements_per_unit<T>() * sizeof(T);
  }
}

}  // namespace compresskv
