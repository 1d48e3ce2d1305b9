#pragma once

#include <algorithm>
#include <cstddef>
#include <span>

#include "compresskv/core/float_bits.hpp"
#include "compresskv/core/float_mode.hpp"
#include "compresskv/core/policy.hpp"
#include "compresskv/core/scores.hpp"
#include "compresskv/core/strict_float_begin.hpp"
#include "compresskv/kernel/key_rows.hpp"
#include "compresskv/score/scorer.hpp"
#include "compresskv/score/window_scorer.hpp"

namespace compresskv::score {

/// KeyDiff: keys that differ from the others stay.
///
///     mean[g] = mean over all rows of key / || key ||      score[g][t] = -cos( key[g][t], mean[g] )
///
/// Looks at no query. A key of length 0 counts as orthogonal. Paper: Park et al., NeurIPS 2025 (arXiv
/// 2504.15364); docs/method.md 3.8. Cost: all keys are read twice.
class KeyDiff : public WindowScorer<Granularity::kv_head, Needs::keys> {
 public:
  using WindowScorer::WindowScorer;

  template <class Kv, class O, class X>
  void score(const kernel::LayerInput<Kv, O>& in, Workspace& workspace, X& executor,
             const Scores<granularity>& scores) const {
    const std::size_t head_dim = in.shape.head_dim;
    // A key, and the mean of all.
    const std::span<float> buffers =
        workspace.take(Workspace::Slot::key_rows, 2 * in.shape.kv_heads * head_dim);
    executor.parallel_for(in.shape.kv_heads, [&](std::size_t kv_head) {
      const detail::PlainFloats plain;
      const std::span<float> row = scores.row(kv_head);
      const std::span<float> buffer = buffers.subspan(2 * kv_head * head_dim, head_dim);
      const std::span<float> mean = buffers.subspan((2 * kv_head + 1) * head_dim, head_dim);
      std::fill(mean.begin(), mean.end(), 0.0F);
      kernel::for_each_key(in.kv, kv_head, buffer.data(), [&](std::size_t t, const float* key) {
        // In float64: of a denormal key the inverse is beyond float32.
        const double norm = kernel::key_norm(key, head_dim);
        if (t < row.size() && !detail::is_finite(norm)) {
          return;  // so that its own score is the one that is not finite
        }
        const double inverse = inverse_of(norm);
        for (std::size_t e = 0; e < head_dim; ++e) {
          mean[e] += static_cast<float>(static_cast<double>(key[e]) * inverse);
        }
      });
      const double mean_inverse = inverse_of(kernel::key_norm(mean.data(), head_dim));
      kernel::for_each_key(in.kv, kv_head, buffer.data(), [&](std::size_t t, const float* key) {
        if (t < row.size()) {
          const double dot = kernel::product_of_rows(key, mean.data(), head_dim);
          row[t] = -static_cast<float>(dot * inverse_of(kernel::key_norm(key, head_dim)) * mean_inverse);
        }
      });
    });
  }

 private:
  static double inverse_of(double norm) { return norm == 0.0 ? 0.0 : 1.0 / norm; }
};

}  // namespace compresskv::score

#include "compresskv/core/strict_float_end.hpp"
