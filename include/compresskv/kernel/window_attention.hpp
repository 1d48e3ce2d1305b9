#pragma once

#include <algorithm>
#include <array>
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

namespace detail {

/// Calls `per_head(query_head, totals)` for each of `heads`: one float an evictable row, 0 before `fold(rows,
/// query, tokens, totals)` has taken in the attention of each tile of queries, `query` being its first.
template <class Kv, Observation O, Executor X, class Fold, class PerHead>
void fold_attention(const LayerInput<Kv, O>& in, std::span<const std::uint32_t> heads, std::size_t observers,
                    Workspace& workspace, X& executor, Fold&& fold, PerHead&& per_head) {
  const compresskv::detail::PlainFloats plain;
  for_head_groups(
      in, heads, observers, 1, [&](auto group, std::size_t own_observers, std::size_t queries_per_pass) {
        const std::size_t evictable = in.evictable(group[0] / in.shape.group());
        const std::span<float> totals = workspace.take(Workspace::Slot::sums, group.size() * evictable);
        std::fill(totals.begin(), totals.end(), 0.0F);
        const auto add = [&](std::size_t h, std::size_t query, std::size_t first, std::size_t tokens,
                             const ScaledRows& rows) {
          fold(rows, query, tokens, totals.data() + h * evictable + first);
        };
        if constexpr (SumsObservation<O>) {
          std::copy_n(in.observation.sums(group[0]).begin(), evictable, totals.begin());
        } else {
          add_attention(in, group, own_observers, queries_per_pass, workspace, executor, add);
        }
        for (std::size_t h = 0; h < group.size(); ++h) {
          const std::span<const float> own = totals.subspan(h * evictable, evictable);
          check_finite(in, group[h], own);
          per_head(group[h], own);
        }
      });
}

}  // namespace detail

/// Window attention (docs/method.md 2.1): logits of the last `observers` queries with all keys, causal mask,
/// softmax over all keys in float32, sum over the queries, the window's own columns dropped.
///
/// Calls `per_head(query_head, sums)` for each of `heads` (ascending), `sums` being one float an evictable
/// row of its KV head, valid during the call; heads without such a row are left out. The keys of a KV head
/// are read once for as many of its heads as memory allows (1 % of the model's cache), and more often only
/// where not even one head fits. Throws ScoreError naming layer, head and token when a logit is NaN or +inf.
template <class Kv, Observation O, Executor X, class PerHead>
void attention_sums(const LayerInput<Kv, O>& in, std::span<const std::uint32_t> heads, std::size_t observers,
                    Workspace& workspace, X& executor, PerHead&& per_head) {
  const auto add = [](const ScaledRows& rows, std::size_t, std::size_t tokens, float* sums) {
    add_scaled(rows, tokens, sums);
  };
  detail::fold_attention(in, heads, observers, workspace, executor, add, per_head);
}

/// The same, but of each head the largest attention that any observing query gives a row, not the sum. The
/// attention of a query is divided by its own of `divisors`, if these are given.
template <class Kv, QueryObservation O, Executor X, class PerHead>
void attention_maxima(const LayerInput<Kv, O>& in, std::span<const std::uint32_t> heads,
                      std::size_t observers, std::span<const float> divisors, Workspace& workspace,
                      X& executor, PerHead&& per_head) {
  const auto largest = [&](const ScaledRows& rows, std::size_t query, std::size_t tokens, float* maxima) {
    std::array<float, 32> factors;
    const std::size_t at_once = divisors.empty() ? rows.count : factors.size();
    for (std::size_t first = 0; first < rows.count; first += at_once) {
      ScaledRows part = rows;
      part.first = rows.row(first);
      part.count = (std::min)(at_once, rows.count - first);
      for (std::size_t i = 0; !divisors.empty() && i < part.count; ++i) {
        factors[i] = rows.factor(first + i) / divisors[query + first + i];
        part.factors = factors.data();
        part.factor_stride = 1;
      }
      max_scaled(part, tokens, maxima);
    }
  };
  detail::fold_attention(in, heads, observers, workspace, executor, largest, per_head);
}

/// `attention_sums` of the window's queries.
template <class Kv, Observation O, Executor X, class PerHead>
void window_attention(const LayerInput<Kv, O>& in, std::span<const std::uint32_t> heads, Workspace& workspace,
                      X& executor, PerHead&& per_head) {
  attention_sums(in, heads, in.window, workspace, executor, per_head);
}

/// `attention_sums` of all query heads of the model, ascending.
template <class Kv, Observation O, Executor X, class PerHead>
void attention_sums_of_all_heads(const LayerInput<Kv, O>& in, std::size_t observers, Workspace& workspace,
                                 X& executor, PerHead&& per_head) {
  for_all_heads(in.shape, [&](std::span<const std::uint32_t> heads) {
    attention_sums(in, heads, observers, workspace, executor, per_head);
  });
}

}  // namespace compresskv::kernel

#include "compresskv/core/strict_float_end.hpp"
