#pragma once

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <limits>
#include <span>

#include "compresskv/core/float_bits.hpp"
#include "compresskv/core/narrowed.hpp"
#include "compresskv/core/rotary.hpp"
#include "compresskv/core/strict_float_begin.hpp"

namespace compresskv::kernel {

/// What a pair of elements is multiplied by, taken as a complex number: a rotation, or a mean of several.
///
///     (x, y)  ->  (cosine x - sine y, sine x + cosine y)
struct Turn {
  double cosine = 1.0;
  double sine = 0.0;

  /// The way back, of a rotation; of a mean its transpose.
  Turn transposed() const { return {cosine, -sine}; }
};

/// Rotation by an angle in radians.
inline Turn turn_by(double angle) { return {std::cos(angle), std::sin(angle)}; }

/// Mean of the rotations by `step * p` over positions p = first .. first + count - 1:
///
///     sin(count step / 2) / (count sin(step / 2))  times the rotation to the middle of them
///
inline Turn mean_turn(double step, std::size_t first, std::size_t count) {
  const auto n = static_cast<double>(count);
  const double half = 0.5 * step;
  const double below = n * std::sin(half);
  // Where a step is a whole turn, or none, every rotation is the first one.
  if (std::abs(below) < 1e-14 * n) {
    return turn_by(step * static_cast<double>(first));
  }
  const Turn middle = turn_by(step * (static_cast<double>(first) + 0.5 * (n - 1.0)));
  const double length = std::sin(n * half) / below;
  return {length * middle.cosine, length * middle.sine};
}

/// Turns the pairs of a row of `row.size()` elements, pair `j` by `turns(j)`.
template <class T, class Turns>
void turn_pairs(const Rotary& rotary, std::span<T> row, Turns&& turns) {
  for (std::size_t j = 0; j < rotary.pairs(row.size()); ++j) {
    const Turn turn = turns(j);
    T& x = row[rotary.first(j)];
    T& y = row[rotary.second(j, row.size())];
    const auto old_x = static_cast<double>(x);
    const auto old_y = static_cast<double>(y);
    x = compresskv::detail::narrowed<T>(old_x * turn.cosine - old_y * turn.sine);
    y = compresskv::detail::narrowed<T>(old_x * turn.sine + old_y * turn.cosine);
  }
}

}  // namespace compresskv::kernel

#include "compresskv/core/strict_float_end.hpp"
