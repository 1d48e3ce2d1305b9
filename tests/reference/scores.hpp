#pragma once

#include <algorithm>
#include <cmath>
#include <compresskv/kernel/pooling.hpp>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

namespace compresskv::reference {

/// e^x / sum e^x.
inline std::vector<double> softmax(const std::vector<double>& logits) {
  const double max = *std::max_element(logits.begin(), logits.end());
  double sum = 0.0;
  std::vector<double> out;
  for (const double logit : logits) {
    out.push_back(std::exp(logit - max));
    sum += out.back();
  }
  for (double& weight : out) {
    weight /= sum;
  }
  return out;
}

/// Pooling as docs/method.md 2.2 tells it: a padded copy, then a window over it.
inline std::vector<double> pooled(const std::vector<double>& in, kernel::Pool pool, std::size_t width) {
  const bool average = pool != kernel::Pool::max;
  const std::size_t behind = pool == kernel::Pool::trailing ? 0 : width / 2;
  const double outside = average ? 0.0 : -std::numeric_limits<double>::infinity();
  std::vector<double> padded(width - 1 - behind, outside);
  padded.insert(padded.end(), in.begin(), in.end());
  padded.insert(padded.end(), behind, outside);
  std::vector<double> out;
  for (std::size_t t = 0; t < in.size(); ++t) {
    const auto first = padded.begin() + static_cast<std::ptrdiff_t>(t);
    const auto last = first + static_cast<std::ptrdiff_t>(width);
    out.push_back(average ? std::accumulate(first, last, 0.0) / static_cast<double>(width)
                          : *std::max_element(first, last));
  }
  return out;
}

/// The attention of one query head's window: `weights[i][t]`, row i being the i-th query of the window.
struct WindowAttention {
  std::vector<std::vector<double>> weights;
  double largest_logit_mass = 0.0;  ///< max over queries and keys of scale * sum_e |q_e k_e|
};

/// Window attention of docs/method.md 2.1. `key(row, dim)`, `query(i, dim)`. A query sees the last `sliding`
/// rows, its own included; a sink of finite logit takes weight and gives none; `soft_cap` c > 0: c * tanh(x /
/// c).
template <class Key, class Query>
WindowAttention window_attention(Key&& key, Query&& query, std::size_t rows, std::size_t window,
                                 std::size_t head_dim, double scale,
                                 std::size_t sliding = std::numeric_limits<std::size_t>::max(),
                                 double sink = -std::numeric_limits<double>::infinity(),
                                 double soft_cap = 0.0) {
  WindowAttention out;
  for (std::size_t i = 0; i < window; ++i) {
    std::vector<double> logits;
    for (std::size_t row = 0; row < rows; ++row) {
      double dot = 0.0;
      double mass = 0.0;
      for (std::size_t dim = 0; dim < head_dim; ++dim) {
        const double product = query(i, dim) * key(row, dim);
        dot += product;
        mass += std::abs(product);
      }
      const std::size_t own = rows - window + i;
      const bool seen = row <= own && own - row < sliding;
      const double logit = soft_cap > 0.0 ? soft_cap * std::tanh(dot * scale / soft_cap) : dot * scale;
      logits.push_back(seen ? logit : -std::numeric_limits<double>::infinity());
      out.largest_logit_mass = std::max(out.largest_logit_mass, mass * scale);
    }
    logits.push_back(sink);
    out.weights.push_back(softmax(logits));
    out.weights.back().pop_back();
  }
  return out;
}

/// Step 4: the rows added up, the window's own columns dropped.
inline std::vector<double> window_sums(const std::vector<std::vector<double>>& weights) {
  const std::size_t window = weights.size();
  std::vector<double> sums(weights.front().size() - window, 0.0);
  for (const auto& row : weights) {
    for (std::size_t t = 0; t < sums.size(); ++t) {
      sums[t] += row[t];
    }
  }
  return sums;
}

/// Steps 5 and 6: pooled a head, then the mean over heads. `sums[head][token]`.
inline std::vector<double> layer_scores(const std::vector<std::vector<double>>& sums, kernel::Pool pool,
                                        std::size_t width) {
  std::vector<double> scores(sums.front().size(), 0.0);
  for (const auto& head : sums) {
    const auto smooth = pooled(head, pool, width);
    for (std::size_t t = 0; t < scores.size(); ++t) {
      scores[t] += smooth[t] / static_cast<double>(sums.size());
    }
  }
  return scores;
}

inline constexpr double unit_roundoff = 0x1p-24;

/// How far float32 scores may lie from exact ones, relative to the score. All terms are positive, so relative
/// errors add up:
/// - a logit of d products over 16 lanes is off by at most (d / 16 + 7) roundings of the sum of absolute
///   products; so is the maximum that is subtracted, the subtraction rounds once more, and e^x turns an
///   absolute error of x into a relative one of the weight, above and below the fraction bar alike;
/// - exp itself is within 2e-7, above and below;
/// - the denominator adds `rows / 16 + 5` times, the window's rows, the pool and the heads a few times each.
inline double score_tolerance(std::size_t head_dim, std::size_t rows, std::size_t window, std::size_t width,
                              std::size_t heads, double largest_logit_mass) {
  const double dots = static_cast<double>(head_dim) / 16.0 + 7.0;
  const double sums = static_cast<double>(rows) / 16.0 + static_cast<double>(window + width + heads) + 12.0;
  return unit_roundoff * (4.0 * (dots + 1.0) * largest_logit_mass + sums) + 4e-7;
}

/// Weights below e^-87 are 0 in float32: so much may be missing of a score besides.
inline double score_underflow(std::size_t window) { return static_cast<double>(window) * 2e-38; }

/// Indices of the `count` best scores, ascending: a full sort by the total order.
template <class Number>
std::vector<std::uint32_t> top_k(const std::vector<Number>& scores, std::size_t count) {
  std::vector<std::uint32_t> order(scores.size());
  std::iota(order.begin(), order.end(), 0U);
  std::sort(order.begin(), order.end(), [&](std::uint32_t a, std::uint32_t b) {
    return scores[a] != scores[b] ? scores[a] > scores[b] : a < b;
  });
  order.resize(count);
  std::sort(order.begin(), order.end());
  return order;
}

/// Top-k of the evictable tokens and the window behind them.
template <class Number>
std::vector<std::uint32_t> rows_to_keep(const std::vector<Number>& scores, std::size_t window,
                                        std::size_t capacity) {
  auto rows = top_k(scores, capacity - window);
  for (std::size_t i = 0; i < window; ++i) {
    rows.push_back(static_cast<std::uint32_t>(scores.size() + i));
  }
  return rows;
}

/// One query over all rows: softmax weights times values. `key(row, dim)`, `value(row, dim)`, `query(dim)`.
template <class Key, class Value, class Query>
std::vector<double> decode_attention(Key&& key, Value&& value, Query&& query, std::size_t rows,
                                     std::size_t head_dim, double scale) {
  std::vector<double> logits;
  for (std::size_t row = 0; row < rows; ++row) {
    double dot = 0.0;
    for (std::size_t dim = 0; dim < head_dim; ++dim) {
      dot += query(dim) * key(row, dim);
    }
    logits.push_back(dot * scale);
  }
  const auto weights = softmax(logits);
  std::vector<double> out(head_dim, 0.0);
  for (std::size_t row = 0; row < rows; ++row) {
    for (std::size_t dim = 0; dim < head_dim; ++dim) {
      out[dim] += weights[row] * value(row, dim);
    }
  }
  return out;
}

}  // namespace compresskv::reference
