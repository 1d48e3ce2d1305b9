#pragma once

#include <algorithm>
#include <cassert>
#include <cstddef>
#include <numeric>
#include <span>

#include "compresskv/core/float_bits.hpp"
#include "compresskv/core/strict_float_begin.hpp"

namespace compresskv::kernel {

/// Replaces scores by their ranks divided by how many there are: 0 for the lowest, below 1 for the highest.
/// Of equal scores the lower index has the higher rank. `order` has room for as many numbers. Cost: a sort.
inline void rank(std::span<float> scores, std::span<std::size_t> order) {
  using compresskv::detail::ordered;
  assert(order.size() == scores.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
    return ordered(scores[a]) < ordered(scores[b]) || (ordered(scores[a]) == ordered(scores[b]) && a > b);
  });
  for (std::size_t i = 0; i < order.size(); ++i) {
    scores[order[i]] = static_cast<float>(i) / static_cast<float>(order.size());
  }
}

}  // namespace compresskv::kernel

#include "compresskv/core/strict_float_end.hpp"
