#pragma once

#include <cstddef>
#include <span>

#include "compresskv/core/float_bits.hpp"
#include "compresskv/core/float_mode.hpp"
#include "compresskv/core/narrowed.hpp"
#include "compresskv/core/policy.hpp"
#include "compresskv/core/scores.hpp"
#include "compresskv/core/strict_float_begin.hpp"
#include "compresskv/kernel/key_rows.hpp"
#include "compresskv/score/scorer.hpp"
#include "compresskv/score/window_scorer.hpp"

namespace compresskv::score {

/// Knorm: keys of small length draw the attention.
///
///     score[g][t] = -|| key[g][t] ||
///
/// Looks at no query. A length beyond float32, of finite keys, counts as its largest number. Paper: Devoto et
/// al., EMNLP 2024 (arXiv 2406.11430); docs/method.md 3.7. Cost: all keys are read once.
class Knorm : public WindowScorer<Granularity::kv_head, Needs::keys> {
 public:
  using WindowScorer::WindowScorer;

  template <class Kv, class O, class X>
  void score(const kernel::LayerInput<Kv, O>& in, Workspace& workspace, X& executor,
             const Scores<granularity>& scores) const {
    const std::size_t head_dim = in.shape.head_dim;
    const std::span<float> buffers = workspace.take(Workspace::Slot::key_rows, in.shape.kv_heads * head_dim);
    executor.parallel_for(in.shape.kv_heads, [&](std::size_t kv_head) {
      const detail::PlainFloats plain;
      const std::span<float> row = scores.row(kv_head);
      kernel::for_each_key(in.kv, kv_head, buffers.data() + kv_head * head_dim,
                           [&](std::size_t t, const float* key) {
                             if (t < row.size()) {
                               row[t] = -detail::narrowed<float>(kernel::key_norm(key, head_dim));
                             }
                           });
    });
  }
};

}  // namespace compresskv::score

#include "compresskv/core/strict_float_end.hpp"
