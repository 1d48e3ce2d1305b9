#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

#include "compresskv/core/error.hpp"
#include "compresskv/core/policy.hpp"
#include "compresskv/core/scores.hpp"
#include "compresskv/core/shape.hpp"
#include "compresskv/core/strict_float_begin.hpp"
#include "compresskv/kernel/softmax.hpp"
#include "compresskv/kernel/window_attention.hpp"
#include "compresskv/score/scorer.hpp"

namespace compresskv::score {

/// H2O: tokens that have drawn the most attention so far.
///
///     score[g][t] = 1/G  sum over the G heads of group g, over all queries seen  softmax(q K^T)[t]
///
/// Sums are not divided by how many queries could see a token, so that early tokens count for more, as in the
/// paper. Wants every query of the prompt; after a compaction, those of the tokens since. Paper: Zhang et
/// al., NeurIPS 2023 (arXiv 2306.14048); docs/method.md 3.5. Cost: that of attention itself, quadratic in
/// the prompt; hand over `AttentionSums` where the engine can add them up itself.
class H2O {
 public:
  static constexpr Granularity granularity = Granularity::kv_head;
  static constexpr Needs needs = Needs::all_queries;
  static constexpr Reach reach = Reach::own_layer;

  struct Options {
    std::size_t window = 8;  ///< most recent tokens, kept whatever their scores
  };

  H2O() = default;
  /// Throws ArgumentError for no window.
  explicit H2O(const Options& options) : options_(options) {
    detail::require(options.window > 0, "window is 0: at least the last token must stay");
  }

  std::size_t window() const { return options_.window; }
  void validate(const ModelShape&) const {}

  template <class Kv, class O, class X>
  void score(const kernel::LayerInput<Kv, O>& in, Workspace& workspace, X& executor,
             const Scores<granularity>& scores) const {
    std::fill(scores.values().begin(), scores.values().end(), 0.0F);
    kernel::attention_sums_of_all_heads(in, in.observation.queries(), workspace, executor,
                                        [&](std::uint32_t head, std::span<const float> sums) {
                                          kernel::add_scaled(
                                              sums.data(), 1.0F / static_cast<float>(in.shape.group()),
                                              sums.size(), scores.row(head / in.shape.group()).data());
                                        });
  }

 private:
  Options options_;
};

static_assert(Scorer<H2O>);

}  // namespace compresskv::score

#include "compresskv/core/strict_float_end.hpp"
