#pragma once

#include <concepts>
#include <cstddef>

#include "compresskv/core/error.hpp"

namespace compresskv::layout {

/// Where the units of a row lie: side by side, or in chunks a stride apart (see `Run`). A unit is an element,
/// or a block of elements where the type is quantised in blocks.
///
///     unit u of row r of KV head h  =  base[h * head + r * row + (u / chunk) * chunk_stride + u % chunk]
struct Strides {
  std::size_t head = 0;
  std::size_t row = 0;
  std::size_t chunk = 0;  ///< 0: the whole row lies side by side
  std::size_t chunk_stride = 0;
};

/// What a layout makes strides from: `units` of one row, `kv_heads`, and rows that the memory (or block) has
/// room for.
struct Extents {
  std::size_t kv_heads = 0;
  std::size_t rows = 0;
  std::size_t units = 0;
};

/// `[kv_head][row][dim]`, what most engines hold.
struct HeadTokenDim {
  constexpr Strides operator()(const Extents& e) const { return {.head = e.rows * e.units, .row = e.units}; }
};

/// `[row][kv_head][dim]`, the projection's own order.
struct TokenHeadDim {
  constexpr Strides operator()(const Extents& e) const {
    return {.head = e.units, .row = e.kv_heads * e.units};
  }
};

/// `[kv_head][dim][row]`: transposed, as ggml holds values without flash attention.
struct HeadDimToken {
  constexpr Strides operator()(const Extents& e) const {
    return {.head = e.rows * e.units, .row = 1, .chunk = 1, .chunk_stride = e.rows};
  }
};

/// `[kv_head][dim / x][row][x]`: the split layout of paged key pools; `x` must divide the units of a row.
struct SplitDim {
  std::size_t x = 8;
  /// Throws ArgumentError where `x` is 0 or beyond a row.
  constexpr Strides operator()(const Extents& e) const {
    if (x == 0 || x > e.units) {
      detail::fail<ArgumentError>("SplitDim: x is ", x, ", must divide the ", e.units, " units of a row");
    }
    return {.head = e.rows * e.units, .row = x, .chunk = x, .chunk_stride = e.rows * x};
  }
};

inline constexpr HeadTokenDim head_token_dim{};
inline constexpr TokenHeadDim token_head_dim{};
inline constexpr HeadDimToken head_dim_token{};

/// A layout is any function of the extents; `Strides` stand for themselves.
template <class L>
concept Layout = requires(const L& layout, const Extents& extents) {
  { layout(extents) } -> std::convertible_to<Strides>;
}
|| std::same_as<L, Strides>;

template <Layout L>
constexpr Strides strides_of(const L& layout, const Extents& extents) {
  if constexpr (std::same_as<L, Strides>) {
    return layout;
  } else {
    return layout(extents);
  }
}

}  // namespace compresskv::layout
