// What repeats of a context look at, in double, one loop after the other (docs/method.md, 3.18).
#pragma once

#include <algorithm>
#include <compresskv/core/stretch.hpp>
#include <cstddef>
#include <vector>

#include "reference/scores.hpp"

namespace compresskv::reference {

/// Largest attention that any query of a KV head's group gives each row of the stretch; 0 elsewhere. The
/// layer's rows are those of the context, `context` of them, and behind them those of the repeat; its
/// `queries` queries are the last of these. `position(row)` says where a row of the context stands.
/// The attention that query `i` of head `head` of the group gives a row counts `weigh(head, i, row)` times.
template <class Key, class Query, class Position, class Weigh>
std::vector<double> repeat_scores(Key&& key, Query&& query, Position&& position, std::size_t group,
                                  std::size_t context, std::size_t rows, std::size_t queries,
                                  std::size_t head_dim, double scale, const Stretch& stretch,
                                  std::size_t sinks, Weigh&& weigh) {
  std::vector<double> scores(context, 0.0);
  for (std::size_t head = 0; head < group; ++head) {
    for (std::size_t i = 0; i < queries; ++i) {
      std::vector<std::size_t> seen;
      std::vector<double> logits;
      for (std::size_t row = 0; row <= rows - queries + i; ++row) {
        const bool repeated = row < context && position(row) >= stretch.first && position(row) < stretch.last;
        const bool sink = row < context && position(row) < sinks && position(row) < stretch.first;
        if (row < context && !repeated && !sink) {
          continue;
        }
        double dot = 0.0;
        for (std::size_t dim = 0; dim < head_dim; ++dim) {
          dot += key(row, dim) * query(head, i, dim);
        }
        seen.push_back(row);
        logits.push_back(dot * scale);
      }
      const std::vector<double> weights = softmax(logits);
      for (std::size_t s = 0; s < seen.size(); ++s) {
        const std::size_t row = seen[s];
        if (row < context && position(row) >= stretch.first) {
          scores[row] = std::max(scores[row], weights[s] * weigh(head, i, row));
        }
      }
    }
  }
  return scores;
}

}  // namespace compresskv::reference
