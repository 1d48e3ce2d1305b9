#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <utility>
#include <vector>

#include "compresskv/core/error.hpp"
#include "compresskv/core/float_bits.hpp"
#include "compresskv/core/policy.hpp"
#include "compresskv/core/scores.hpp"
#include "compresskv/core/shape.hpp"
#include "compresskv/core/strict_float_begin.hpp"
#include "compresskv/kernel/pooling.hpp"
#include "compresskv/kernel/softmax.hpp"
#include "compresskv/kernel/window_attention.hpp"
#include "compresskv/score/window_scorer.hpp"

namespace compresskv::score {

/// Heads of each layer with a weight each: what `Carried` and `ModelWide` are, beside the choice of heads.
///
///     score[t] = sum over the layer's heads h  weight[h] * pool_t ( sum over window rows  softmax(q_h
///     K^T)[t] )
class WeightedRetrieval {
 public:
  static constexpr Granularity granularity = Granularity::layer;
  static constexpr Needs needs = Needs::window_attention;

  struct Head {
    std::uint32_t head = 0;
    double weight = 0.0;
  };
  using Heads = std::vector<std::vector<Head>>;  // [layer]

  /// Throws ArgumentError for no window, an even pooling width or a weight beyond float32.
  WeightedRetrieval(Heads layers, std::size_t query_heads, const PooledWindow& window)
      : query_heads_(query_heads), window_(window) {
    check_window<needs>(window);
    constexpr double limit = (std::numeric_limits<float>::max)();
    for (auto& layer : layers) {
      // The order of adding is by head, so that equal sets give equal scores however they are ranked.
      std::sort(layer.begin(), layer.end(), [](const Head& a, const Head& b) { return a.head < b.head; });
      heads_.emplace_back();
      weights_.emplace_back();
      for (const Head& head : layer) {
        heads_.back().push_back(head.head);
        detail::require(detail::is_finite(head.weight) && -limit <= head.weight && head.weight <= limit,
                        "weight of layer ", heads_.size() - 1, " head ", head.head, " is ", head.weight,
                        ", must be at most ", limit, ": divide all head scores by one number");
        weights_.back().push_back(static_cast<float>(head.weight));
      }
    }
  }

  std::size_t window() const { return window_.window; }
  std::span<const std::uint32_t> heads(std::size_t layer) const { return heads_[layer]; }
  std::span<const float> weights(std::size_t layer) const { return weights_[layer]; }

  void validate(const ModelShape& shape) const {
    detail::require(heads_.size() == shape.layers && query_heads_ == shape.query_heads, "head scores are of ",
                    heads_.size(), " layers of ", query_heads_, " heads, the model has ", shape.layers,
                    " of ", shape.query_heads, ": use the scores calibrated for this model");
  }

  template <class Kv, class O, class X>
  void score(const kernel::LayerInput<Kv, O>& in, Workspace& workspace, X& executor,
             const Scores<granularity>& scores) const {
    const std::span<float> sums = scores.row(0);
    std::fill(sums.begin(), sums.end(), 0.0F);
    const std::span<const std::uint32_t> scoring = heads(in.layer);
    kernel::window_attention(
        in, scoring, workspace, executor, [&](std::uint32_t head, std::span<const float> attention) {
          const std::span<float> pooled = workspace.take(Workspace::Slot::pooled, attention.size());
          std::fill(pooled.begin(), pooled.end(), 0.0F);
          kernel::add_pooled(attention, window_.pool, window_.pool_width, pooled);
          const auto at = std::lower_bound(scoring.begin(), scoring.end(), head) - scoring.begin();
          kernel::add_scaled(pooled.data(), weights_[in.layer][static_cast<std::size_t>(at)], pooled.size(),
                             sums.data());
        });
  }

 private:
  std::vector<std::vector<std::uint32_t>> heads_;  // [layer], ascending
  std::vector<std::vector<float>> weights_;        // [layer], of these heads
  std::size_t query_heads_;
  PooledWindow window_;
};

}  // namespace compresskv::score

#include "compresskv/core/strict_float_end.hpp"
