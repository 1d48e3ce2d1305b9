#pragma once

#include <algorithm>
#include <cstddef>
#include <span>

#include "compresskv/budget/allocator.hpp"
#include "compresskv/core/error.hpp"
#include "compresskv/core/float_bits.hpp"
#include "compresskv/core/round.hpp"
#include "compresskv/core/strict_float_begin.hpp"

namespace compresskv::budget {

/// PyramidKV: lower layers keep more, in a straight line.
///
///     base = p - w,  min = base / beta,  max = 2 base - min      (max >= S - w: max = S - w, min = 2 base -
///     max) capacity[l] = max - l * (max - min) / (L - 1) + w,  clipped to [w, S],  then walked to the total
///     p * L
///
/// Rounding is half to even; the walk adds or takes one row a layer, lower layers first, round after round.
/// One layer: p. Paper: Cai et al., 2024 (arXiv 2406.02069); docs/method.md 5.4. Goes with `score::SnapKv`.
/// Cost: L rows of arithmetic plus one step a row moved.
class Pyramid {
 public:
  static constexpr Reach reach = Reach::own_layer;

  struct Options {
    double beta = 20.0;  ///< how steep: the top layer keeps base / beta
    /// The released code's integer divisions. They miss the total (22 % more at 30 rows): the sum of
    /// `Compressor::capacities()` says by how much.
    bool released_integers = false;
  };

  explicit Pyramid(Budget budget) : Pyramid(budget, Options{}) {}
  /// Throws ArgumentError for a beta below 1: the pyramid would stand on its head.
  Pyramid(Budget budget, const Options& options) : budget_(budget), options_(options) {
    detail::require(detail::is_finite(options.beta) && options.beta >= 1.0, "beta is ", options.beta,
                    ", must be at least 1");
  }

  const Budget& budget() const { return budget_; }
  void validate(const ModelShape&) const {}

  void allocate(const Allowance& allowance, std::span<std::size_t> capacities) const {
    const std::size_t layers = capacities.size();
    const std::size_t total = total_rows(allowance, layers);
    const std::size_t window = (std::min)(allowance.window, allowance.tokens);
    if (layers == 1) {
      capacities[0] = allowance.per_layer;
      return;
    }
    if (options_.released_integers) {
      released(allowance, window, capacities);
      return;
    }
    const auto base = static_cast<double>(allowance.per_layer - window);
    const auto evictable = static_cast<double>(allowance.tokens - window);
    double min = base / options_.beta;
    double max = 2.0 * base - min;
    if (max >= evictable) {
      max = evictable;
      min = 2.0 * base - max;
    }
    for (std::size_t l = 0; l < layers; ++l) {
      const double rows = max - static_cast<double>(l) * ((max - min) / static_cast<double>(layers - 1));
      const double rounded = detail::round_half_even(rows < 0.0 ? 0.0 : rows);
      capacities[l] = rounded < evictable ? static_cast<std::size_t>(rounded) + window : allowance.tokens;
    }
    walk_to_total(
        capacities, total, [&](std::size_t) { return window; },
        [&](std::size_t) { return allowance.tokens; });
  }

 private:
  void released(const Allowance& allowance, std::size_t window, std::span<std::size_t> capacities) const {
    const std::size_t base = allowance.per_layer - window;
    const std::size_t evictable = allowance.tokens - window;
    std::size_t min = options_.beta < 0x1p64 ? base / static_cast<std::size_t>(options_.beta) : 0;
    std::size_t max = 2 * base - min;
    if (max >= evictable) {
      max = evictable;
      min = 2 * base - max;
    }
    const std::size_t step = (max - min) / (capacities.size() - 1);
    for (std::size_t l = 0; l < capacities.size(); ++l) {
      capacities[l] = max - l * step + window;
    }
  }

  Budget budget_;
  Options options_;
};

}  // namespace compresskv::budget

#include "compresskv/core/strict_float_end.hpp"
