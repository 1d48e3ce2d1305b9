#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

#include "compresskv/core/policy.hpp"
#include "compresskv/core/scores.hpp"
#include "compresskv/core/strict_float_begin.hpp"
#include "compresskv/kernel/pooling.hpp"
#include "compresskv/kernel/window_attention.hpp"
#include "compresskv/score/scorer.hpp"
#include "compresskv/score/window_scorer.hpp"

namespace compresskv::score {

/// SnapKV: every KV head keeps what its own query heads look at.
///
///     score[g][t] = 1/G  sum over the G heads of group g  pool_t ( sum over window rows  softmax(q K^T)[t] )
///
/// Groups are of consecutive heads; the comparison code that the CompressKV authors released averages over
/// others. Paper: Li et al., NeurIPS 2024 (arXiv 2404.14469); docs/method.md 3.3. PyramidKV is SnapKV with
/// `budget::Pyramid`. Cost: all keys are read once for as many heads as fit; `2 * H * window * S * head_dim`
/// flops.
class SnapKv : public WindowScorer<Granularity::kv_head, Needs::window_attention, PooledWindow> {
 public:
  using WindowScorer::WindowScorer;

  template <class Kv, class O, class X>
  void score(const kernel::LayerInput<Kv, O>& in, Workspace& workspace, X& executor,
             const Scores<granularity>& scores) const {
    std::fill(scores.values().begin(), scores.values().end(), 0.0F);
    kernel::attention_sums_of_all_heads(
        in, in.window, workspace, executor, [&](std::uint32_t head, std::span<const float> sums) {
          kernel::add_pooled(sums, options().pool, options().pool_width, scores.row(head / in.shape.group()));
        });
    kernel::divide(scores.values(), in.shape.group());
  }
};

}  // namespace compresskv::score

#include "compresskv/core/strict_float_end.hpp"
