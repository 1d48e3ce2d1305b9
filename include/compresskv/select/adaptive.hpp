#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <span>

#include "compresskv/core/error.hpp"
#include "compresskv/core/float_bits.hpp"
#include "compresskv/kernel/top_k.hpp"
#include "compresskv/select/selector.hpp"

namespace compresskv::select {

/// Ada-KV: KV heads share the layer's rows by need.
///
///     each head first its own top floor(safeguard * (capacity - w)),
///     then the best of all remaining (head, token) pairs until K * (capacity - w) are chosen, and the
///     windows
///
/// Heads then keep different numbers of rows; the layer keeps `K * capacity` (or all it has). Equal scores:
/// the lower row, then the lower KV head. Paper: Feng et al., NeurIPS 2025 (arXiv 2407.11550);
/// docs/method.md 4.3. Cost: linear in S, a KV head; scratch for all scores of the layer.
class Adaptive {
 public:
  static constexpr Reach reach = Reach::own_layer;
  static constexpr bool accepts(Granularity granularity) { return granularity == Granularity::kv_head; }

  Adaptive() = default;
  /// `safeguard` is the share that each head keeps for itself. Throws ArgumentError outside 0 to 1.
  explicit Adaptive(double safeguard) : safeguard_(safeguard) {
    detail::require(detail::is_finite(safeguard) && safeguard >= 0.0 && safeguard <= 1.0, "safeguard is ",
                    safeguard, ", must be a share of the capacity, 0 to 1");
  }

  void select(const Scores<Granularity::kv_head>& scores, std::size_t capacity, Workspace& workspace,
              Selection& selection) const {
    const std::size_t heads = scores.rows();
    std::size_t windows = 0;
    std::size_t window = 0;
    for (std::size_t head = 0; head < heads; ++head) {
      windows += scores.window(head);
      window = (std::max)(window, scores.window(head));
    }
    const std::size_t share = capacity - window;
    const auto own = static_cast<std::size_t>(std::floor(safeguard_ * static_cast<double>(share)));
    const auto own_of = [&](std::size_t head) { return (std::min)(own, scores.tokens(head)); };

    // What each head leaves beside its own share, best first; together they compete for the rest.
    const std::span<float> rest = workspace.take(Workspace::Slot::logits, scores.values().size());
    std::size_t left = 0;
    std::size_t taken = 0;
    for (std::size_t head = 0; head < heads; ++head) {
      const std::span<const float> row = scores.row(head);
      const std::span<float> copy = rest.subspan(left, row.size());
      std::copy(row.begin(), row.end(), copy.begin());
      const std::size_t first = own_of(head);
      if (first < copy.size()) {
        std::nth_element(copy.begin(), copy.begin() + static_cast<std::ptrdiff_t>(first), copy.end(),
                         kernel::Above{});
        std::copy(copy.begin() + static_cast<std::ptrdiff_t>(first), copy.end(), copy.begin());
      }
      left += copy.size() - first;
      taken += first;
    }
    const std::size_t open = (std::min)(heads * capacity - windows - taken, left);

    const std::span<std::size_t> counts = workspace.take_counts(2 * heads);
    const std::span<std::size_t> skipped = counts.subspan(heads);
    for (std::size_t head = 0; head < heads; ++head) {
      counts[head] = own_of(head);
    }
    if (open > 0) {
      const auto last = rest.begin() + static_cast<std::ptrdiff_t>(open) - 1;
      std::nth_element(rest.begin(), last, rest.begin() + static_cast<std::ptrdiff_t>(left), kernel::Above{});
      share_out(scores, detail::ordered(*last), open, counts.first(heads), skipped);
    }
    const std::size_t total = std::accumulate(counts.begin(), skipped.begin(), windows);
    selection.assign_per_head(total);
    for (std::size_t head = 0; head < heads; ++head) {
      const std::size_t tokens = scores.tokens(head);
      const auto rows = selection.append_head(counts[head] + scores.window(head));
      kernel::top_k(scores.row(head), workspace.take(Workspace::Slot::logits, tokens),
                    rows.first(counts[head]));
      std::iota(rows.begin() + static_cast<std::ptrdiff_t>(counts[head]), rows.end(),
                static_cast<std::uint32_t>(tokens));
    }
  }

 private:
  /// Adds to `counts` what each head gets of `open` rows: all above `threshold` (as `detail::ordered` has
  /// it), and of those equal to it the lower rows, then the lower heads, that no head has in its own share.
  static void share_out(const Scores<Granularity::kv_head>& scores, std::int32_t threshold, std::size_t open,
                        std::span<std::size_t> counts, std::span<std::size_t> skipped) {
    std::size_t longest = 0;
    for (std::size_t head = 0; head < counts.size(); ++head) {
      const std::span<const float> row = scores.row(head);
      const auto above = static_cast<std::size_t>(std::count_if(
          row.begin(), row.end(), [&](const float& score) { return detail::ordered(score) > threshold; }));
      skipped[head] = counts[head] > above ? counts[head] - above : 0;
      if (above > counts[head]) {
        open -= above - counts[head];
        counts[head] = above;
      }
      longest = (std::max)(longest, row.size());
    }
    for (std::size_t t = 0; t < longest && open > 0; ++t) {
      for (std::size_t head = 0; head < counts.size() && open > 0; ++head) {
        if (t >= scores.tokens(head) || detail::ordered(scores.row(head)[t]) != threshold) {
          continue;
        }
        if (skipped[head] > 0) {
          --skipped[head];
        } else {
          ++counts[head];
          --open;
        }
      }
    }
  }

  double safeguard_ = 0.2;
};

}  // namespace compresskv::select
