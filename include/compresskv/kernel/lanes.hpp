#pragma once

#include <array>
#include <cstddef>

#include "compresskv/core/strict_float_begin.hpp"

namespace compresskv::kernel {

/// Sums run over 16 interleaved lanes: element e goes to lane e mod 16, lanes are folded by halves at the end
/// (i + 8, then i + 4, i + 2, i + 1). Sixteen floats fill a 512-bit register; 256-bit ones hold
/// the same lanes in several registers, so that every path adds the same numbers in the same order.
inline constexpr std::size_t lane_count = 16;

constexpr std::size_t round_up_to_lanes(std::size_t count) {
  return (count + lane_count - 1) / lane_count * lane_count;
}

using Lanes = std::array<float, lane_count>;

template <class T>
T fold(std::array<T, lane_count> lanes) {
  for (std::size_t half = lane_count / 2; half > 0; half /= 2) {
    for (std::size_t i = 0; i < half; ++i) {
      lanes[i] += lanes[i + half];
    }
  }
  return lanes[0];
}

}  // namespace compresskv::kernel

#include "compresskv/core/strict_float_end.hpp"
