#pragma once

#include <cmath>

#include "compresskv/core/strict_float_begin.hpp"

namespace compresskv::detail {

/// Halves go to the even neighbour. std::nearbyint would follow the engine's rounding mode.
inline double round_half_even(double value) {
  const double below = std::floor(value);
  const double rest = value - below;
  if (rest != 0.5) {
    return rest < 0.5 ? below : below + 1.0;
  }
  return std::fmod(below, 2.0) == 0.0 ? below : below + 1.0;
}

}  // namespace compresskv::detail

#include "compresskv/core/strict_float_end.hpp"
