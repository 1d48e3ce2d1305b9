#pragma once

#include <algorithm>
#include <cmath>
#include <compresskv/score/r_kv.hpp>
#include <cstddef>
#include <limits>
#include <vector>

#include "reference/methods.hpp"
#include "reference/scores.hpp"

namespace compresskv::reference {

/// Cosines of the keys of a KV head with one another, `[i][j]`, 0 on the diagonal.
template <class L>
std::vector<std::vector<double>> key_cosines(const L& layer, std::size_t head) {
  const std::size_t rows = layer.sizes.rows;
  std::vector<double> norms;
  for (std::size_t i = 0; i < rows; ++i) {
    norms.push_back(key_norm(layer, head, i));
  }
  std::vector<std::vector<double>> cosines(rows, std::vector<double>(rows, 0.0));
  for (std::size_t i = 0; i < rows; ++i) {
    for (std::size_t j = 0; j < rows; ++j) {
      for (std::size_t dim = 0; dim < layer.shape.head_dim; ++dim) {
        cosines[i][j] += layer.key(head, i, dim) * layer.key(head, j, dim);
      }
      cosines[i][j] = i == j || norms[i] * norms[j] == 0.0 ? 0.0 : cosines[i][j] / (norms[i] * norms[j]);
    }
  }
  return cosines;
}

/// Redundancy of R-KV (docs/method.md 3.22) with the whole matrix: softmax over all rows of a KV head.
template <class L>
std::vector<double> redundancy(const L& layer, std::size_t head, double threshold) {
  auto cosines = key_cosines(layer, head);
  const std::size_t rows = cosines.size();
  for (auto& row : cosines) {
    const auto latest = std::find_if(row.rbegin(), row.rend(), [&](double x) { return x > threshold; });
    if (latest != row.rend()) {
      *latest = 0.0;
    }
  }
  std::vector<double> means(rows, 0.0);
  for (const auto& row : cosines) {
    for (std::size_t j = 0; j < rows; ++j) {
      means[j] += row[j] / static_cast<double>(rows);
    }
  }
  return softmax(means);
}

/// What the group's largest logits look at, before pooling: [evictable row]. A query sees the last `sliding`
/// rows.
template <class L>
std::vector<double> group_attention(const L& layer, std::size_t kv_head, double soft_cap = 0.0,
                                    std::size_t sliding = std::numeric_limits<std::size_t>::max()) {
  const std::size_t evictable = layer.sizes.rows - layer.sizes.observed();
  std::vector<double> means(evictable, 0.0);
  for (std::size_t i = 0; i < layer.sizes.observed(); ++i) {
    std::vector<double> logits;
    for (std::size_t row = 0; row < evictable; ++row) {
      double largest = -std::numeric_limits<double>::infinity();
      for (std::size_t h = 0; h < layer.sizes.group; ++h) {
        double dot = 0.0;
        for (std::size_t dim = 0; dim < layer.shape.head_dim; ++dim) {
          dot += layer.query(kv_head * layer.sizes.group + h, i, dim) * layer.key(kv_head, row, dim);
        }
        const double logit = dot * layer.scale();
        largest = std::max(largest, soft_cap > 0.0 ? soft_cap * std::tanh(logit / soft_cap) : logit);
      }
      const bool seen = evictable + i - row < sliding;
      logits.push_back(seen ? largest : -std::numeric_limits<double>::infinity());
    }
    if (*std::max_element(logits.begin(), logits.end()) == -std::numeric_limits<double>::infinity()) {
      continue;  // it sees none of them
    }
    const auto weights = softmax(logits);
    for (std::size_t row = 0; row < evictable; ++row) {
      means[row] += weights[row] / static_cast<double>(layer.sizes.observed());
    }
  }
  return means;
}

template <class L>
ScoreRows r_kv(const L& layer, const score::RKvOptions& options, double soft_cap = 0.0,
               std::size_t sliding = std::numeric_limits<std::size_t>::max()) {
  const auto lambda = static_cast<double>(options.lambda);
  ScoreRows rows(layer.sizes.kv_heads);
  for (std::size_t head = 0; head < rows.size(); ++head) {
    if (layer.sizes.rows == layer.sizes.observed()) {
      continue;
    }
    const auto seen =
        pooled(group_attention(layer, head, soft_cap, sliding), options.pool, options.pool_width);
    const auto known = redundancy(layer, head, static_cast<double>(options.threshold));
    for (std::size_t t = 0; t < seen.size(); ++t) {
      rows[head].push_back(lambda * seen[t] - (1.0 - lambda) * known[t]);
    }
  }
  return rows;
}

}  // namespace compresskv::reference
