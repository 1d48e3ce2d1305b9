#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>

#include "compresskv/budget/allocator.hpp"
#include "compresskv/core/error.hpp"
#include "compresskv/core/float_bits.hpp"
#include "compresskv/core/float_mode.hpp"
#include "compresskv/core/round.hpp"
#include "compresskv/core/strict_float_begin.hpp"
#include "compresskv/core/workspace.hpp"
#include "compresskv/kernel/head_groups.hpp"
#include "compresskv/kernel/layer_input.hpp"
#include "compresskv/kernel/window_moments.hpp"

namespace compresskv::budget {

/// CAKE: layers share the total by how widely and how changeably their windows look, as they arrive.
///
///     P = E^(1/tau1) * V^(1/tau2),   E = -sum over heads, rows, tokens of a ln(a + 1e-10)
///                                    V = sum over heads, tokens of the unbiased variance over the window's
///                                    rows
///     capacity[l] = P[l] / (P[0] + ... + P[n-1]) * min(p * L, n * S)     once layers 0 .. n-1 have arrived
///
/// The window's own columns are left out; sums first, then powers. Rounding is half to even, bounds are
/// `[w and what is protected, rows of the layer]`, and the walk to the total adds or takes one row a layer,
/// lower layers first. A layer that has arrived never grows again: what it lost is gone. Paper: Qin et al.,
/// ICLR 2025 (arXiv 2503.12491); docs/method.md 5.5. Goes with `score::Cake`, or any scorer that looks at
/// the window. Cost: the attention of all heads' windows, and a logarithm a weight.
class Cake {
 public:
  static constexpr Reach reach = Reach::earlier_layers;

  struct Options {
    double tau1 = 1.0;
    double tau2 = 1.0;
  };

  explicit Cake(Budget budget) : Cake(budget, Options{}) {}
  /// Throws ArgumentError for a tau that is not positive.
  Cake(Budget budget, const Options& options) : budget_(budget), options_(options) {
    detail::require(detail::is_finite(options.tau1) && options.tau1 > 0.0, "tau1 is ", options.tau1,
                    ", must be finite and above 0");
    detail::require(detail::is_finite(options.tau2) && options.tau2 > 0.0, "tau2 is ", options.tau2,
                    ", must be finite and above 0");
  }

  const Budget& budget() const { return budget_; }
  void validate(const ModelShape&) const {}

  /// What is known before any layer has arrived: nothing, so all get the same.
  void allocate(const Allowance& allowance, std::span<std::size_t> capacities) const {
    std::fill(capacities.begin(), capacities.end(), allowance.per_layer);
  }

  /// P of a layer. Throws ArgumentError where it is beyond float64: tau too small.
  template <class Kv, class O, class X>
  double preference(const kernel::LayerInput<Kv, O>& in, Workspace& workspace, X& executor) const {
    const detail::PlainFloats plain;
    double entropy = 0.0;
    double deviation = 0.0;
    kernel::for_all_heads(in.shape, [&](std::span<const std::uint32_t> heads) {
      kernel::window_moments<kernel::Entropies::yes>(
          in, heads, workspace, executor, [&](std::uint32_t, const kernel::WindowMoments& moments) {
            for (std::size_t t = 0; t < moments.entropies.size(); ++t) {
              entropy += static_cast<double>(moments.entropies[t]);
              deviation += static_cast<double>(moments.deviations[t]);
            }
          });
    });
    const double variance = in.window < 2 ? 0.0 : deviation / static_cast<double>(in.window - 1);
    const double preference = std::pow(entropy < 0.0 ? 0.0 : entropy, 1.0 / options_.tau1) *
                              std::pow(variance, 1.0 / options_.tau2);
    detail::require(detail::is_finite(preference), "preference of layer ", in.layer, " is ", preference,
                    " (entropy ", entropy, ", tau1 ", options_.tau1, ", variance ", variance, ", tau2 ",
                    options_.tau2, "): raise tau1 or tau2");
    return preference;
  }

  /// Shares `total` rows among the layers that have arrived, one for each preference. `least` is what each
  /// must keep (its window and what is protected), `capacities` holds what each may keep at most and receives
  /// what it may keep now. Where all preferences are 0 all count the same. Throws ArgumentError where the
  /// least of all layers is more than `total`; `capacities` are then as they were.
  void cascade(std::span<const double> preferences, std::span<const std::size_t> least, std::size_t total,
               std::span<std::size_t> capacities, std::span<std::size_t> most) const {
    const std::size_t needed = std::accumulate(least.begin(), least.end(), std::size_t{0});
    detail::require(needed <= total, "windows and protected tokens of layers 0 to ", capacities.size() - 1,
                    " are ", needed, " rows, the budget has ", total,
                    ": raise the budget, or protect fewer tokens");
    const detail::PlainFloats plain;
    std::copy(capacities.begin(), capacities.end(), most.begin());
    double sum = 0.0;
    double largest = 0.0;
    for (const double& preference : preferences) {
      sum += preference;
      largest = largest < preference ? preference : largest;
    }
    // Where their sum is beyond float64, their shares are not.
    const double unit = detail::is_finite(sum) ? 1.0 : largest;
    sum = 0.0;
    for (const double& preference : preferences) {
      sum += preference / unit;
    }
    for (std::size_t l = 0; l < capacities.size(); ++l) {
      const double share =
          sum > 0.0 ? preferences[l] / unit / sum : 1.0 / static_cast<double>(capacities.size());
      const double rows = detail::round_half_even(share * static_cast<double>(total));
      const bool all = !(rows < static_cast<double>(most[l]));
      capacities[l] = all ? most[l] : (std::max)(static_cast<std::size_t>(rows), least[l]);
    }
    walk_to_total(
        capacities, total, [&](std::size_t l) { return least[l]; }, [&](std::size_t l) { return most[l]; });
  }

 private:
  Budget budget_;
  Options options_;
};

}  // namespace compresskv::budget

#include "compresskv/core/strict_float_end.hpp"
