#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

#include "compresskv/core/policy.hpp"
#include "compresskv/core/scores.hpp"
#include "compresskv/core/strict_float_begin.hpp"
#include "compresskv/kernel/softmax.hpp"
#include "compresskv/kernel/window_attention.hpp"
#include "compresskv/score/scorer.hpp"
#include "compresskv/score/window_scorer.hpp"

namespace compresskv::score {

/// H2O: tokens that have drawn the most attention so far.
///
///     score[g][t] = 1/G  sum over the G heads of group g, over all queries seen  softmax(q K^T)[t]
///
/// Sums are not divided by how many queries could see a token, so that early tokens count for more, as in the
/// paper. Wants every query of the prompt; after a compaction, those of the tokens since. Paper: Zhang et
/// al., NeurIPS 2023 (arXiv 2306.14048); docs/method.md 3.5. Cost: that of attention itself, quadratic in
/// the prompt; hand over `AttentionSums` where the engine can add them up itself.
class H2O : public WindowScorer<Granularity::kv_head, Needs::all_queries> {
 public:
  using WindowScorer::WindowScorer;

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
};

}  // namespace compresskv::score

#include "compresskv/core/strict_float_end.hpp"
