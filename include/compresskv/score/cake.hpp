#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

#include "compresskv/core/error.hpp"
#include "compresskv/core/float_bits.hpp"
#include "compresskv/core/policy.hpp"
#include "compresskv/core/scores.hpp"
#include "compresskv/core/strict_float_begin.hpp"
#include "compresskv/kernel/fused.hpp"
#include "compresskv/kernel/head_groups.hpp"
#include "compresskv/kernel/pooling.hpp"
#include "compresskv/kernel/window_moments.hpp"
#include "compresskv/score/scorer.hpp"
#include "compresskv/score/window_scorer.hpp"

namespace compresskv::score {

struct CakeOptions {
  float gamma = 200.0F;  ///< weight of the variance
  std::size_t window = 8;
  std::size_t pool_width = 5;  ///< odd; average pooling
};

/// CAKE: tokens that the window looks at, or looks at unevenly.
///
///     score[g][t] = 1/G  sum over the G heads of group g
///                   pool_t ( mean over window rows of a[t] + gamma * variance over window rows of a[t] )
///
/// The variance is the unbiased one (0 for a window of one row). Goes with `budget::Cake`. Paper: Qin et al.,
/// ICLR 2025 (arXiv 2503.12491); docs/method.md 3.4. Cost: that of SnapKv, and two arrays a head more.
class Cake : public WindowScorer<Granularity::kv_head, Needs::window_attention, CakeOptions> {
 public:
  Cake() = default;
  /// Throws ArgumentError for no window, an even pooling width or a gamma that is negative or not finite.
  explicit Cake(const Options& options) : WindowScorer(options) {
    detail::require(detail::is_finite(options.gamma) && options.gamma >= 0.0F, "gamma is ", options.gamma,
                    ", must be finite and not negative");
  }

  template <class Kv, class O, class X>
  void score(const kernel::LayerInput<Kv, O>& in, Workspace& workspace, X& executor,
             const Scores<granularity>& scores) const {
    std::fill(scores.values().begin(), scores.values().end(), 0.0F);
    const float factor = in.window < 2 ? 0.0F : options().gamma / static_cast<float>(in.window - 1);
    // Not read here; but a matrix that holds a negative weight is refused by its logarithm.
    constexpr auto entropies = QueryObservation<O> ? kernel::Entropies::no : kernel::Entropies::yes;
    kernel::for_all_heads(in.shape, [&](std::span<const std::uint32_t> heads) {
      kernel::window_moments<entropies>(
          in, heads, workspace, executor, [&](std::uint32_t head, const kernel::WindowMoments& moments) {
            const std::span<float> value = workspace.take(Workspace::Slot::pooled, moments.means.size());
            for (std::size_t t = 0; t < value.size(); ++t) {
              value[t] = kernel::fused(factor, moments.deviations[t], moments.means[t]);
            }
            kernel::add_pooled(value, kernel::Pool::average, options().pool_width,
                               scores.row(head / in.shape.group()));
          });
    });
    kernel::divide(scores.values(), in.shape.group());
  }
};

}  // namespace compresskv::score

#include "compresskv/core/strict_float_end.hpp"
