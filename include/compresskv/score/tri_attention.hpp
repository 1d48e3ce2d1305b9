#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <span>
#include <utility>

#include "compresskv/core/error.hpp"
#include "compresskv/core/float_bits.hpp"
#include "compresskv/core/float_mode.hpp"
#include "compresskv/core/narrowed.hpp"
#include "compresskv/core/policy.hpp"
#include "compresskv/core/query_statistics.hpp"
#include "compresskv/core/scores.hpp"
#include "compresskv/core/strict_float_begin.hpp"
#include "compresskv/kernel/key_rows.hpp"
#include "compresskv/kernel/turns.hpp"
#include "compresskv/score/scorer.hpp"
#include "compresskv/score/window_scorer.hpp"

namespace compresskv::score {

struct TriAttentionOptions {
  std::size_t window = 8;      ///< most recent tokens, kept whatever their scores
  std::size_t distances = 17;  ///< of 1, 2, 4, ...: how far ahead queries are looked for; 17 end at 2^16
  bool normalise = false;      ///< each head's scores to mean 0 and deviation 1, before the largest is taken
};

/// TriAttention: what the mean query looks at, at distances that double, for long generations.
///
///     s[h][t]     = mean over D of  ( R(now + D) mean[h] ) . key[g][t]
///                   + sum over pairs f  ( E |q[h][f]| - |E q[h][f]| ) |key[g][t][f]|        D = 1, 2, 4, ...
///                   2^16
///     score[g][t] = largest s[h][t] of the G heads h of group g
///
/// In the paper the first term is a sum of cosines of distances over the keys before rotation. The cached key
/// has its rotation, so that it is a dot product with one vector a head: no key is turned back. `now` is the
/// position of the token that comes next. Elements that do not rotate count in the dot product.
///
/// Looks at no query. The authors cut every 128 generated tokens to 2,048 and keep the prompt: `begin_turn`
/// and `Protection::keep_first`. Paper: Mao et al. (arXiv 2604.04921); docs/method.md 3.21. Departure: the
/// window stays besides. Cost: keys are read once for each query head.
class TriAttention : public WindowScorer<Granularity::kv_head, Needs::keys, TriAttentionOptions> {
 public:
  /// Throws ArgumentError for no window, or distances that are none or beyond 2^40.
  explicit TriAttention(QueryStatistics statistics, const Options& options = {})
      : WindowScorer(options), statistics_(std::move(statistics)) {
    detail::require(options.distances > 0 && options.distances <= 41, "distances is ", options.distances,
                    ", must be 1 to 41: so many powers of two from 1 on");
  }

  void validate(const ModelShape& shape) const {
    statistics_.validate(shape.layers, shape.query_heads, shape.head_dim);
  }

  template <class Kv, class O, class X>
  void score(const kernel::LayerInput<Kv, O>& in, Workspace& workspace, X& executor,
             const Scores<granularity>& scores) const {
    const std::size_t own = 3 * in.shape.head_dim;
    const std::size_t longest = *std::max_element(in.rows.begin(), in.rows.end());
    const std::span<float> buffers = workspace.take(Workspace::Slot::key_rows, in.shape.kv_heads * own);
    const std::span<float> sums = workspace.take(Workspace::Slot::logits, in.shape.kv_heads * longest);
    executor.parallel_for(in.shape.kv_heads, [&](std::size_t kv_head) {
      const detail::PlainFloats plain;
      const std::span<float> row = scores.row(kv_head);
      for (std::size_t i = 0; i < in.shape.group(); ++i) {
        const std::span<float> of_head = i == 0 ? row : sums.subspan(kv_head * longest, row.size());
        score_by(in, kv_head, statistics_.head(in.layer, kv_head * in.shape.group() + i),
                 buffers.subspan(kv_head * own, own), of_head);
        if (options().normalise) {
          normalise(of_head);
        }
        for (std::size_t t = 0; i > 0 && t < row.size(); ++t) {
          row[t] = (std::max)(row[t], of_head[t]);
        }
      }
    });
  }

 private:
  /// Scores of one query head.
  template <class Kv, class O>
  void score_by(const kernel::LayerInput<Kv, O>& in, std::size_t kv_head, const QueryStatistics::Head& query,
                std::span<float> buffer, std::span<float> out) const {
    const std::size_t head_dim = in.shape.head_dim;
    const Rotary& rotary = statistics_.rotary();
    const std::span<float> ahead = buffer.subspan(head_dim, head_dim);
    const std::span<float> spread = buffer.subspan(2 * head_dim, statistics_.pairs());
    std::copy(query.mean.begin(), query.mean.end(), ahead.begin());
    for (std::size_t j = 0; j < spread.size(); ++j) {
      const double of_mean = length(ahead[rotary.first(j)], ahead[rotary.second(j, head_dim)]);
      spread[j] = (std::max)(0.0F, static_cast<float>(static_cast<double>(query.modulus[j]) - of_mean));
    }
    const auto now = static_cast<double>(in.retained.position(in.rows[kv_head], kv_head));
    kernel::turn_pairs(rotary, ahead,
                       [&](std::size_t j) { return look_ahead(rotary.step(j, head_dim), now); });
    kernel::for_each_key(in.kv, kv_head, buffer.data(), [&](std::size_t t, const float* key) {
      if (t < out.size()) {
        double sum = kernel::product_of_rows(ahead.data(), key, head_dim);
        for (std::size_t j = 0; j < spread.size(); ++j) {
          sum +=
              static_cast<double>(spread[j]) * length(key[rotary.first(j)], key[rotary.second(j, head_dim)]);
        }
        out[t] = as_score(sum);
      }
    });
  }

  /// Mean rotation to `now + D` over the distances.
  kernel::Turn look_ahead(double step, double now) const {
    kernel::Turn mean{0.0, 0.0};
    double distance = 1.0;
    for (std::size_t i = 0; i < options().distances; ++i, distance *= 2.0) {
      const kernel::Turn turn = kernel::turn_by(step * (now + distance));
      mean.cosine += turn.cosine / static_cast<double>(options().distances);
      mean.sine += turn.sine / static_cast<double>(options().distances);
    }
    return mean;
  }

  static double length(float x, float y) {
    return std::sqrt(static_cast<double>(x) * static_cast<double>(x) +
                     static_cast<double>(y) * static_cast<double>(y));
  }

  /// Scores that are not finite stay so, and count for nothing.
  static void normalise(std::span<float> scores) {
    const auto count = static_cast<double>(scores.size());
    double mean = 0.0;
    for (const float& score : scores) {
      mean += detail::is_finite(score) ? static_cast<double>(score) / count : 0.0;
    }
    double square = 0.0;
    for (const float& score : scores) {
      const double apart = detail::is_finite(score) ? static_cast<double>(score) - mean : 0.0;
      square += apart * apart / count;
    }
    const double deviation = std::sqrt(square);
    for (float& score : scores) {
      if (detail::is_finite(score)) {
        score = as_score(deviation > 0.0 ? (static_cast<double>(score) - mean) / deviation : 0.0);
      }
    }
  }

  /// Finite where the key is.
  static float as_score(const double& sum) {
    return detail::narrowed<float>(sum, (std::numeric_limits<float>::max)() / 4);
  }

  QueryStatistics statistics_;
};

}  // namespace compresskv::score

#include "compresskv/core/strict_float_end.hpp"
