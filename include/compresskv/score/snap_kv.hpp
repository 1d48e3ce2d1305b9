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
#include "compresskv/kernel/pooling.hpp"
#include "compresskv/kernel/window_attention.hpp"
#include "compresskv/score/scorer.hpp"

namespace compresskv::score {

/// SnapKV: every KV head keeps what its own query heads look at.
///
///     score[g][t] = 1/G  sum over the G heads of group g  pool_t ( sum over window rows  softmax(q K^T)[t] )
///
/// Groups are of consecutive heads; the comparison code that the CompressKV authors released averages over
/// others. Paper: Li et al., NeurIPS 2024 (arXiv 2404.14469); docs/method.md 3.3. PyramidKV is SnapKV with
/// `budget::Pyramid`. Cost: all keys are read once for as many heads as fit; `2 * H * window * S * head_dim`
/// flops.
class SnapKv {
 public:
  static constexpr Granularity granularity = Granularity::kv_head;
  static constexpr Needs needs = Needs::window_attention;
  static constexpr Reach reach = Reach::own_layer;

  struct Options {
    std::size_t window = 8;
    kernel::Pool pool = kernel::Pool::average;
    std::size_t pool_width = 5;  ///< odd
  };

  SnapKv() = default;
  /// Throws ArgumentError for no window or an even pooling width.
  explicit SnapKv(const Options& options) : options_(options) {
    detail::require(options.window > 0, "window is 0: at least the last query must observe");
    kernel::check_pool_width(options.pool_width);
  }

  std::size_t window() const { return options_.window; }
  void validate(const ModelShape&) const {}

  template <class Kv, class O, class X>
  void score(const kernel::LayerInput<Kv, O>& in, Workspace& workspace, X& executor,
             const Scores<granularity>& scores) const {
    std::fill(scores.values().begin(), scores.values().end(), 0.0F);
    kernel::attention_sums_of_all_heads(
        in, in.window, workspace, executor, [&](std::uint32_t head, std::span<const float> sums) {
          kernel::add_pooled(sums, options_.pool, options_.pool_width, scores.row(head / in.shape.group()));
        });
    kernel::divide(scores.values(), in.shape.group());
  }

 private:
  Options options_;
};

static_assert(Scorer<SnapKv>);

}  // namespace compresskv::score

#include "compresskv/core/strict_float_end.hpp"
