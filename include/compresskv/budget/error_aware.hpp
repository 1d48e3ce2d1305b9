#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "compresskv/budget/allocator.hpp"
#include "compresskv/core/error.hpp"
#include "compresskv/core/layer_errors.hpp"
#include "compresskv/core/order.hpp"
#include "compresskv/core/round.hpp"
#include "compresskv/core/strict_float_begin.hpp"

namespace compresskv::budget {

/// How the rounded budgets are moved to the exact total, one row at a time (docs/method.md 5.3).
enum class Walk {
  rounds,   ///< the released code: layers by falling error, +1 each, round after round; a surplus by rising
            ///< error, -1
  extreme,  ///< the paper's Algorithm 1: always the layer of largest error below its bound; a surplus the
            ///< smallest
};

/// CompressKV's budgets: layers where evicting costs more keep more.
///
///     capacity[l] = clip( m + round(e[l] * (p * L - L * m)), m, M ),  then walked to the total p * L
///
/// Paper: arXiv 2606.24467, Eq. 8-12 and Algorithm 1. Rounding is half to even. Cost: L rows of arithmetic
/// plus one step a row moved.
class ErrorAware {
 public:
  static constexpr Reach reach = Reach::own_layer;

  struct Options {
    /// m, fewest rows of a layer; by default min(32, p). Raised to the window, which every layer keeps.
    std::optional<std::size_t> min_rows = std::nullopt;
    /// M, most rows of a layer; by default 3 p. Never more than the prompt: what a layer cannot use goes to
    /// the others.
    std::optional<std::size_t> max_rows = std::nullopt;
    Walk walk = Walk::rounds;
  };

  ErrorAware(const LayerErrors& errors, Budget budget) : ErrorAware(errors, budget, Options{}) {}
  ErrorAware(const LayerErrors& errors, Budget budget, const Options& options)
      : budget_(budget), options_(options), errors_(errors.average().begin(), errors.average().end()) {
    falling_ = compresskv::detail::by_falling(errors_);
    std::vector<double> negated(errors_.size());
    std::transform(errors_.begin(), errors_.end(), negated.begin(), [](double error) { return -error; });
    rising_ = compresskv::detail::by_falling(negated);
  }

  const Budget& budget() const { return budget_; }

  /// Throws ArgumentError when the errors are of a model with another number of layers.
  void validate(const ModelShape& shape) const {
    compresskv::detail::require_errors_of_model(errors_.size(), shape.layers);
  }

  /// Throws ArgumentError when the user's own bounds exclude the mean: `min_rows > p` or `max_rows < p`.
  void allocate(const Allowance& allowance, std::span<std::size_t> capacities) const {
    const std::size_t mean = allowance.per_layer;
    const std::size_t layers = capacities.size();
    const std::size_t total = total_rows(allowance, layers);
    detail::require(options_.min_rows.value_or(0) <= mean, "min_rows is ", options_.min_rows.value_or(0),
                    ", the budget is ", mean,
                    " rows a layer: the minimum of all layers exceeds the total; lower it");
    detail::require(options_.max_rows.value_or(mean) >= mean, "max_rows is ",
                    options_.max_rows.value_or(mean), ", the budget is ", mean,
                    " rows a layer: the layers cannot hold the total; raise it");
    const std::size_t tokens = allowance.tokens;
    const std::size_t min = (std::max)(options_.min_rows.value_or((std::min)(std::size_t{32}, mean)),
                                       (std::min)(allowance.window, tokens));
    const std::size_t max =
        (std::min)(options_.max_rows.value_or(mean < tokens / 3 ? 3 * mean : tokens), tokens);
    const auto spare = static_cast<double>(total - min * layers);
    std::size_t sum = 0;
    for (std::size_t layer = 0; layer < layers; ++layer) {
      const double share = detail::round_half_even(errors_[layer] * spare);
      const bool most = share >= static_cast<double>(max - min);
      capacities[layer] = most ? max : min + static_cast<std::size_t>(share);
      sum += capacities[layer];
    }
    // Ties in the error go to the lower layer in both directions, as the orders are stable.
    const bool grow = sum < total;
    const std::vector<std::uint32_t>& order = grow ? falling_ : rising_;
    while (sum != total) {
      for (const std::size_t layer : order) {
        if (sum == total) {
          break;
        }
        const std::size_t movable = grow ? max - capacities[layer] : capacities[layer] - min;
        const std::size_t missing = grow ? total - sum : sum - total;
        const std::size_t step = options_.walk == Walk::rounds ? (std::min)(std::size_t{1}, movable)
                                                               : (std::min)(missing, movable);
        capacities[layer] = grow ? capacities[layer] + step : capacities[layer] - step;
        sum = grow ? sum + step : sum - step;
      }
    }
  }

 private:
  Budget budget_;
  Options options_;
  std::vector<double> errors_;
  std::vector<std::uint32_t> falling_;  // layers by falling error
  std::vector<std::uint32_t> rising_;   // layers by rising error
};

}  // namespace compresskv::budget

#include "compresskv/core/strict_float_end.hpp"
