#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>

#include "compresskv/core/executor.hpp"
#include "compresskv/core/float_mode.hpp"
#include "compresskv/core/strict_float_begin.hpp"
#include "compresskv/core/workspace.hpp"
#include "compresskv/kernel/attention_tiles.hpp"
#include "compresskv/kernel/finite_checks.hpp"
#include "compresskv/kernel/head_groups.hpp"
#include "compresskv/kernel/layer_input.hpp"
#include "compresskv/kernel/softmax.hpp"
#include "compresskv/view/observation.hpp"

namespace compresskv::kernel {

/// Moments of a head's attention to each evictable token, over the rows of the window.
struct WindowMoments {
  std::span<const float> means;       ///< [evictable]
  std::span<const float> deviations;  ///< [evictable], sums of squared distances from the mean
  std::span<const float> entropies;   ///< [evictable], sums of -a ln(a + 1e-10); empty for `Entropies::no`
};

/// Whether `window_moments` takes a logarithm of every weight.
enum class Entropies { no, yes };

/// Calls `per_head(query_head, WindowMoments)` for each of `heads`: what CAKE looks at. Attention sums alone
/// do not show it. Means and deviations by Welford's recurrence, the window's rows ascending. Throws as
/// `attention_sums`.
template <Entropies entropies, class Kv, Observation O, Executor X, class PerHead>
void window_moments(const LayerInput<Kv, O>& in, std::span<const std::uint32_t> heads, Workspace& workspace,
                    X& executor, PerHead&& per_head) {
  static_assert(!SumsObservation<O>,
                "this scorer needs the window's rows apart: give queries or an attention matrix, not sums");
  constexpr std::size_t arrays = entropies == Entropies::yes ? 3 : 2;
  const compresskv::detail::PlainFloats plain;
  detail::for_head_groups(
      in, heads, in.window, arrays, [&](auto group, std::size_t observers, std::size_t queries_per_pass) {
        const std::size_t evictable = in.evictable(group[0] / in.shape.group());
        const std::span<float> moments =
            workspace.take(Workspace::Slot::sums, group.size() * arrays * evictable);
        std::fill(moments.begin(), moments.end(), 0.0F);
        const auto add = [&](std::size_t h, std::size_t query, std::size_t first, std::size_t tokens,
                             const ScaledRows& rows) {
          float* means = moments.data() + h * arrays * evictable + first;
          float* deviations = means + evictable;
          for (std::size_t i = 0; i < rows.count; ++i) {
            const float step = 1.0F / static_cast<float>(query + i + 1);
            for (std::size_t t = 0; t < tokens; ++t) {
              const float weight = rows.factor(i) * rows.row(i)[t];
              const float distance = weight - means[t];
              means[t] += distance * step;
              deviations[t] += distance * (weight - means[t]);
              if constexpr (entropies == Entropies::yes) {
                deviations[evictable + t] -= weight * std::log(weight + 1e-10F);
              }
            }
          }
        };
        detail::add_attention(in, group, observers, queries_per_pass, workspace, executor, add);
        for (std::size_t h = 0; h < group.size(); ++h) {
          const std::span<const float> own = moments.subspan(h * arrays * evictable, arrays * evictable);
          for (std::size_t array = 0; array < arrays; ++array) {
            detail::check_finite(in, group[h], own.subspan(array * evictable, evictable));
          }
          per_head(group[h], WindowMoments{.means = own.first(evictable),
                                           .deviations = own.subspan(evictable, evictable),
                                           .entropies = own.subspan(2 * evictable)});
        }
      });
}

}  // namespace compresskv::kernel

#include "compresskv/core/strict_float_end.hpp"
