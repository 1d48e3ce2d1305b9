#pragma once

#include <array>
#include <bit>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <type_traits>

#include "compresskv/core/half.hpp"

// Known by name alone: whoever has such elements includes Eigen.
namespace Eigen {
struct half;
struct bfloat16;
}  // namespace Eigen

namespace compresskv {

namespace detail {

/// Scalar types of the compiler's own: `_Float16`, `std::float16_t`, `std::bfloat16_t`, where it has them.
/// The standard library may not count `_Float16` among the arithmetic types.
template <class T>
concept ShortFloat = !std::is_class_v<T> && !std::is_union_v<T> && !std::is_integral_v<T> &&
                     !std::is_enum_v<T> && sizeof(T) == 2 && requires(T value) {
  static_cast<float>(value);
};
/// A half holds 257, a bfloat16 does not.
template <class T>
inline constexpr bool is_half = false;
template <ShortFloat T>
inline constexpr bool is_half<T> = static_cast<float>(static_cast<T>(257.0F)) == 257.0F;

template <class T>
concept AnyHalf = std::same_as<T, half> || std::same_as<T, Eigen::half> ||(ShortFloat<T>&& is_half<T>);
template <class T>
concept AnyBfloat16 = std::same_as<T, bfloat16> || std::same_as<T, Eigen::bfloat16> ||
    (ShortFloat<T> && !is_half<T>);

/// `std::uint16_t` and what holds one alone, as `struct ggml_bf16_t { uint16_t bits; }`: nothing in the type
/// says which of the two it is.
template <class T>
concept Bits16 = std::same_as<T, std::uint16_t> ||
    (std::is_class_v<T> && !AnyHalf<T> && !AnyBfloat16<T> && sizeof(T) == 2 && alignof(T) == 2 &&
     std::is_trivially_copyable_v<T> && std::is_standard_layout_v<T>);

template <class To, class From>
auto* look_at_as(From* from) {
  using Element = std::conditional_t<std::is_const_v<From>, const To, To>;
  static_assert(sizeof(To) == sizeof(From) && alignof(To) <= alignof(From));
  return reinterpret_cast<Element*>(from);
}

}  // namespace detail

/// Element types that stand for themselves: float, `half`, `bfloat16`, Eigen's types of these two names, and
/// the compiler's own (`_Float16`, `std::float16_t`, `std::bfloat16_t`). Arithmetic is always float32.
template <class T>
concept Element = std::same_as < std::remove_const_t<T>,
float > || detail::AnyHalf<std::remove_const_t<T>> || detail::AnyBfloat16<std::remove_const_t<T>>;

/// Types whose memory holds half, and bfloat16: those above, and 16 raw bits (`std::uint16_t`,
/// `ggml_fp16_t`, `ggml_bf16_t`), of which only their owner knows what they are.
template <class T>
concept HalfStorage = detail::AnyHalf<std::remove_const_t<T>> || detail::Bits16<std::remove_const_t<T>>;
template <class T>
concept Bfloat16Storage =
    detail::AnyBfloat16<std::remove_const_t<T>> || detail::Bits16<std::remove_const_t<T>>;

/// The same memory as the library's element type, for views and observations; nothing is copied. Of const
/// elements the result is const.
template <HalfStorage T>
auto* as_half(T* elements) {
  return detail::look_at_as<half>(elements);
}
template <Bfloat16Storage T>
auto* as_bfloat16(T* elements) {
  return detail::look_at_as<bfloat16>(elements);
}
/// The same of memory of known size: `as_half(std::span(vector))`.
template <HalfStorage T, std::size_t N>
auto as_half(std::span<T, N> elements) {
  return std::span(as_half(elements.data()), elements.size());
}
template <Bfloat16Storage T, std::size_t N>
auto as_bfloat16(std::span<T, N> elements) {
  return std::span(as_bfloat16(elements.data()), elements.size());
}

namespace detail {

template <class T>
struct KernelElementOf {
  using type = T;
};
template <AnyHalf T>
struct KernelElementOf<T> {
  using type = half;
};
template <AnyBfloat16 T>
struct KernelElementOf<T> {
  using type = bfloat16;
};
/// The type by which kernels read elements of type `T`, const or not: they know one type of each kind.
template <class T>
using KernelElement = typename KernelElementOf<std::remove_const_t<T>>::type;

}  // namespace detail

/// Exact: every half and every bfloat16 is a float32.
template <Element T>
[[gnu::always_inline]] inline float to_float(T value) {
  return static_cast<float>(std::bit_cast<detail::KernelElement<T>>(value));
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
  const float scale = to_float(std::bit_cast<half>(block.scale));
  for (std::size_t i = 0; i < 32; ++i) {
    out[i] = scale * static_cast<float>(block.quants[i]);
  }
}
inline void decode_block(const BlockQ4_0& block, float* out) {
  const float scale = to_float(std::bit_cast<half>(block.scale));
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

/// The types that a cache may hold, as a value: for what is known only when the program runs.
enum class ElementKind : std::uint8_t { float32, float16, bfloat16, q8_0, q4_0, int8 };

/// As a message names it.
constexpr std::string_view name(ElementKind kind) {
  constexpr std::array<std::string_view, 6> names = {"float32", "float16", "bfloat16",
                                                     "Q8_0",    "Q4_0",    "int8"};
  return names[static_cast<std::size_t>(kind)];
}

template <Stored T>
constexpr ElementKind kind_of_element() {
  using E = std::remove_const_t<T>;
  if constexpr (std::same_as<E, float>) {
    return ElementKind::float32;
  } else if constexpr (detail::AnyHalf<E>) {
    return ElementKind::float16;
  } else if constexpr (detail::AnyBfloat16<E>) {
    return ElementKind::bfloat16;
  } else if constexpr (std::same_as<E, BlockQ8_0>) {
    return ElementKind::q8_0;
  } else if constexpr (std::same_as<E, BlockQ4_0>) {
    return ElementKind::q4_0;
  } else {
    return ElementKind::int8;
  }
}

/// Stands for elements whose kind a view or an observation tells when the program runs: `Run<AnyElement>`.
struct AnyElement {};

template <class T>
concept ElementOfAnyKind = std::same_as<std::remove_const_t<T>, AnyElement>;

/// Calls `f` with a null pointer of the kind's type: `with_plain_kind(kind, [&]<class T>(T*) { ... })`.
/// `kind` must be that of an `Element`.
template <class F>
decltype(auto) with_plain_kind(ElementKind kind, F&& f) {
  switch (kind) {
    case ElementKind::float16:
      return f(static_cast<half*>(nullptr));
    case ElementKind::bfloat16:
      return f(static_cast<bfloat16*>(nullptr));
    default:
      return f(static_cast<float*>(nullptr));
  }
}

/// The same for every kind.
template <class F>
decltype(auto) with_kind(ElementKind kind, F&& f) {
  switch (kind) {
    case ElementKind::q8_0:
      return f(static_cast<BlockQ8_0*>(nullptr));
    case ElementKind::q4_0:
      return f(static_cast<BlockQ4_0*>(nullptr));
    case ElementKind::int8:
      return f(static_cast<AffineInt8*>(nullptr));
    default:
      return with_plain_kind(kind, f);
  }
}

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
