#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <span>

#include "compresskv/kernel/top_k.hpp"
#include "compresskv/select/selector.hpp"

namespace compresskv::select {

/// Each KV head its own `capacity - w` highest scores and the whole window: every head keeps the same number
/// of rows, or all of its rows where it has fewer. Equal scores: the lower position. Cost: linear in S, a KV
/// head.
class GroupedTopK {
 public:
  static constexpr Reach reach = Reach::own_layer;
  static constexpr bool accepts(Granularity granularity) { return granularity == Granularity::kv_head; }

  void select(const Scores<Granularity::kv_head>& scores, std::size_t capacity, Workspace& workspace,
              Selection& selection) const {
    select_each(
        scores, [&](std::size_t) { return capacity; }, workspace, selection);
  }
  /// The same where each KV head has a capacity of its own, `[kv_head]`.
  void select(const Scores<Granularity::kv_head>& scores, std::span<const std::size_t> capacities,
              Workspace& workspace, Selection& selection) const {
    select_each(
        scores, [&](std::size_t head) { return capacities[head]; }, workspace, selection);
  }

 private:
  template <class CapacityOf>
  static void select_each(const Scores<Granularity::kv_head>& scores, CapacityOf&& capacity_of,
                          Workspace& workspace, Selection& selection) {
    const auto kept_of = [&](std::size_t head) {
      return (std::min)(capacity_of(head) - scores.window(head), scores.tokens(head));
    };
    std::size_t total = 0;
    for (std::size_t head = 0; head < scores.rows(); ++head) {
      total += kept_of(head) + scores.window(head);
    }
    selection.assign_per_head(total);
    for (std::size_t head = 0; head < scores.rows(); ++head) {
      const std::size_t tokens = scores.tokens(head);
      const std::size_t kept = kept_of(head);
      const auto rows = selection.append_head(kept + scores.window(head));
      kernel::top_k(scores.row(head), workspace.take(Workspace::Slot::logits, tokens), rows.first(kept));
      std::iota(rows.begin() + static_cast<std::ptrdiff_t>(kept), rows.end(),
                static_cast<std::uint32_t>(tokens));
    }
  }
};

}  // namespace compresskv::select
