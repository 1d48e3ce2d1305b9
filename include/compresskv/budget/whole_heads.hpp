#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "compresskv/budget/allocator.hpp"
#include "compresskv/core/error.hpp"
#include "compresskv/core/head_scores.hpp"
#include "compresskv/core/order.hpp"

namespace compresskv::budget {

/// The best KV heads of the model keep all their rows, the others few.
///
///     least  = max( min(w, S), min(least, p / 2) )       every KV head, of p rows in the mean
///     S      the best heads, as many as the model's p L K rows allow
///     what is left over: the next best head, beside its least
///
/// A number for each KV head says how good it is: one of its own, or the largest of its query heads. Equal
/// numbers: the lower layer, then the lower head. Where `least` of all heads would take more than half of the
/// budget it shrinks to half: whole heads are what the method is for.
///
/// Known before any layer arrives, so each layer shrinks as it does. Goes with `score::DuoAttention`, whose
/// heads keep the first and the most recent tokens, or with any other scorer of KV heads, and with
/// `select::GroupedTopK`. Papers: Xiao et al., ICLR 2025 (arXiv 2410.10819); the numbers also of Kim et al.,
/// NeurIPS 2025 (arXiv 2505.23416), section on eviction that no context decides; docs/method.md 5.6. Cost: a
/// pass over the model's query heads.
class WholeHeads {
 public:
  static constexpr Reach reach = Reach::own_layer;
  static constexpr Granularity granularity = Granularity::kv_head;
  static constexpr std::size_t default_least = 384;  // the paper's 128 sinks and 256 recent tokens

  /// `scores` are of query heads or of KV heads; of several runs the mean counts. `least` is what every KV
  /// head keeps. Throws ArgumentError where it is 0.
  WholeHeads(const HeadScores& scores, Budget budget, std::size_t least = default_least)
      : budget_(budget), least_(least), layers_(scores.layers()), heads_(scores.heads()) {
    std::vector<double> means;  // [layer][head]
    for (std::size_t layer = 0; layer < layers_; ++layer) {
      for (std::size_t head = 0; head < heads_; ++head) {
        means.push_back(scores.mean(layer, head));
      }
    }
    best_ = detail::by_falling(means);
  }

  const Budget& budget() const { return budget_; }

  /// Throws ArgumentError when the scores are of another model.
  void validate(const ModelShape& shape) const {
    detail::require(layers_ == shape.layers && (heads_ == shape.query_heads || heads_ == shape.kv_heads),
                    "head scores are of ", layers_, " layers of ", heads_, " heads, the model has ",
                    shape.layers, " layers of ", shape.query_heads, " query heads and ", shape.kv_heads,
                    " KV heads: use the scores calibrated for this model");
  }

  /// `capacities` are `[layer][kv_head]`.
  void allocate(const Allowance& allowance, std::span<std::size_t> capacities) const {
    std::size_t left = total_rows(allowance, capacities.size());
    const std::size_t tokens = allowance.tokens;
    const std::size_t least =
        (std::max)((std::min)(allowance.window, tokens), (std::min)(least_, allowance.per_layer / 2));
    std::fill(capacities.begin(), capacities.end(), least);
    left -= least * capacities.size();
    // A KV head's largest number is the first of its query heads' that comes.
    const std::size_t group = best_.size() / capacities.size();
    for (std::size_t i = 0; i < best_.size() && left > 0; ++i) {
      std::size_t& capacity = capacities[best_[i] / group];
      const std::size_t more = capacity == least ? (std::min)(left, tokens - least) : 0;
      capacity += more;
      left -= more;
    }
  }

 private:
  Budget budget_;
  std::size_t least_;
  std::size_t layers_;
  std::size_t heads_;                // of a layer
  std::vector<std::uint32_t> best_;  // [layer * heads + head], best first
};

}  // namespace compresskv::budget
