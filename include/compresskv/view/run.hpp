#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "compresskv/core/element.hpp"

namespace compresskv {

/// A stretch of rows at a constant stride: what every view lowers itself to, and all that a kernel sees.
/// Distances are in units of `T`: elements, or blocks of elements where `T` is a quantised block.
///
///     unit u of row r  =  base[r * row_stride + (u / chunk) * chunk_stride + u % chunk]
///
/// | layout | chunk | chunk_stride |
/// | --- | --- | --- |
/// | units side by side | units of a row, or more | any |
/// | units `s` apart (transposed, strided) | 1 | s |
/// | split `[dim / x][token][x]` | x | tokens * x |
template <class T>
struct Run {
  T* base = nullptr;
  std::size_t rows = 0;
  std::ptrdiff_t row_stride = 0;
  std::size_t chunk = 0;
  std::ptrdiff_t chunk_stride = 0;

  T* row(std::size_t index) const { return base + static_cast<std::ptrdiff_t>(index) * row_stride; }

  operator Run<const T>() const requires(!std::is_const_v<T>) {
    return {base, rows, row_stride, chunk, chunk_stride};
  }
};

/// int8 rows side by side, with one scale and one zero point a row.
///
///     element e of row r  =  scales[r * parameter_stride] * (base[r * row_stride + e] - zeros[r *
///     parameter_stride])
template <class T>
requires std::same_as<std::remove_const_t<T>, AffineInt8>
struct Run<T> {
  template <class U>
  using Pointer = std::conditional_t<std::is_const_v<T>, const U*, U*>;

  Pointer<std::int8_t> base = nullptr;
  Pointer<float> scales = nullptr;
  Pointer<float> zeros = nullptr;
  std::size_t rows = 0;
  std::ptrdiff_t row_stride = 0;
  std::ptrdiff_t parameter_stride = 1;

  operator Run<const T>() const requires(!std::is_const_v<T>) {
    return {base, scales, zeros, rows, row_stride, parameter_stride};
  }
};

}  // namespace compresskv
