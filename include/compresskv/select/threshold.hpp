#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <span>

#include "compresskv/core/error.hpp"
#include "compresskv/core/float_bits.hpp"
#include "compresskv/kernel/top_k.hpp"
#include "compresskv/select/selector.hpp"

namespace compresskv::select {

/// Every row whose score is not below a threshold, and the whole window: how many that are, the text decides.
///
/// The capacity is then what a KV head keeps at most: where more rows reach the threshold, those of the
/// highest scores stay, of equal ones the lower position. A budget of everything (`Budget::kept_ratio(1.0)`)
/// leaves it to the threshold. A row that stayed is not judged again in a later turn. Cost: linear in S, a KV
/// head.
class Threshold {
 public:
  static constexpr Reach reach = Reach::own_layer;
  static constexpr bool judges_rows_alone = true;
  static constexpr bool accepts(Granularity granularity) { return granularity == Granularity::kv_head; }

  /// Throws ArgumentError where the threshold is not finite.
  explicit Threshold(float threshold) : threshold_(threshold) {
    detail::require(detail::is_finite(threshold), "threshold is ", threshold,
                    ", must be finite: it is the lowest score of a row that stays");
  }

  float threshold() const { return threshold_; }

  void select(const Scores<Granularity::kv_head>& scores, std::size_t capacity, Workspace& workspace,
              Selection& selection) const {
    const std::span<std::size_t> kept = workspace.take_counts(scores.rows());
    std::size_t total = 0;
    for (std::size_t head = 0; head < scores.rows(); ++head) {
      const std::span<const float> row = scores.row(head);
      const auto reach_it = static_cast<std::size_t>(
          std::count_if(row.begin(), row.end(), [&](const float& score) { return !(score < threshold_); }));
      kept[head] = (std::min)(reach_it, capacity - scores.window(head));
      total += kept[head] + scores.window(head);
    }
    selection.assign_per_head(total);
    for (std::size_t head = 0; head < scores.rows(); ++head) {
      const std::size_t tokens = scores.tokens(head);
      const auto rows = selection.append_head(kept[head] + scores.window(head));
      kernel::top_k(scores.row(head), workspace.take(Workspace::Slot::logits, tokens),
                    rows.first(kept[head]));
      std::iota(rows.begin() + static_cast<std::ptrdiff_t>(kept[head]), rows.end(),
                static_cast<std::uint32_t>(tokens));
    }
  }

 private:
  float threshold_;
};

}  // namespace compresskv::select
