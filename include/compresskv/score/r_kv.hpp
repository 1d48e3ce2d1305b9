#pragma once

#include <algorithm>
#include <cstddef>
#include <span>

#include "compresskv/core/error.hpp"
#include "compresskv/core/float_bits.hpp"
#include "compresskv/core/float_mode.hpp"
#include "compresskv/core/policy.hpp"
#include "compresskv/core/scores.hpp"
#include "compresskv/core/strict_float_begin.hpp"
#include "compresskv/kernel/group_attention.hpp"
#include "compresskv/kernel/head_groups.hpp"
#include "compresskv/kernel/key_similarity.hpp"
#include "compresskv/kernel/pooling.hpp"
#include "compresskv/kernel/softmax.hpp"
#include "compresskv/score/scorer.hpp"
#include "compresskv/score/window_scorer.hpp"

namespace compresskv::score {

/// Options of `RKv`.
struct RKvOptions {
  float lambda = 0.07F;    ///< weight of attention; the rest, to 1, is that of redundancy
  float threshold = 0.5F;  ///< keys with a larger cosine are alike
  std::size_t window = 8;
  kernel::Pool pool = kernel::Pool::max;
  std::size_t pool_width = 7;  ///< odd
};

/// R-KV: what the window looks at, less what the keys say more than once. For long generations, compressed
/// again every hundred tokens or so.
///
///     score[g][t] = lambda * pool_t ( 1/w  sum over window rows  softmax( largest logit of group g )[t] )
///                 - (1 - lambda) * softmax( mean of column t of C )
///     C[i][j]     = cos( key i, key j ); 0 for j = i, and for the latest j of row i above the threshold
///
/// The first softmax is over the evictable rows, the second over all of them, as in the authors' code. Each
/// key forgives its latest like: of keys that are alike the latest has the lowest redundancy, and stays.
///
/// Differs from the authors' code: where a row of C has nothing above the threshold nothing of it is set to
/// 0; there it is the entry of the first token, whatever it is. Equal scores: the lower position wins. Paper:
/// Cai et al., NeurIPS 2025 (arXiv 2505.24133); docs/method.md 3.22.
///
/// Needs queries: attention no longer shows logits. Throws ScoreError where keys or queries are not finite.
/// Cost: that of SnapKv, and up to `2 * S^2 * head_dim` flops a KV head: right for caches that are held at
/// some thousand rows, much for a prompt of 100,000. S x S cosines are never held: 3 floats a row.
class RKv : public WindowScorer<Granularity::kv_head, Needs::window_queries, RKvOptions> {
 public:
  RKv() = default;
  /// Throws ArgumentError for no window, an even pooling width, a lambda not in [0, 1] or a threshold not in
  /// [0, 1).
  explicit RKv(const Options& options) : WindowScorer(options) {
    detail::require(detail::is_finite(options.lambda) && options.lambda >= 0.0F && options.lambda <= 1.0F,
                    "lambda is ", options.lambda,
                    ", must be from 0 (redundancy alone) to 1 (attention alone)");
    detail::require(
        detail::is_finite(options.threshold) && options.threshold >= 0.0F && options.threshold < 1.0F,
        "threshold is ", options.threshold, ", must be a cosine from 0 to below 1");
  }

  template <class Kv, class O, class X>
  void score(const kernel::LayerInput<Kv, O>& in, Workspace& workspace, X& executor,
             const Scores<granularity>& scores) const {
    const detail::PlainFloats plain;
    std::fill(scores.values().begin(), scores.values().end(), 0.0F);
    for (std::size_t kv_head = 0; kv_head < in.shape.kv_heads; ++kv_head) {
      const std::span<float> row = scores.row(kv_head);
      if (row.empty()) {
        continue;
      }
      const std::span<float> attention = workspace.take(Workspace::Slot::sums, row.size());
      const std::size_t spare =
          kernel::detail::spare_floats(in.shape, kv_row_bytes(in.kv), in.rows[kv_head], 0, in.held_bytes);
      const std::size_t left = spare - (std::min)(spare, row.size());
      kernel::group_attention(in, kv_head, left, workspace, executor, attention);
      kernel::add_pooled(attention, options().pool, options().pool_width, row);
      const std::span<float> redundancy = kernel::mean_similarities(
          in, kv_head, static_cast<double>(options().threshold), left, workspace, executor);
      for (float& mean : redundancy) {
        mean *= kernel::log2_e;
      }
      const float sum = kernel::exp2_row(redundancy.data(), redundancy.size()).sum;
      for (std::size_t t = 0; t < row.size(); ++t) {
        row[t] = options().lambda * row[t] - (1.0F - options().lambda) * (redundancy[t] / sum);
      }
    }
  }
};

}  // namespace compresskv::score

#include "compresskv/core/strict_float_end.hpp"
