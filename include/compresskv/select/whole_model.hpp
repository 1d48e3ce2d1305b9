#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <span>

#include "compresskv/core/policy.hpp"
#include "compresskv/core/selection.hpp"
#include "compresskv/core/workspace.hpp"
#include "compresskv/select/selector.hpp"

namespace compresskv::select {

/// Scores as 16 bits each, held for the whole model: non-negative half floats by their bits, which order as
/// the numbers do. Above them all: what comes before any other (sinks), and what stays in any case.
using Score16 = std::uint16_t;
inline constexpr Score16 certain16 = 0xFFFF;
inline constexpr Score16 first16 = 0xFFFE;

/// All layers and KV heads share one budget: the best (layer, row, KV head) of the model stay, and the
/// windows. Heads and layers then keep different numbers of rows.
///
/// Scores are compared as they are, so they must mean the same in all layers: `score::KvZip`. Equal scores:
/// the lower layer, then the lower row, then the lower KV head. Cost: two passes over the scores.
class WholeModel {
 public:
  static constexpr Reach reach = Reach::all_layers;
  static constexpr bool accepts(Granularity granularity) { return granularity == Granularity::kv_head; }

  /// Where the model's scores are cut: all above `score` stay, and the first `ties` of those equal to it.
  struct Cut {
    Score16 score = 0;
    std::size_t ties = 0;
  };

  /// The cut that leaves `room` scores. `for_each_row(visit)` calls `visit(scores)` for the scores of each
  /// layer and KV head.
  template <class ForEachRow>
  static Cut cut(std::size_t room, ForEachRow&& for_each_row) {
    // The upper byte first, then the lower byte among those of that upper one.
    std::array<std::size_t, 256> counts{};
    for_each_row([&](std::span<const Score16> row) {
      for (const Score16 score : row) {
        ++counts[score >> 8U];
      }
    });
    const std::size_t upper = last_with_room(counts, room);
    counts.fill(0);
    for_each_row([&](std::span<const Score16> row) {
      for (const Score16 score : row) {
        counts[score & 0xFFU] += score >> 8U == upper ? 1U : 0U;
      }
    });
    const std::size_t lower = last_with_room(counts, room);
    return {.score = static_cast<Score16>(upper << 8U | lower), .ties = (std::min)(room, counts[lower])};
  }

  /// Rows of one layer, the windows behind them. `rows[kv_head]` are its scores; `cut.ties` loses those that
  /// this layer takes: layers come in order.
  static void select(std::span<const std::span<const Score16>> rows, std::span<const std::size_t> windows,
                     Cut& cut, Workspace& workspace, Selection& selection) {
    const std::span<std::size_t> ties = workspace.take_counts(2 * rows.size()).first(rows.size());
    std::fill(ties.begin(), ties.end(), std::size_t{0});
    std::size_t total = 0;
    std::size_t longest = 0;
    for (std::size_t head = 0; head < rows.size(); ++head) {
      total += windows[head] +
               static_cast<std::size_t>(std::count_if(rows[head].begin(), rows[head].end(),
                                                      [&](Score16 score) { return score > cut.score; }));
      longest = (std::max)(longest, rows[head].size());
    }
    for (std::size_t t = 0; t < longest && cut.ties > 0; ++t) {
      for (std::size_t head = 0; head < rows.size() && cut.ties > 0; ++head) {
        if (t < rows[head].size() && rows[head][t] == cut.score) {
          ++ties[head];
          --cut.ties;
          ++total;
        }
      }
    }
    selection.assign_per_head(total);
    for (std::size_t head = 0; head < rows.size(); ++head) {
      const std::span<const Score16> row = rows[head];
      const auto above = static_cast<std::size_t>(
          std::count_if(row.begin(), row.end(), [&](Score16 score) { return score > cut.score; }));
      const std::span<std::uint32_t> kept = selection.append_head(above + ties[head] + windows[head]);
      std::size_t next = 0;
      for (std::size_t t = 0; t < row.size(); ++t) {
        if (row[t] > cut.score || (row[t] == cut.score && ties[head] > 0)) {
          ties[head] -= row[t] == cut.score ? 1U : 0U;
          kept[next++] = static_cast<std::uint32_t>(t);
        }
      }
      std::iota(kept.begin() + static_cast<std::ptrdiff_t>(next), kept.end(),
                static_cast<std::uint32_t>(row.size()));
    }
  }

 private:
  /// The highest index down to which the counts exceed `room`, or 0; `room` loses those above it.
  static std::size_t last_with_room(std::span<const std::size_t> counts, std::size_t& room) {
    std::size_t index = counts.size() - 1;
    while (index > 0 && counts[index] <= room) {
      room -= counts[index--];
    }
    return index;
  }
};

}  // namespace compresskv::select
