#pragma once

#include <algorithm>
#include <cmath>
#include <compresskv/compresskv.hpp>
#include <cstddef>
#include <vector>

#include "reference/layer_case.hpp"
#include "reference/scores.hpp"

namespace compresskv::reference {

/// The baselines of docs/method.md, 3 and 4, in double, one loop after the other: `[row of scores][evictable
/// token]`.
using ScoreRows = std::vector<std::vector<double>>;

/// Mean inside each group of consecutive heads of what `of_head(query_head)` gives.
template <class L, class OfHead>
ScoreRows group_means(const L& layer, OfHead&& of_head) {
  ScoreRows rows;
  for (std::size_t kv_head = 0; kv_head < layer.sizes.kv_heads; ++kv_head) {
    std::vector<std::vector<double>> heads;
    for (std::size_t i = 0; i < layer.sizes.group; ++i) {
      heads.push_back(of_head(kv_head * layer.sizes.group + i));
    }
    rows.push_back(layer_scores(heads, kernel::Pool::average, 1));
  }
  return rows;
}

template <class L>
ScoreRows snap_kv(const L& layer) {
  return group_means(layer, [&](std::size_t head) {
    return pooled(window_sums(layer.attention(head).weights), layer.sizes.pool, layer.sizes.pool_width);
  });
}

template <class L>
ScoreRows cake(const L& layer, double gamma) {
  return group_means(layer, [&](std::size_t head) {
    const auto weights = layer.attention(head).weights;
    const auto rows = static_cast<double>(weights.size());
    std::vector<double> value = window_sums(weights);
    for (std::size_t t = 0; t < value.size(); ++t) {
      const double mean = value[t] / rows;
      double squares = 0.0;
      for (const auto& row : weights) {
        squares += (row[t] - mean) * (row[t] - mean);
      }
      value[t] = mean + (weights.size() < 2 ? 0.0 : gamma * squares / (rows - 1.0));
    }
    return pooled(value, kernel::Pool::average, layer.sizes.pool_width);
  });
}

/// Attention of one query over the rows up to its own. The layer shows a query for every row.
template <class L>
std::vector<double> causal_row(const L& layer, std::size_t query_head, std::size_t own) {
  std::vector<double> logits;
  for (std::size_t row = 0; row <= own; ++row) {
    double dot = 0.0;
    for (std::size_t dim = 0; dim < layer.shape.head_dim; ++dim) {
      const std::size_t at = (query_head * layer.shown() + own) * layer.shape.head_dim + dim;
      dot += static_cast<double>(to_float(layer.queries[at])) *
             layer.key(query_head / layer.sizes.group, row, dim);
    }
    logits.push_back(dot * layer.scale());
  }
  return softmax(logits);
}

template <class L>
ScoreRows h2o(const L& layer) {
  const std::size_t evictable = layer.sizes.rows - layer.sizes.observed();
  return group_means(layer, [&](std::size_t head) {
    std::vector<double> mass(evictable, 0.0);
    for (std::size_t own = 0; own < layer.sizes.rows; ++own) {
      const auto weights = causal_row(layer, head, own);
      for (std::size_t t = 0; t < std::min(evictable, weights.size()); ++t) {
        mass[t] += weights[t];
      }
    }
    return mass;
  });
}

template <class L>
ScoreRows tova(const L& layer) {
  std::vector<std::vector<double>> heads;
  for (std::size_t head = 0; head < layer.shape.query_heads; ++head) {
    heads.push_back(window_sums(layer.attention(head).weights));
  }
  return {layer_scores(heads, kernel::Pool::average, 1)};
}

template <class L>
double key_norm(const L& layer, std::size_t kv_head, std::size_t row) {
  double sum = 0.0;
  for (std::size_t dim = 0; dim < layer.shape.head_dim; ++dim) {
    sum += layer.key(kv_head, row, dim) * layer.key(kv_head, row, dim);
  }
  return std::sqrt(sum);
}

template <class L>
ScoreRows knorm(const L& layer) {
  ScoreRows rows(layer.sizes.kv_heads);
  for (std::size_t head = 0; head < rows.size(); ++head) {
    for (std::size_t t = 0; t + layer.sizes.observed() < layer.sizes.rows; ++t) {
      rows[head].push_back(-key_norm(layer, head, t));
    }
  }
  return rows;
}

template <class L>
ScoreRows key_diff(const L& layer) {
  ScoreRows rows(layer.sizes.kv_heads);
  for (std::size_t head = 0; head < rows.size(); ++head) {
    std::vector<double> mean(layer.shape.head_dim, 0.0);
    for (std::size_t row = 0; row < layer.sizes.rows; ++row) {
      for (std::size_t dim = 0; dim < mean.size(); ++dim) {
        mean[dim] += layer.key(head, row, dim) / key_norm(layer, head, row);
      }
    }
    double length = 0.0;
    for (const double x : mean) {
      length += x * x;
    }
    for (std::size_t t = 0; t + layer.sizes.observed() < layer.sizes.rows; ++t) {
      double dot = 0.0;
      for (std::size_t dim = 0; dim < mean.size(); ++dim) {
        dot += layer.key(head, t, dim) * mean[dim];
      }
      rows[head].push_back(-dot / (key_norm(layer, head, t) * std::sqrt(length)));
    }
  }
  return rows;
}

/// `part(head, row, dim)` of a row of keys or values.
template <class L>
double element_of(const L& layer, bool keys, std::size_t head, std::size_t row, std::size_t dim) {
  return keys ? layer.key(head, row, dim) : layer.value(head, row, dim);
}

/// LagKV without its ranks, of a cache that holds every row.
template <class L>
ScoreRows lag_kv(const L& layer, std::size_t sinks, std::size_t lag) {
  const std::size_t evictable = layer.sizes.rows - layer.sizes.observed();
  const std::size_t dims = layer.shape.head_dim;
  ScoreRows scores(layer.sizes.kv_heads, std::vector<double>(evictable, 0.0));
  for (std::size_t head = 0; head < scores.size(); ++head) {
    std::size_t begin = std::min(sinks, evictable);
    while (begin + 2 * lag <= layer.sizes.rows && begin + lag <= evictable) {
      for (const bool keys : {true, false}) {
        std::vector<double> deviations;
        for (std::size_t row = begin; row < begin + lag; ++row) {
          std::vector<double> scaled;
          for (std::size_t dim = 0; dim < dims; ++dim) {
            std::vector<double> next;
            for (std::size_t other = begin + lag; other < begin + 2 * lag; ++other) {
              next.push_back(element_of(layer, keys, head, other, dim));
            }
            const double least = *std::min_element(next.begin(), next.end());
            const double largest = *std::max_element(next.begin(), next.end());
            scaled.push_back(largest == least
                                 ? 0.0
                                 : (element_of(layer, keys, head, row, dim) - least) / (largest - least));
          }
          double mean = 0.0;
          for (const double x : scaled) {
            mean += x / static_cast<double>(dims);
          }
          double squares = 0.0;
          for (const double x : scaled) {
            squares += (x - mean) * (x - mean);
          }
          deviations.push_back(dims == 1 ? 0.0 : std::sqrt(squares / (static_cast<double>(dims) - 1.0)));
        }
        const auto weights = softmax(deviations);
        for (std::size_t i = 0; i < lag; ++i) {
          scores[head][begin + i] += 0.5 * weights[i];
        }
      }
      begin += lag;
    }
    for (std::size_t t = begin; t < evictable; ++t) {
      scores[head][t] = static_cast<double>(2 + t - begin);
    }
    for (std::size_t t = 0; t < std::min(sinks, evictable); ++t) {
      scores[head][t] = static_cast<double>(2 + evictable - begin);
    }
  }
  return scores;
}

/// CUR, of a cache that holds every row.
template <class L>
ScoreRows cur(const L& layer, std::size_t sinks, std::size_t block) {
  ScoreRows scores(layer.sizes.kv_heads);
  for (std::size_t head = 0; head < scores.size(); ++head) {
    const auto squares = [&](bool keys) {
      std::vector<double> sums(layer.sizes.rows, 0.0);
      for (std::size_t row = 0; row < sums.size(); ++row) {
        for (std::size_t dim = 0; dim < layer.shape.head_dim; ++dim) {
          sums[row] += element_of(layer, keys, head, row, dim) * element_of(layer, keys, head, row, dim);
        }
      }
      return sums;
    };
    const auto share = [&](const std::vector<double>& of, std::size_t row) {
      double sum = 0.0;
      for (std::size_t other = 0; other < of.size(); ++other) {
        sum += other / block == row / block ? of[other] : 0.0;
      }
      return sum == 0.0 ? 0.0 : of[row] / sum;
    };
    const std::vector<double> keys = squares(true);
    const std::vector<double> values = squares(false);
    double total = 0.0;
    for (std::size_t row = 0; row < layer.sizes.rows; ++row) {
      const double score = share(keys, row) * share(values, row);
      total += score;
      if (row + layer.sizes.observed() < layer.sizes.rows) {
        scores[head].push_back(score);
      }
    }
    for (std::size_t t = 0; t < scores[head].size(); ++t) {
      scores[head][t] = t < sinks ? 1.0 : total == 0.0 ? 0.0 : scores[head][t] / total;
    }
  }
  return scores;
}

/// Scores by chunks of positions: `positions[row of scores]` of the evictable tokens.
inline ScoreRows chunk_kv(const ScoreRows& scores, const std::vector<std::vector<std::size_t>>& positions,
                          std::size_t chunk) {
  ScoreRows means = scores;
  for (std::size_t row = 0; row < scores.size(); ++row) {
    for (std::size_t t = 0; t < scores[row].size(); ++t) {
      double sum = 0.0;
      double count = 0.0;
      for (std::size_t other = 0; other < scores[row].size(); ++other) {
        if (positions[row][other] / chunk == positions[row][t] / chunk) {
          sum += scores[row][other];
          count += 1.0;
        }
      }
      means[row][t] = sum / count;
    }
  }
  return means;
}

/// Scores of a layer by `scorer` beside `expected`, within `relative` of each and `absolute` besides.
template <class S>
void expect_scores(const S& scorer, Layer<float>& layer, const ScoreRows& expected, double relative,
                   double absolute) {
  const auto selector = [] {
    if constexpr (S::granularity == Granularity::layer) {
      return select::SharedTopK{};
    } else {
      return select::GroupedTopK{};
    }
  }();
  const std::size_t capacity = std::max(layer.sizes.capacity, scorer.window());
  const Plan plan{layer.shape, scorer, selector, budget::Uniform{Budget::tokens_per_layer(capacity)}};
  Compressor compressor{plan};
  compressor.begin(layer.sizes.rows);
  const auto scores = compressor.score(0, layer.cache.view(), layer.observation());
  ASSERT_EQ(scores.rows(), expected.size());
  for (std::size_t row = 0; row < expected.size(); ++row) {
    ASSERT_EQ(scores.tokens(row), expected[row].size());
    for (std::size_t t = 0; t < expected[row].size(); ++t) {
      ASSERT_NEAR(static_cast<double>(scores.row(row)[t]), expected[row][t],
                  relative * std::abs(expected[row][t]) + absolute)
          << "row " << row << " token " << t;
    }
  }
}

/// The largest sum of absolute products of any observing query and key: what bounds a logit's rounding.
template <class L>
double largest_logit_mass(const L& layer) {
  double mass = 0.0;
  for (std::size_t head = 0; head < layer.shape.query_heads; ++head) {
    mass = std::max(mass, layer.attention(head).largest_logit_mass);
  }
  return mass;
}

}  // namespace compresskv::reference
