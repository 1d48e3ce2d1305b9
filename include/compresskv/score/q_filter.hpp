#pragma once

#include <algorithm>
#include <cstddef>
#include <limits>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "compresskv/core/error.hpp"
#include "compresskv/core/float_bits.hpp"
#include "compresskv/core/float_mode.hpp"
#include "compresskv/core/narrowed.hpp"
#include "compresskv/core/policy.hpp"
#include "compresskv/core/query_statistics.hpp"
#include "compresskv/core/scores.hpp"
#include "compresskv/core/strict_float_begin.hpp"
#include "compresskv/kernel/key_rows.hpp"
#include "compresskv/kernel/query_direction.hpp"
#include "compresskv/score/scorer.hpp"
#include "compresskv/score/window_scorer.hpp"

namespace compresskv::score {

struct QFilterOptions {
  std::size_t window = 8;        ///< most recent tokens, kept whatever their scores
  std::size_t positions = 2048;  ///< from 0 on, over which rotated queries are averaged
};

/// Q-Filter: keys that point where the queries do draw the attention.
///
///     u[h]        = main eigenvector of E q q^T over rotated queries q of head h, turned so that u . E q >=
///     0 score[g][t] = ( mean over the G heads h of group g  u[h] ) . key[g][t]
///
/// Both are rotated, as in the paper: its filters are made of queries after rotary embedding and meet the
/// keys that the cache holds. Here E q q^T comes from the statistics before rotation, averaged over
/// `positions` (those of the paper's calibration texts), as if queries were alike at all of them. Looks at no
/// query.
///
/// Paper: Godey et al. (arXiv 2503.02812); docs/method.md 3.20. Departures: the above; the direction's sign
/// is that of the mean query, the authors' code takes that of most queries. Cost: all keys are read once;
/// making it takes head_dim^2 steps of the power method a head.
class QFilter : public WindowScorer<Granularity::kv_head, Needs::keys, QFilterOptions> {
 public:
  /// Throws ArgumentError for no window or no position.
  explicit QFilter(QueryStatistics statistics, const Options& options = {})
      : WindowScorer(options), statistics_(std::move(statistics)) {
    detail::require(options.positions > 0, "positions is 0: average over at least one position");
    const detail::PlainFloats plain;
    const kernel::MeanRotation rotation(statistics_.rotary(), statistics_.head_dim(), options.positions);
    auto directions = std::make_shared<std::vector<float>>();
    for (std::size_t layer = 0; layer < statistics_.layers(); ++layer) {
      for (std::size_t h = 0; h < statistics_.query_heads(); ++h) {
        add_direction(rotation, statistics_.head(layer, h), *directions);
      }
    }
    directions_ = std::move(directions);
  }

  void validate(const ModelShape& shape) const {
    statistics_.validate(shape.layers, shape.query_heads, shape.head_dim);
  }

  /// The main direction of a query head's rotated queries, of length 1.
  std::span<const float> direction(std::size_t layer, std::size_t query_head) const {
    const std::size_t head_dim = statistics_.head_dim();
    return std::span(*directions_)
        .subspan((layer * statistics_.query_heads() + query_head) * head_dim, head_dim);
  }

  template <class Kv, class O, class X>
  void score(const kernel::LayerInput<Kv, O>& in, Workspace& workspace, X& executor,
             const Scores<granularity>& scores) const {
    const std::size_t head_dim = in.shape.head_dim;
    const std::size_t group = in.shape.group();
    // A key, and the group's mean direction.
    const std::span<float> buffers =
        workspace.take(Workspace::Slot::key_rows, 2 * in.shape.kv_heads * head_dim);
    executor.parallel_for(in.shape.kv_heads, [&](std::size_t kv_head) {
      const detail::PlainFloats plain;
      const std::span<float> row = scores.row(kv_head);
      const std::span<float> buffer = buffers.subspan(2 * kv_head * head_dim, head_dim);
      const std::span<float> filter = buffers.subspan((2 * kv_head + 1) * head_dim, head_dim);
      std::fill(filter.begin(), filter.end(), 0.0F);
      for (std::size_t i = 0; i < group; ++i) {
        const std::span<const float> of_head = direction(in.layer, kv_head * group + i);
        for (std::size_t e = 0; e < head_dim; ++e) {
          filter[e] += of_head[e] / static_cast<float>(group);
        }
      }
      kernel::for_each_key(in.kv, kv_head, buffer.data(), [&](std::size_t t, const float* key) {
        if (t < row.size()) {
          row[t] = detail::narrowed<float>(kernel::product_of_rows(filter.data(), key, head_dim));
        }
      });
    });
  }

 private:
  static void add_direction(const kernel::MeanRotation& rotation, const QueryStatistics::Head& head,
                            std::vector<float>& directions) {
    const std::vector<double> main = kernel::main_direction(rotation.second_moment(head), head.mean.size());
    const std::vector<double> mean = rotation.mean(head);
    double along = 0.0;
    for (std::size_t e = 0; e < main.size(); ++e) {
      along += main[e] * mean[e];
    }
    for (const double element : main) {
      directions.push_back(static_cast<float>(along < 0.0 ? -element : element));
    }
  }

  QueryStatistics statistics_;
  std::shared_ptr<const std::vector<float>> directions_;  // [layer][query head][element]
};

}  // namespace compresskv::score

#include "compresskv/core/strict_float_end.hpp"
