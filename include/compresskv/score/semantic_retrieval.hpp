#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "compresskv/core/error.hpp"
#include "compresskv/core/head_ranking.hpp"
#include "compresskv/core/head_scores.hpp"
#include "compresskv/core/policy.hpp"
#include "compresskv/core/scores.hpp"
#include "compresskv/core/shape.hpp"
#include "compresskv/core/strict_float_begin.hpp"
#include "compresskv/kernel/pooling.hpp"
#include "compresskv/kernel/window_attention.hpp"
#include "compresskv/score/scorer.hpp"
#include "compresskv/score/window_scorer.hpp"

namespace compresskv::score {

/// Query heads that one tensor-parallel rank holds, numbered as in the whole model.
struct HeadShard {
  std::size_t first_head = 0;
  std::size_t heads = 0;  ///< 0: all heads of the model
};

/// CompressKV: the layer's few semantic retrieval heads choose for all heads.
///
///     score[t] = 1/k  sum over k heads  pool_t ( sum over window rows i  softmax(q_i K^T / sqrt(d))[t] )
///
/// One score per evictable token of the layer. Paper: arXiv 2606.24467, section 3; docs/method.md 3.1.
/// Cost: the keys of the KV heads that serve the `k` heads are read once; `2 * k * window * S * head_dim`
/// flops.
class SemanticRetrieval {
 public:
  static constexpr Granularity granularity = Granularity::layer;
  static constexpr Needs needs = Needs::window_attention;
  static constexpr Reach reach = Reach::own_layer;

  struct Options {
    std::size_t heads_per_layer = 4;  ///< k, the first k of the layer's ranking
    std::size_t window = 8;           ///< w
    kernel::Pool pool = kernel::Pool::average;
    std::size_t pool_width = 5;  ///< odd
    /// In a tensor-parallel engine: the query heads of this rank. The ranking stays the whole model's; each
    /// rank scores those of the `k` heads that it holds, and the ranks add their scores (`compress`'s
    /// reduce).
    HeadShard shard = {};
  };

  /// Throws ArgumentError for no heads, no window, an even pooling width, or a layer whose ranking is shorter
  /// than `heads_per_layer`.
  SemanticRetrieval(const HeadRanking& ranking, const Options& options) : options_(options) {
    detail::require(options.heads_per_layer > 0, "heads_per_layer is 0: at least one head must score");
    check_window<needs>(options);
    const HeadShard& shard = options.shard;
    heads_.resize(ranking.layers());
    for (std::size_t layer = 0; layer < ranking.layers(); ++layer) {
      const auto ranked = ranking.heads(layer);
      detail::require(options.heads_per_layer <= ranked.size(), "heads_per_layer is ",
                      options.heads_per_layer, ", the ranking of layer ", layer, " lists ", ranked.size(),
                      " heads: ask for at most that many");
      for (const std::uint32_t head : ranked.first(options.heads_per_layer)) {
        highest_head_ = (std::max<std::size_t>)(highest_head_, head);
        if (shard.heads == 0) {
          heads_[layer].push_back(head);
        } else if (head >= shard.first_head && head - shard.first_head < shard.heads) {
          heads_[layer].push_back(static_cast<std::uint32_t>(head - shard.first_head));
        }
      }
      // The order of adding is by head, so that equal sets give equal scores however they are ranked.
      std::sort(heads_[layer].begin(), heads_[layer].end());
    }
  }

  SemanticRetrieval(const HeadScores& scores, const Options& options)
      : SemanticRetrieval(scores.ranking(), options) {}

  std::size_t window() const { return options_.window; }
  const Options& options() const { return options_; }

  /// The heads that score `layer`, ascending, numbered as this rank's.
  std::span<const std::uint32_t> heads(std::size_t layer) const { return heads_[layer]; }

  void validate(const ModelShape& shape) const {
    detail::require(heads_.size() == shape.layers, "head ranking has ", heads_.size(),
                    " layers, the model has ", shape.layers, ": use the ranking calibrated for this model");
    const std::size_t shard = options_.shard.heads;
    detail::require(shard == 0 || shard == shape.query_heads, "shard holds ", shard,
                    " query heads, ModelShape::query_heads is ", shape.query_heads,
                    ": a rank's shape counts its own heads");
    detail::require(shard == 0 || options_.shard.first_head % shape.group() == 0,
                    "shard starts at query head ", options_.shard.first_head, ", inside a group of ",
                    shape.group(), " heads that share a KV head: let each rank hold whole groups");
    detail::require(shard != 0 || highest_head_ < shape.query_heads, "head ranking names head ",
                    highest_head_, ", the model has heads 0 to ", shape.query_heads - 1,
                    ": use the ranking calibrated for this model");
  }

  template <class Kv, class O, class X>
  void score(const kernel::LayerInput<Kv, O>& in, Workspace& workspace, X& executor,
             const Scores<granularity>& scores) const {
    const std::span<float> mean = scores.row(0);
    std::fill(mean.begin(), mean.end(), 0.0F);
    kernel::window_attention(in, heads_[in.layer], workspace, executor,
                             [&](std::uint32_t, std::span<const float> sums) {
                               kernel::add_pooled(sums, options_.pool, options_.pool_width, mean);
                             });
    kernel::divide(mean, options_.heads_per_layer);
  }

 private:
  Options options_;
  std::vector<std::vector<std::uint32_t>> heads_;  // [layer], ascending
  std::size_t highest_head_ = 0;
};

}  // namespace compresskv::score

#include "compresskv/core/strict_float_end.hpp"
