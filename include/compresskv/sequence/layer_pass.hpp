#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <span>
#include <utility>
#include <vector>

#include "compresskv/core/error.hpp"
#include "compresskv/core/float_bits.hpp"
#include "compresskv/core/policy.hpp"
#include "compresskv/core/scores.hpp"
#include "compresskv/core/selection.hpp"
#include "compresskv/core/workspace.hpp"
#include "compresskv/kernel/layer_input.hpp"
#include "compresskv/sequence/compaction.hpp"
#include "compresskv/sequence/state.hpp"
#include "compresskv/view/kv_view.hpp"
#include "compresskv/view/observation.hpp"

namespace compresskv {

namespace sequence {

/// One layer's pass: its rows, their scores, and which of them stay. Nothing is remembered from layer to
/// layer but memory.
template <class P, class X>
class LayerPass {
  using S = typename P::scorer_type;

 public:
  static constexpr Granularity granularity = S::granularity;
  /// Whether each KV head has a capacity of its own.
  static constexpr bool by_head = P::capacity_granularity == Granularity::kv_head;

  LayerPass(const P& plan, X executor) : plan_(&plan), executor_(std::move(executor)) {}

  const P& plan() const { return *plan_; }
  X& executor() { return executor_; }
  Workspace& workspace() { return workspace_; }
  Selection& selection() { return selection_; }

  /// Takes a view's rows for the layer at hand, checked against the plan and the tokens announced. Throws
  /// ArgumentError.
  template <KvView V>
  void see(const State& state, std::size_t layer, const V& kv) {
    state.check_layer(layer);
    detail::check_view(kv, plan_->shape());
    for (std::size_t head = 0; granularity == Granularity::layer && head < kv.kv_heads(); ++head) {
      detail::require(
          kv.rows(head) == kv.rows(0), "KV head ", head, " of layer ", layer, " has ", kv.rows(head),
          " rows, KV head 0 has ", kv.rows(0),
          ": one set of rows for all heads needs equal lengths; use a policy with scores a KV head");
    }
    state.check_rows(layer, [&](std::size_t head) { return kv.rows(head); });
    take_rows(kv);
  }
  /// The same for a layer that must show all rows announced.
  template <KvView V>
  void see_all_rows(const State& state, std::size_t layer, const V& kv) {
    see(state, layer, kv);
    state.check_all_rows(layer, [&](std::size_t head) { return kv.rows(head); });
  }
  /// The same for attention alone, over `rows` rows.
  void see_attention(const State& state, std::size_t layer, std::size_t rows) {
    state.check_layer(layer);
    state.check_announced(layer, [&](std::size_t) { return rows; });
    rows_.assign(plan_->shape().kv_heads, rows);
  }
  /// The layer at hand has the rows of this view, which was seen before.
  template <KvView V>
  void take_rows(const V& kv) {
    rows_.resize(kv.kv_heads());
    for (std::size_t head = 0; head < rows_.size(); ++head) {
      rows_[head] = kv.rows(head);
    }
  }

  std::span<std::size_t> rows() { return rows_; }
  std::size_t longest() const { return *std::max_element(rows_.begin(), rows_.end()); }
  /// Rows of scores that a layer has.
  std::size_t score_rows() const { return granularity == Granularity::layer ? 1 : plan_->shape().kv_heads; }

  /// Whatever an allocator of the engine's own says, the window stays whole.
  std::size_t at_least_window(std::size_t capacity, std::size_t rows) const {
    return (std::max)(capacity, (std::min)(plan_->scorer().window(), rows));
  }

  /// Whether no KV head has more rows than it may keep.
  bool stays_whole(const State& state, std::size_t layer) const {
    for (std::size_t head = 0; by_head && head < rows_.size(); ++head) {
      if (rows_[head] > at_least_window(state.capacities_of(layer)[head], rows_[head])) {
        return false;
      }
    }
    return by_head || longest() <= at_least_window(state.capacities()[layer], longest());
  }

  template <class V, class O>
  kernel::LayerInput<V, O> input(const State& state, std::size_t layer, const V& kv, const O& observation,
                                 std::size_t held_bytes) const {
    return {.shape = plan_->shape(),
            .layer = layer,
            .rows = rows_,
            .window = plan_->scorer().window(),
            .retained = state.layer(layer),
            .kv = kv,
            .observation = observation,
            .held_bytes = held_bytes};
  }

  /// Scores of the layer at hand, their values unspecified.
  Scores<granularity> take_scores() {
    score_ends_.resize(score_rows());
    score_windows_.resize(score_ends_.size());
    std::size_t end = 0;
    for (std::size_t row = 0; row < score_ends_.size(); ++row) {
      score_windows_[row] = (std::min)(plan_->scorer().window(), rows_[row]);
      end += rows_[row] - score_windows_[row];
      score_ends_[row] = end;
    }
    return {workspace_.take(Workspace::Slot::scores, end), score_ends_, score_windows_};
  }

  /// Checks the observation, then scores the layer. Throws ArgumentError and ScoreError.
  template <class V, class O>
  Scores<granularity> score(const State& state, const kernel::LayerInput<V, O>& in) {
    if constexpr (observes(S::needs)) {
      for (std::size_t head = 0; head < rows_.size(); ++head) {
        const std::size_t window = (std::min)(plan_->scorer().window(), rows_[head]);
        detail::check_observation(in.observation, plan_->shape(), rows_[head],
                                  (std::max)(window, unseen(state.layer(in.layer), head)));
      }
    }
    const Scores<granularity> scores = take_scores();
    plan_->scorer().score(in, workspace_, executor_, scores);
    return scores;
  }

  /// Ranks add theirs, where the engine has said how.
  template <class Reduce>
  static void reduce(const Scores<granularity>& scores, Reduce&& by) {
    if constexpr (std::invocable<Reduce&, std::span<float>>) {
      by(scores.values());
    }
  }

  /// Throws where scores do not fit the plan or the layer, or are not finite; the rows of the longest KV
  /// head.
  std::size_t check_scores(const State& state, std::size_t layer, const Scores<granularity>& scores) const {
    const std::size_t expected = score_rows();
    detail::require(scores.rows() == expected, "scores of layer ", layer, " have ", scores.rows(),
                    " rows, this plan's have ", expected, ": give the scores that score() filled");
    std::size_t longest = 0;
    for (std::size_t row = 0; row < scores.rows(); ++row) {
      longest = (std::max)(longest, scores.cached(row));
      const std::size_t window = (std::min)(plan_->scorer().window(), scores.cached(row));
      detail::require(scores.window(row) == window, "scores of layer ", layer, " leave out a window of ",
                      scores.window(row), " rows, the plan's window is ", window,
                      ": give the scores that score() filled");
    }
    state.check_announced(
        layer, [&](std::size_t head) { return scores.cached(granularity == Granularity::layer ? 0 : head); });
    for (std::size_t row = 0; row < scores.rows(); ++row) {
      const auto values = scores.row(row);
      for (std::size_t token = 0; token < values.size(); ++token) {
        detail::require<ScoreError>(detail::is_finite(values[token]), "score of layer ", layer, " row ", row,
                                    " token ", token, " is ", values[token],
                                    ": scores must be finite; nothing was changed");
      }
    }
    return longest;
  }

  /// Rows to keep by these scores, into `selection()`; protected tokens are marked in the scores. Throws
  /// ArgumentError where the capacity cannot hold them.
  void select(const State& state, std::size_t layer, const Scores<granularity>& scores,
              std::size_t capacity) {
    state.protected_tokens().mark(layer, state.layer(layer), scores, capacity);
    select_by(scores, capacity);
  }
  /// The same by scores in which they are marked.
  void select_by(const Scores<granularity>& scores, std::size_t capacity) {
    plan_->selector().select(scores, capacity, workspace_, selection_);
  }
  /// As `select`, each KV head by its own capacity.
  void select_by_head(const State& state, std::size_t layer, const Scores<granularity>& scores) {
    capacities_.resize(scores.rows());
    for (std::size_t head = 0; head < scores.rows(); ++head) {
      capacities_[head] = at_least_window(state.capacities_of(layer)[head], scores.cached(head));
    }
    state.protected_tokens().mark(layer, state.layer(layer), scores,
                                  [&](std::size_t head) { return capacities_[head]; });
    plan_->selector().select(scores, std::span<const std::size_t>(capacities_), workspace_, selection_);
  }

  /// All rows, into `selection()`.
  void select_all() { sequence::select_all(rows_, selection_); }

  std::size_t memory_bytes() const { return workspace_.bytes() + selection_.memory_bytes(); }

 private:
  /// Queries that must be shown beside the window's: where a scorer wants all, those of every row that no
  /// compression has seen.
  std::size_t unseen(const Retained& known, std::size_t head) const {
    if (S::needs != Needs::all_queries) {
      return 0;
    }
    const bool whole = known.rows(head) == known.next_position();
    return rows_[head] - (whole ? 0 : known.rows(head));
  }

  const P* plan_;
  X executor_;
  Workspace workspace_;
  Selection selection_;
  std::vector<std::size_t> rows_;           // [kv_head], of the layer at hand
  std::vector<std::size_t> capacities_;     // [kv_head], likewise, where heads have their own
  std::vector<std::size_t> score_ends_;     // [row of scores]
  std::vector<std::size_t> score_windows_;  // [row of scores]
};

}  // namespace sequence
}  // namespace compresskv
