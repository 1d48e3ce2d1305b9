#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

#include "compresskv/core/head_ranking.hpp"
#include "compresskv/core/head_scores.hpp"
#include "compresskv/core/policy.hpp"
#include "compresskv/core/scores.hpp"
#include "compresskv/core/shape.hpp"
#include "compresskv/core/strict_float_begin.hpp"
#include "compresskv/kernel/pooling.hpp"
#include "compresskv/kernel/window_attention.hpp"
#include "compresskv/score/scorer.hpp"
#include "compresskv/score/semantic_retrieval.hpp"

namespace compresskv::score {

/// Per-group retrieval: each KV head is scored by the semantic retrieval heads of its own group.
///
///     score[g][t] = mean over the layer's k heads in group g of their pooled window scores (see
///     SemanticRetrieval)
///
/// A group without such a head falls back to the mean over all k heads of the layer, matched by position
/// where KV heads hold different rows. A variant that the paper does not have: docs/method.md 3.2.
/// Same options, errors and cost as `SemanticRetrieval`, whose `shard` is not supported: a group's
/// heads are never split over ranks, but its fallback would be.
class GroupedRetrieval {
 public:
  static constexpr Granularity granularity = Granularity::kv_head;
  static constexpr Needs needs = Needs::window_attention;
  static constexpr Reach reach = Reach::own_layer;

  using Options = SemanticRetrieval::Options;

  GroupedRetrieval(const HeadRanking& ranking, const Options& options) : heads_(ranking, options) {
    detail::require(options.shard.heads == 0,
                    "GroupedRetrieval does not support a shard: use SemanticRetrieval");
  }
  GroupedRetrieval(const HeadScores& scores, const Options& options)
      : GroupedRetrieval(scores.ranking(), options) {}

  std::size_t window() const { return heads_.window(); }
  void validate(const ModelShape& shape) const { heads_.validate(shape); }

  template <class Kv, class O, class X>
  void score(const kernel::LayerInput<Kv, O>& in, Workspace& workspace, X& executor,
             const Scores<granularity>& scores) const {
    std::fill(scores.values().begin(), scores.values().end(), 0.0F);
    const auto heads = heads_.heads(in.layer);
    const auto heads_of = [&](std::size_t kv_head) {
      return static_cast<std::size_t>(std::count_if(heads.begin(), heads.end(), [&](std::uint32_t head) {
        return head / in.shape.group() == kv_head;
      }));
    };
    // Groups without a head share one mean; it is added up once where their rows are the same tokens.
    std::size_t fallback = 0;
    while (fallback < in.shape.kv_heads && heads_of(fallback) > 0) {
      ++fallback;
    }
    const auto pool_into = [&](std::span<const float> sums, std::span<float> out) {
      kernel::add_pooled(sums, heads_.options().pool, heads_.options().pool_width, out);
    };
    kernel::window_attention(
        in, heads, workspace, executor, [&](std::uint32_t head, std::span<const float> sums) {
          const std::size_t own = head / in.shape.group();
          pool_into(sums, scores.row(own));
          if (fallback == in.shape.kv_heads) {
            return;
          }
          if (in.retained.shared()) {
            pool_into(sums, scores.row(fallback));
            return;
          }
          const std::span<float> pooled = workspace.take(Workspace::Slot::pooled, sums.size());
          std::fill(pooled.begin(), pooled.end(), 0.0F);
          pool_into(sums, pooled);
          for (std::size_t kv_head = fallback; kv_head < in.shape.kv_heads; ++kv_head) {
            if (heads_of(kv_head) == 0) {
              add_by_position(in, own, pooled, kv_head, scores.row(kv_head));
            }
          }
        });
    for (std::size_t kv_head = 0; kv_head < in.shape.kv_heads; ++kv_head) {
      const std::size_t own = heads_of(kv_head);
      const std::span<float> row = scores.row(kv_head);
      if (own == 0 && in.retained.shared() && kv_head != fallback) {
        std::copy_n(scores.row(fallback).begin(), row.size(), row.begin());
        continue;
      }
      kernel::divide(row, own == 0 ? heads.size() : own);
    }
  }

 private:
  /// Both heads' positions ascend: one pass over the two.
  template <class Kv, class O>
  static void add_by_position(const kernel::LayerInput<Kv, O>& in, std::size_t from_head,
                              std::span<const float> from, std::size_t to_head, std::span<float> to) {
    Retained::Cursor source = in.retained.cursor(from_head);
    Retained::Cursor target = in.retained.cursor(to_head);
    std::size_t f = 0;
    for (std::size_t t = 0; t < to.size() && f < from.size(); ++t) {
      const std::size_t position = target.seek(t);
      while (f < from.size() && source.seek(f) < position) {
        ++f;
      }
      if (f < from.size() && source.seek(f) == position) {
        to[t] += from[f];
      }
    }
  }

  SemanticRetrieval heads_;
};

}  // namespace compresskv::score

#include "compresskv/core/strict_float_end.hpp"
