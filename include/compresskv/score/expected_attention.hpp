#pragma once

#include <algorithm>
#include <cstddef>
#include <limits>
#include <span>
#include <utility>

#include "compresskv/core/default_scale.hpp"
#include "compresskv/core/error.hpp"
#include "compresskv/core/float_bits.hpp"
#include "compresskv/core/float_mode.hpp"
#include "compresskv/core/narrowed.hpp"
#include "compresskv/core/policy.hpp"
#include "compresskv/core/query_statistics.hpp"
#include "compresskv/core/scores.hpp"
#include "compresskv/core/strict_float_begin.hpp"
#include "compresskv/kernel/expected_logits.hpp"
#include "compresskv/kernel/key_rows.hpp"
#include "compresskv/kernel/softmax.hpp"
#include "compresskv/kernel/turns.hpp"
#include "compresskv/kernel/value_norms.hpp"
#include "compresskv/score/scorer.hpp"
#include "compresskv/score/window_scorer.hpp"

namespace compresskv::score {

struct ExpectedAttentionOptions {
  std::size_t window = 8;    ///< most recent tokens, kept whatever their scores
  std::size_t sinks = 4;     ///< first positions, kept before any other
  std::size_t future = 512;  ///< positions over which the queries to come are averaged
  double epsilon = 0.0;      ///< what every weight is raised by: 0.01 where KV heads share rows by need
  float scale = 0.0F;        ///< of the logits; 0: 1 / sqrt(head_dim)
};

/// Expected attention: what queries to come will look at, by how the model's queries are spread.
///
///     z[h][t]     = scale mean[h] . R^T key[g][t]  +  scale^2 / 2  (R^T key[g][t])^T covariance[h] (R^T
///     key[g][t]) score[g][t] = ( mean over the G heads h of group g  softmax_t(z[h])[t]  +  epsilon ) ||
///     value[g][t] ||
///
/// Cached keys are rotated, so `R` is the mean rotation of the positions to come, `next_position` on. It is
/// the key that is turned, not the statistics: once for each head, and nothing of their size is held.
///
/// Looks at no query: no question is asked for. Paper: Devoto et al. (arXiv 2510.00636); docs/method.md 3.19.
/// Departures: statistics are those of a calibration, not the prompt's own; the window stays besides. A logit
/// soft cap of the model is not applied. Cost: head_dim^2 / 2 multiply-adds for each key and query head.
class ExpectedAttention
    : public WindowScorer<Granularity::kv_head, Needs::keys_and_values, ExpectedAttentionOptions> {
 public:
  /// Throws ArgumentError for no window, no future position, or an epsilon or scale that is no number from 0.
  explicit ExpectedAttention(QueryStatistics statistics, const Options& options = {})
      : WindowScorer(options), statistics_(std::move(statistics)) {
    detail::require(options.future > 0, "future is 0: average over at least one position");
    detail::require(detail::is_finite(options.epsilon) && options.epsilon >= 0.0, "epsilon is ",
                    options.epsilon, ", must be finite and not below 0");
    detail::require(detail::is_finite(options.scale) && options.scale >= 0.0F, "scale is ", options.scale,
                    ", must be finite and above 0 (0 stands for 1 / sqrt(head_dim))");
  }

  void validate(const ModelShape& shape) const {
    statistics_.validate(shape.layers, shape.query_heads, shape.head_dim);
  }

  template <class Kv, class O, class X>
  void score(const kernel::LayerInput<Kv, O>& in, Workspace& workspace, X& executor,
             const Scores<granularity>& scores) const {
    const std::size_t own = (kernel::keys_per_tile + 2) * in.shape.head_dim;
    const std::size_t longest = *std::max_element(in.rows.begin(), in.rows.end());
    const std::span<float> buffers = workspace.take(Workspace::Slot::key_rows, in.shape.kv_heads * own);
    const std::span<float> logits = workspace.take(Workspace::Slot::logits, in.shape.kv_heads * longest);
    executor.parallel_for(in.shape.kv_heads, [&](std::size_t kv_head) {
      const detail::PlainFloats plain;
      score_head(in, kv_head, buffers.subspan(kv_head * own, own),
                 logits.subspan(kv_head * longest, in.rows[kv_head]), scores.row(kv_head));
    });
  }

 private:
  template <class Kv, class O>
  void score_head(const kernel::LayerInput<Kv, O>& in, std::size_t kv_head, std::span<float> buffer,
                  std::span<float> logits, std::span<float> row) const {
    const std::size_t rows = logits.size();
    const std::size_t first = (std::min)(in.retained.rows_before(options().sinks, kv_head), rows);
    const std::span<float> turns = buffer.last(in.shape.head_dim);
    look_ahead(in.retained.position(rows, kv_head), turns);
    std::fill(row.begin(), row.end(), 0.0F);
    for (std::size_t i = 0; i < in.shape.group(); ++i) {
      const QueryStatistics::Head& query = statistics_.head(in.layer, kv_head * in.shape.group() + i);
      fill_logits(in, kv_head, query, first, buffer, logits, row);
      const kernel::Exp2Sum sum = kernel::exp2_row(logits.data() + first, rows - first);
      if (sum.sum > 0.0F) {
        const float share = 1.0F / (sum.sum * static_cast<float>(in.shape.group()));
        for (std::size_t t = first; t < row.size(); ++t) {
          row[t] += logits[t] * share;
        }
      }
    }
    kernel::value_norms(in.kv, kv_head, buffer.data(), [&](std::size_t t, double norm) {
      if (t < row.size()) {
        row[t] = t < first ? sink_score : weighed(row[t], norm);
      }
    });
  }

  /// Logits of one query head, times log2(e), from row `first` on. A key that is not finite has no weight,
  /// and makes its own score NaN; one of the window makes that of row `first`.
  template <class Kv, class O>
  void fill_logits(const kernel::LayerInput<Kv, O>& in, std::size_t kv_head,
                   const QueryStatistics::Head& query, std::size_t first, std::span<float> buffer,
                   std::span<float> logits, std::span<float> row) const {
    const std::size_t head_dim = in.shape.head_dim;
    const std::span<float> key = buffer.first(head_dim);
    float* const tile = buffer.data() + head_dim;
    const float* const turns = buffer.data() + buffer.size() - head_dim;
    const float scale = options().scale > 0.0F ? options().scale : detail::default_scale(head_dim);
    kernel::for_each_key(in.kv, kv_head, key.data(), [&](std::size_t t, const float*) {
      if (t < first) {
        return;
      }
      kernel::turn_pairs(statistics_.rotary(), key, [&](std::size_t j) {
        return kernel::Turn{static_cast<double>(turns[2 * j]), static_cast<double>(turns[2 * j + 1])}
            .transposed();
      });
      const std::size_t k = (t - first) % kernel::keys_per_tile;
      for (std::size_t e = 0; e < head_dim; ++e) {
        tile[e * kernel::keys_per_tile + k] = key[e];
      }
      if (k + 1 < kernel::keys_per_tile && t + 1 < logits.size()) {
        return;
      }
      kernel::Lanes found{};  // those beyond key k have no meaning
      kernel::expected_logits(query, tile, scale, found.data());
      for (std::size_t i = 0; i <= k; ++i) {
        const std::size_t at = t - k + i;
        const float logit = detail::is_finite(found[i])
                                ? found[i]
                                : kernel::wide_expected_logit(query, tile, i, static_cast<double>(scale));
        const bool finite = detail::is_finite(logit);
        logits[at] = finite ? logit * kernel::log2_e : detail::minus_infinity;
        if (!finite && first < row.size()) {
          row[at < row.size() ? at : first] = std::numeric_limits<float>::quiet_NaN();
        }
      }
    });
  }

  /// The mean rotation of the positions to come: cosine and sine of each pair.
  void look_ahead(std::size_t next_position, std::span<float> turns) const {
    for (std::size_t j = 0; j < statistics_.pairs(); ++j) {
      const kernel::Turn turn = kernel::mean_turn(statistics_.rotary().step(j, statistics_.head_dim()),
                                                  next_position, options().future);
      turns[2 * j] = static_cast<float>(turn.cosine);
      turns[2 * j + 1] = static_cast<float>(turn.sine);
    }
  }

  float weighed(const float& weight, const double& norm) const {
    return detail::narrowed<float>((static_cast<double>(weight) + options().epsilon) * norm,
                                   (std::numeric_limits<float>::max)() / 4);
  }

  /// Above every other score, below that of protected tokens.
  static constexpr float sink_score = (std::numeric_limits<float>::max)() / 2;

  QueryStatistics statistics_;
};

}  // namespace compresskv::score

#include "compresskv/core/strict_float_end.hpp"
