#pragma once

#include <cmath>
#include <cstddef>

#include "compresskv/core/element.hpp"
#include "compresskv/core/float_mode.hpp"
#include "compresskv/core/rotary.hpp"
#include "compresskv/core/strict_float_begin.hpp"
#include "compresskv/kernel/decode_row.hpp"
#include "compresskv/view/run.hpp"

namespace compresskv::kernel {

using compresskv::Rotary;
using compresskv::RotaryPairing;

/// Turns row `index` of a run by `distance` positions (negative: back): a key at position p becomes the key
/// at p + distance. Angles are float64, the row is rounded to its element type once. `buffer` has `head_dim`
/// floats.
template <Element T>
void rotate_row(const Run<T>& run, std::size_t index, std::size_t head_dim, const Rotary& rotary,
                double distance, float* buffer) {
  const compresskv::detail::PlainFloats plain;
  decode_row(Run<const T>(run), index, head_dim, buffer);
  for (std::size_t j = 0; j < rotary.pairs(head_dim); ++j) {
    const double angle = distance * rotary.position_scale * rotary.frequency(j, head_dim);
    const double cosine = std::cos(angle);
    const double sine = std::sin(angle);
    float& x = buffer[rotary.first(j)];
    float& y = buffer[rotary.second(j, head_dim)];
    const auto old_x = static_cast<double>(x);
    const auto old_y = static_cast<double>(y);
    x = static_cast<float>(old_x * cosine - old_y * sine);
    y = static_cast<float>(old_x * sine + old_y * cosine);
  }
  T* row = run.row(index);
  for (std::size_t e = 0; e < rotary.rotated(head_dim); ++e) {
    row[static_cast<std::ptrdiff_t>(e / run.chunk) * run.chunk_stride +
        static_cast<std::ptrdiff_t>(e % run.chunk)] = static_cast<T>(buffer[e]);
  }
}

}  // namespace compresskv::kernel

#include "compresskv/core/strict_float_end.hpp"
