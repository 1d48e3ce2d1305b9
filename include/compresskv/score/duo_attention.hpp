#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>

#include "compresskv/core/error.hpp"
#include "compresskv/core/policy.hpp"
#include "compresskv/core/scores.hpp"
#include "compresskv/score/scorer.hpp"
#include "compresskv/score/window_scorer.hpp"

namespace compresskv::score {

struct DuoAttentionOptions {
  std::size_t sinks = 128;   ///< first tokens, a of the a : b that few rows are shared out by
  std::size_t recent = 256;  ///< most recent tokens, b
  std::size_t window = 8;    ///< most recent tokens, kept whatever the budget, as in the other methods
};

/// DuoAttention's streaming heads: the first tokens (attention sinks) and the most recent ones.
///
///     |  sinks  |         ...         |  recent  |
///
/// A KV head of any capacity c keeps the first c rows of one order: sinks and recent tokens in turn, in the
/// proportion `sinks : recent`, until it has both whole, then further tokens, the most recent first. So with
/// c = sinks + recent it keeps those of the paper, with less a smaller picture of them. What each head may
/// keep says the budget: `budget::WholeHeads`, whose best heads keep all.
///
/// Position only, true positions kept. Sinks are positions, recent tokens are counted in rows: so in a later
/// turn the rows kept and those appended since are judged anew. Paper: Xiao et al., ICLR 2025
/// (arXiv 2410.10819); docs/method.md 3.25. Cost: one pass over the scores; no key is read.
class DuoAttention : public WindowScorer<Granularity::kv_head, Needs::nothing, DuoAttentionOptions> {
 public:
  DuoAttention() = default;
  /// Throws ArgumentError for no window, or sinks or recent tokens beyond 32 bits.
  explicit DuoAttention(const Options& options) : WindowScorer(options) {
    constexpr std::size_t most = (std::numeric_limits<std::uint32_t>::max)();
    detail::require(options.sinks <= most, "sinks is ", options.sinks, ", the most is ", most,
                    ": positions are held in 32 bits");
    detail::require(options.recent <= most, "recent is ", options.recent, ", the most is ", most,
                    ": positions are held in 32 bits");
  }

  template <class Kv, class O, class X>
  void score(const kernel::LayerInput<Kv, O>& in, Workspace&, X&, const Scores<granularity>& scores) const {
    for (std::size_t head = 0; head < scores.rows(); ++head) {
      const std::span<float> row = scores.row(head);
      const std::size_t sinks = in.retained.rows_before(options().sinks, head);
      for (std::size_t t = 0; t < row.size(); ++t) {
        const std::size_t place = place_of_recent(scores.cached(head) - 1 - t);
        // Float32 holds every integer up to 2^24: enough for prompts of 16 million tokens.
        row[t] = -static_cast<float>(t < sinks ? (std::min)(place, place_of_sink(t)) : place);
      }
    }
  }

 private:
  /// Places in the order, from 0. Sink i comes as soon as i / sinks of the recent tokens have.
  std::size_t place_of_sink(std::size_t sink) const {
    return sink + (sink * options().recent + options().sinks - 1) / options().sinks;
  }
  /// Of the row that is so many before the last.
  std::size_t place_of_recent(std::size_t before_last) const {
    return before_last < options().recent
               ? before_last +
                     (std::min)(options().sinks, before_last * options().sinks / options().recent + 1)
               : before_last + options().sinks;
  }
};

}  // namespace compresskv::score
