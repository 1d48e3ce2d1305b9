#pragma once

#include <cstddef>
#include <type_traits>

namespace compresskv {

/// A stretch of rows at a constant stride: what every view lowers itself to, and all that a kernel sees.
/// Distances are in elements of `T`.
///
///     element e of row r  =  base[r * row_stride + (e / chunk) * chunk_stride + e % chunk]
///
/// | layout | chunk | chunk_stride |
/// | --- | --- | --- |
/// | elements side by side | head_dim | any |
/// | elements `s` apart (transposed, strided) | 1 | s |
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

}  // namespace compresskv
