#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

#include "compresskv/core/policy.hpp"
#include "compresskv/core/scores.hpp"
#include "compresskv/core/shape.hpp"
#include "compresskv/core/strict_float_begin.hpp"
#include "compresskv/kernel/softmax.hpp"
#include "compresskv/kernel/window_attention.hpp"
#include "compresskv/score/scorer.hpp"

namespace compresskv::score {

/// TOVA: what the last query looks at, all heads together.
///
///     score[t] = 1/H  sum over all heads  softmax(q_last K^T)[t]
///
/// Of recent tokens only the last is kept whatever its score. Paper: Oren et al., EMNLP 2024 (arXiv
/// 2401.06104); docs/method.md 3.6. Cost: all keys are read once; `2 * H * S * head_dim` flops.
class Tova {
 public:
  static constexpr Granularity granularity = Granularity::layer;
  static constexpr Needs needs = Needs::window_attention;
  static constexpr Reach reach = Reach::own_layer;

  std::size_t window() const { return 1; }
  void validate(const ModelShape&) const {}

  template <class Kv, class O, class X>
  void score(const kernel::LayerInput<Kv, O>& in, Workspace& workspace, X& executor,
             const Scores<granularity>& scores) const {
    const std::span<float> mean = scores.row(0);
    std::fill(mean.begin(), mean.end(), 0.0F);
    kernel::attention_sums_of_all_heads(
        in, in.window, workspace, executor, [&](std::uint32_t, std::span<const float> weights) {
          kernel::add_scaled(weights.data(), 1.0F / static_cast<float>(in.shape.query_heads), weights.size(),
                             mean.data());
        });
  }
};

}  // namespace compresskv::score

#include "compresskv/core/strict_float_end.hpp"
