#pragma once

#include <algorithm>
#include <cstddef>
#include <span>
#include <utility>

#include "compresskv/core/float_mode.hpp"
#include "compresskv/core/policy.hpp"
#include "compresskv/core/scores.hpp"
#include "compresskv/core/shape.hpp"
#include "compresskv/core/strict_float_begin.hpp"
#include "compresskv/core/workspace.hpp"
#include "compresskv/kernel/layer_input.hpp"
#include "compresskv/score/scorer.hpp"

namespace compresskv::score {

/// One set of rows for all KV heads, by scores that each KV head has of its own: for `select::SharedTopK`.
///
///     score[t] = 1/K  sum over the K KV heads  scorer's score[g][t]
///
/// For engines whose KV heads must hold the same tokens. Needs and window are those of the scorer; one whose
/// scores are the layer's already, or reach over layers, does not compile. Ranks of equally many KV heads may
/// add their means. Ours, but with ChunkKV that of kvpress: docs/method.md 3.17.
///
/// Throws as the scorer, and where KV heads differ in length. Cost: that of the scorer; a float a row and KV
/// head.
template <Scorer S>
class HeadMean {
 public:
  static_assert(S::granularity == Granularity::kv_head,
                "this scorer gives all KV heads of a layer one row of scores already: leave HeadMean out");
  static_assert(
      S::reach == Reach::own_layer,
      "the scores of this scorer travel from layer to layer: HeadMean takes one that looks at its own "
      "layer alone");
  static constexpr Granularity granularity = Granularity::layer;
  static constexpr Needs needs = S::needs;
  static constexpr Reach reach = Reach::own_layer;

  explicit HeadMean(S scorer) : scorer_(std::move(scorer)) {}

  std::size_t window() const { return scorer_.window(); }
  const S& scorer() const { return scorer_; }
  void validate(const ModelShape& shape) const { scorer_.validate(shape); }

  template <class Kv, class O, class X>
  void score(const kernel::LayerInput<Kv, O>& in, Workspace& workspace, X& executor,
             const Scores<granularity>& scores) const {
    const std::size_t heads = in.shape.kv_heads;
    const std::span<float> mean = scores.row(0);
    const std::span<std::size_t> ends = workspace.take_ends(2 * heads);
    const std::span<std::size_t> windows = ends.subspan(heads);
    for (std::size_t head = 0; head < heads; ++head) {
      ends[head] = (head + 1) * mean.size();
      windows[head] = scores.window();
    }
    const Scores<Granularity::kv_head> of_heads(
        workspace.take(Workspace::Slot::head_scores, heads * mean.size()), ends.first(heads), windows);
    scorer_.score(in, workspace, executor, of_heads);
    const detail::PlainFloats plain;
    for (std::size_t t = 0; t < mean.size(); ++t) {
      double sum = 0.0;
      for (std::size_t head = 0; head < heads; ++head) {
        sum += static_cast<double>(of_heads.values()[head * mean.size() + t]);
      }
      mean[t] = static_cast<float>(sum / static_cast<double>(heads));
    }
  }

 private:
  S scorer_;
};

}  // namespace compresskv::score

#include "compresskv/core/strict_float_end.hpp"
