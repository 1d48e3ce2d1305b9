#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <span>
#include <utility>

#include "compresskv/core/error.hpp"
#include "compresskv/core/float_bits.hpp"
#include "compresskv/core/float_mode.hpp"
#include "compresskv/core/output_weights.hpp"
#include "compresskv/core/policy.hpp"
#include "compresskv/core/scores.hpp"
#include "compresskv/core/shape.hpp"
#include "compresskv/core/strict_float_begin.hpp"
#include "compresskv/core/workspace.hpp"
#include "compresskv/kernel/finite_checks.hpp"
#include "compresskv/kernel/layer_input.hpp"
#include "compresskv/kernel/output_norms.hpp"
#include "compresskv/score/scorer.hpp"

namespace compresskv::score {

struct CriticalKvOptions {
  double first_share = 0.5;  ///< of the rows kept before the window: those that the scorer alone chooses
  float epsilon = 1e-4F;     ///< what every score is raised by before it is weighed
};

/// CriticalKV: a scorer's tokens, half of them weighed by what their values add to the layer's output.
///
///     weighed[g][t] = (scorer's score[g][t] + epsilon)  *  mean over heads h of group g  || W_o[h]
///     value[g][t] ||_1
///
///     | the best by the scorer's scores: floor(first_share c) | the best of the others by weighed | window |
///
/// for c rows beside the window. One order says it for every c, as the rows of c are among those of c + 1;
/// the scores are ranks in it: 1 - 1/n for the first of n rows, 0 for the last. So KV heads that share rows
/// (`select::Adaptive`) share them evenly.
///
/// Needs and window are those of the scorer, and values besides. One whose scores are the layer's, or reach
/// over layers, does not compile.
///
/// Paper: Feng et al. (arXiv 2502.03805). kvpress, which has it of the first author, counts the window in
/// both shares, and shares rows among KV heads in a variant of its own; docs/method.md 3.24.
///
/// Throws as the scorer, and ScoreError naming a token whose norm is not finite. Cost: that of the scorer;
/// hidden * head_dim multiply-adds a value and query head, as many as the output projection has; two sorts.
template <Scorer S>
class CriticalKv {
 public:
  static_assert(
      S::granularity == Granularity::kv_head,
      "this scorer gives all KV heads of a layer one row of scores: CriticalKv weighs the values of "
      "each, so it takes one with a row a KV head (SnapKv, Knorm, ...)");
  static_assert(
      S::reach == Reach::own_layer,
      "the scores of this scorer travel from layer to layer: CriticalKv takes one that looks at its "
      "own layer alone");
  static constexpr Granularity granularity = Granularity::kv_head;
  static constexpr Needs needs = observes(S::needs) ? S::needs : Needs::keys_and_values;
  static constexpr bool reads_values = true;
  static constexpr Reach reach = Reach::own_layer;
  using Options = CriticalKvOptions;

  /// Throws ArgumentError for a share outside 0 to 1, or an epsilon that is no number from 0.
  CriticalKv(S scorer, OutputWeights weights, const Options& options = {})
      : scorer_(std::move(scorer)), weights_(std::move(weights)), options_(options) {
    detail::require(
        detail::is_finite(options.first_share) && options.first_share >= 0.0 && options.first_share <= 1.0,
        "first_share is ", options.first_share, ", must be between 0 and 1");
    detail::require(detail::is_finite(options.epsilon) && options.epsilon >= 0.0F, "epsilon is ",
                    options.epsilon, ", must be finite and not below 0");
  }

  std::size_t window() const { return scorer_.window(); }
  const Options& options() const { return options_; }
  const S& scorer() const { return scorer_; }
  void validate(const ModelShape& shape) const {
    scorer_.validate(shape);
    weights_.validate(shape.layers, shape.query_heads, shape.head_dim);
  }

  template <class Kv, class O, class X>
  void score(const kernel::LayerInput<Kv, O>& in, Workspace& workspace, X& executor,
             const Scores<granularity>& scores) const {
    // What the scorer takes of the memory that is allowed leaves room for the orders below.
    kernel::LayerInput<Kv, O> of_scorer = in;
    of_scorer.held_bytes += held_a_row * *std::max_element(in.rows.begin(), in.rows.end());
    scorer_.score(of_scorer, workspace, executor, scores);
    const detail::PlainFloats plain;
    for (std::size_t kv_head = 0; kv_head < in.shape.kv_heads; ++kv_head) {
      const std::span<float> row = scores.row(kv_head);
      // What is not finite stays, so that the error names its own token.
      if (kernel::detail::first_not_finite(row) == row.size()) {
        rank_in_stages(row, weigh(in, kv_head, row, workspace, executor), workspace);
      }
    }
  }

 private:
  template <class Kv, class O, class X>
  std::span<const float> weigh(const kernel::LayerInput<Kv, O>& in, std::size_t kv_head,
                               std::span<const float> row, Workspace& workspace, X& executor) const {
    const std::size_t group = in.shape.group();
    const std::span<float> norms = workspace.take(Workspace::Slot::pooled, row.size());
    const std::span<float> weighed = workspace.take(Workspace::Slot::sums, row.size());
    std::fill(weighed.begin(), weighed.end(), 0.0F);
    for (std::size_t h = 0; h < group; ++h) {
      kernel::output_l1_norms(in, weights_, kv_head * group + h, workspace, executor, norms);
      for (std::size_t t = 0; t < norms.size(); ++t) {
        weighed[t] += norms[t] / static_cast<float>(group);
      }
    }
    for (std::size_t t = 0; t < row.size(); ++t) {
      weighed[t] *= row[t] + options_.epsilon;
    }
    return weighed;
  }

  void rank_in_stages(std::span<float> row, std::span<const float> weighed, Workspace& workspace) const {
    const std::size_t count = row.size();
    const std::span<std::uint32_t> orders = workspace.take_indices(2 * count);
    const std::span<std::uint32_t> first = orders.first(count);
    const std::span<std::uint32_t> second = orders.last(count);
    sort_by(row, first);
    sort_by(weighed, second);
    constexpr float waits = -1.0F;
    std::fill(row.begin(), row.end(), waits);
    std::size_t by_first = 0;
    std::size_t by_second = 0;
    for (std::size_t kept = 1; kept <= count; ++kept) {
      // Of `kept` rows the first stage has chosen so many. Where its next one has come by the second already,
      // the second has one more.
      std::uint32_t next = 0;
      bool found = false;
      if (static_cast<std::size_t>(options_.first_share * static_cast<double>(kept)) > by_first) {
        next = first[by_first++];
        found = row[next] == waits;
      }
      while (!found) {
        next = second[by_second++];
        found = row[next] == waits;
      }
      row[next] = static_cast<float>(count - kept) / static_cast<float>(count);
    }
  }

  /// Rows by falling scores, the lower row of equal ones first.
  static void sort_by(std::span<const float> scores, std::span<std::uint32_t> order) {
    using detail::ordered;
    std::iota(order.begin(), order.end(), 0U);
    std::sort(order.begin(), order.end(), [&](std::uint32_t a, std::uint32_t b) {
      return ordered(scores[a]) > ordered(scores[b]) || (ordered(scores[a]) == ordered(scores[b]) && a < b);
    });
  }

  /// Bytes: two orders, and what the values' products take (`kernel::output_l1_norms`).
  static constexpr std::size_t held_a_row = 20;

  S scorer_;
  OutputWeights weights_;
  Options options_;
};

}  // namespace compresskv::score

#include "compresskv/core/strict_float_end.hpp"
