#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <span>
#include <vector>

namespace compresskv::detail {

/// Indices of `values`, none of them NaN, by falling value; of equal values the lower index comes first.
inline std::vector<std::uint32_t> by_falling(std::span<const double> values) {
  std::vector<std::uint32_t> order(values.size());
  std::iota(order.begin(), order.end(), 0U);
  std::sort(order.begin(), order.end(), [&](std::uint32_t a, std::uint32_t b) {
    return values[a] > values[b] || (values[a] == values[b] && a < b);
  });
  return order;
}

}  // namespace compresskv::detail
