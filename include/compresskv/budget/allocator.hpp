#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <numeric>
#include <span>

#include "compresskv/core/budget.hpp"
#include "compresskv/core/error.hpp"
#include "compresskv/core/policy.hpp"
#include "compresskv/core/shape.hpp"

namespace compresskv::budget {

/// What an allocator shares out: `per_layer * capacities.size()` rows, each capacity within
/// `[min(window, tokens), tokens]`.
struct Allowance {
  std::size_t per_layer = 0;  ///< p, mean rows a layer, below `tokens`
  std::size_t window = 0;     ///< w
  std::size_t tokens = 0;     ///< S
};

/// `per_layer * layers`. Throws ArgumentError where that is beyond 64 bits, or less than the windows.
inline std::size_t total_rows(const Allowance& allowance, std::size_t layers) {
  std::size_t total = 0;
  detail::require(!__builtin_mul_overflow(allowance.per_layer, layers, &total), "budget is ",
                  allowance.per_layer, " rows a layer, of ", layers,
                  " layers: their sum is beyond 64 bits; a layer has at most the prompt's ",
                  allowance.tokens);
  const std::size_t window = (std::min)(allowance.window, allowance.tokens);
  detail::require(allowance.per_layer >= window, "budget is ", allowance.per_layer,
                  " rows a layer, the window alone is ", window, ": give at least the window");
  return total;
}

/// A way to turn a total into one capacity a layer, or one a KV head.
///
/// | member | meaning |
/// | --- | --- |
/// | `reach` | what it must have seen before a layer can shrink |
/// | `budget()` | the user's total |
/// | `validate(shape)` | throws when it does not fit the model |
/// | `allocate(allowance, capacities)` | whole rows that sum to the total exactly; throws when bounds forbid
/// it |
/// | `granularity` | may be left out: what has a capacity, a layer. With `Granularity::kv_head`
/// `capacities` are `[layer][kv_head]` |
template <class A>
concept Allocator = std::copyable<A> && requires(const A& allocator, const ModelShape& shape,
                                                 const Allowance& allowance, std::span<std::size_t> rows) {
  { A::reach } -> std::same_as<const Reach&>;
  { allocator.budget() } -> std::convertible_to<Budget>;
  allocator.validate(shape);
  allocator.allocate(allowance, rows);
};

/// What an allocator gives a capacity to.
template <class A>
inline constexpr Granularity granularity_of = [] {
  if constexpr (requires { A::granularity; }) {
    return A::granularity;
  } else {
    return Granularity::layer;
  }
}();

/// Adds or takes one row a layer, lower layers first, round after round, until the capacities sum to `total`
/// or none can move. `least(layer)` and `most(layer)` are bounds that the capacities keep already.
template <class Least, class Most>
void walk_to_total(std::span<std::size_t> capacities, std::size_t total, Least&& least, Most&& most) {
  std::size_t sum = std::accumulate(capacities.begin(), capacities.end(), std::size_t{0});
  for (bool moved = true; sum != total && moved;) {
    moved = false;
    for (std::size_t l = 0; l < capacities.size() && sum != total; ++l) {
      if (sum < total && capacities[l] < most(l)) {
        ++capacities[l];
        ++sum;
        moved = true;
      } else if (sum > total && capacities[l] > least(l)) {
        --capacities[l];
        --sum;
        moved = true;
      }
    }
  }
}

}  // namespace compresskv::budget
