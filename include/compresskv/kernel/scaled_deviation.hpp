#pragma once

#include <array>
#include <cmath>
#include <cstddef>
#include <limits>

#include "compresskv/core/float_bits.hpp"
#include "compresskv/core/strict_float_begin.hpp"
#include "compresskv/kernel/code_path.hpp"
#include "compresskv/kernel/x86/scaled_deviation_avx2.hpp"

namespace compresskv::kernel {

/// Least and largest of some rows, element by element.
struct Bounds {
  float* least;
  float* largest;
};

namespace portable {

/// A float64 number within float32.
inline float as_float(double value) {
  constexpr float most = (std::numeric_limits<float>::max)();
  return value > static_cast<double>(most)    ? most
         : value < -static_cast<double>(most) ? -most
                                              : static_cast<float>(value);
}

/// `value` from 0 to 1 between its bounds, and beyond; 0 where there is nothing between them. In float64: the
/// spread may be denormal, or beyond float32.
inline float scaled(float value, float least, float largest) {
  const double from = static_cast<double>(least);
  const double spread = static_cast<double>(largest) - from;
  return as_float((static_cast<double>(value) - from) /
                  (spread > 0.0 ? spread : std::numeric_limits<double>::infinity()));
}

/// Sums of eight lanes: element `e` is of lane `e % 8`.
using Sums = std::array<double, 8>;

inline double total(Sums sums) {
  for (std::size_t half = sums.size() / 2; half > 0; half /= 2) {
    for (std::size_t i = 0; i < half; ++i) {
      sums[i] += sums[i + half];
    }
  }
  return sums[0];
}

}  // namespace portable

/// Widens the bounds so that a row is within them. Returns whether the row has neither NaN nor infinite
/// elements.
inline bool widen(const float* row, std::size_t head_dim, const Bounds& bounds) {
  bool finite = true;
  std::size_t e = 0;
#if defined(__x86_64__)
  if (uses(CodePath::avx2)) {
    e = avx2::widen(row, head_dim, bounds.least, bounds.largest, finite);
  }
#endif
  for (; e < head_dim; ++e) {
    finite = compresskv::detail::is_finite(row[e]) && finite;
    bounds.least[e] = row[e] < bounds.least[e] ? row[e] : bounds.least[e];
    bounds.largest[e] = row[e] > bounds.largest[e] ? row[e] : bounds.largest[e];
  }
  return finite;
}

/// Standard deviation (of a sample: divided by `head_dim` - 1, 0 for one element) over the elements of a row,
/// each scaled by its bounds. `scaled` has room for a row. Cost: a division in float64 an element.
inline float scaled_deviation(const float* row, std::size_t head_dim, const Bounds& bounds, float* scaled) {
  if (head_dim < 2) {
    return 0.0F;
  }
  portable::Sums sums{};
  std::size_t e = 0;
#if defined(__x86_64__)
  const bool vectors = uses(CodePath::avx2);
  if (vectors) {
    e = avx2::scale(row, head_dim, bounds.least, bounds.largest, scaled, sums.data());
  }
#endif
  for (; e < head_dim; ++e) {
    scaled[e] = portable::scaled(row[e], bounds.least[e], bounds.largest[e]);
    sums[e % sums.size()] += static_cast<double>(scaled[e]);
  }
  const double mean = portable::total(sums) / static_cast<double>(head_dim);
  portable::Sums squares{};
  e = 0;
#if defined(__x86_64__)
  if (vectors) {
    e = avx2::add_squares(scaled, head_dim, mean, squares.data());
  }
#endif
  for (; e < head_dim; ++e) {
    const double distance = static_cast<double>(scaled[e]) - mean;
    squares[e % squares.size()] += distance * distance;
  }
  return portable::as_float(std::sqrt(portable::total(squares) / static_cast<double>(head_dim - 1)));
}

}  // namespace compresskv::kernel

#include "compresskv/core/strict_float_end.hpp"
