#pragma once

#include <concepts>
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

/// A run whose elements are known when the program runs: any of the two above, as `kind` says.
template <ElementOfAnyKind T>
struct Run<T> {
  template <class U>
  using Pointer = std::conditional_t<std::is_const_v<T>, const U*, U*>;
  template <class E>
  using Typed = Run<std::conditional_t<std::is_const_v<T>, const E, E>>;

  ElementKind kind = ElementKind::float32;
  Pointer<void> base = nullptr;
  Pointer<float> scales = nullptr;  ///< of int8, as are zeros and their stride
  Pointer<float> zeros = nullptr;
  std::size_t rows = 0;
  std::ptrdiff_t row_stride = 0;
  std::size_t chunk = 0;  ///< as are chunks of all others
  std::ptrdiff_t chunk_stride = 0;
  std::ptrdiff_t parameter_stride = 1;

  static Run of(const Run<AffineInt8>& run) requires(!std::is_const_v<T>) {
    return {.kind = ElementKind::int8,
            .base = run.base,
            .scales = run.scales,
            .zeros = run.zeros,
            .rows = run.rows,
            .row_stride = run.row_stride,
            .parameter_stride = run.parameter_stride};
  }
  template <class E>
  requires(Element<E> || ElementBlock<E>) static Run of(const Run<E>& run) {
    return {.kind = kind_of_element<E>(),
            .base = run.base,
            .rows = run.rows,
            .row_stride = run.row_stride,
            .chunk = run.chunk,
            .chunk_stride = run.chunk_stride};
  }

  /// The same run by its type; `E` must be that of `kind`.
  template <Stored E>
  Typed<E> as() const {
    if constexpr (std::same_as<E, AffineInt8>) {
      return {static_cast<Pointer<std::int8_t>>(base), scales, zeros, rows, row_stride, parameter_stride};
    } else {
      return {static_cast<Pointer<E>>(base), rows, row_stride, chunk, chunk_stride};
    }
  }

  operator Run<const T>() const requires(!std::is_const_v<T>) {
    return {kind, base, scales, zeros, rows, row_stride, chunk, chunk_stride, parameter_stride};
  }
};

namespace detail {

/// A run as the kernels read it: see `KernelElement`.
template <class T>
auto kernel_run(const Run<T>& run) {
  using E = std::conditional_t<std::is_const_v<T>, const KernelElement<T>, KernelElement<T>>;
  if constexpr (std::same_as<E, T>) {
    return run;
  } else {
    return Run<E>{look_at_as<KernelElement<T>>(run.base), run.rows, run.row_stride, run.chunk,
                  run.chunk_stride};
  }
}

}  // namespace detail

/// Rows [first, first + rows) of a run.
template <class T>
Run<T> part_of(Run<T> run, std::size_t first, std::size_t rows) {
  const auto step = static_cast<std::ptrdiff_t>(first) * run.row_stride;
  run.rows = rows;
  if constexpr (ElementOfAnyKind<T>) {
    using Byte = std::conditional_t<std::is_const_v<T>, const std::byte, std::byte>;
    const std::size_t bytes = with_kind(run.kind, []<class E>(E*) -> std::size_t {
      if constexpr (std::same_as<E, AffineInt8>) {
        return 1;
      } else {
        return sizeof(E);
      }
    });
    run.base = static_cast<Byte*>(run.base) + step * static_cast<std::ptrdiff_t>(bytes);
  } else {
    run.base += step;
  }
  if constexpr (requires { run.scales; }) {
    if (run.scales != nullptr) {
      run.scales += static_cast<std::ptrdiff_t>(first) * run.parameter_stride;
      run.zeros += static_cast<std::ptrdiff_t>(first) * run.parameter_stride;
    }
  }
  return run;
}

/// Calls `f` with the run as the kernels read it: for all rows of a run, its type is asked for once.
template <class T, class F>
decltype(auto) with_element(const Run<T>& run, F&& f) {
  if constexpr (ElementOfAnyKind<T>) {
    return with_kind(run.kind, [&]<class E>(E*) -> decltype(auto) { return f(run.template as<E>()); });
  } else {
    return f(detail::kernel_run(run));
  }
}

/// The same where the elements are no quantised ones.
template <class T, class F>
decltype(auto) with_plain_element(const Run<T>& run, F&& f) {
  if constexpr (ElementOfAnyKind<T>) {
    return with_plain_kind(run.kind, [&]<class E>(E*) -> decltype(auto) { return f(run.template as<E>()); });
  } else {
    return f(detail::kernel_run(run));
  }
}

}  // namespace compresskv
