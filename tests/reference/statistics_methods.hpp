#pragma once

#include <algorithm>
#include <cmath>
#include <compresskv/core/query_statistics.hpp>
#include <cstddef>
#include <vector>

#include "reference/methods.hpp"
#include "reference/queries.hpp"

namespace compresskv::reference {

using Matrix = std::vector<std::vector<double>>;

/// The rotation by `position` as a matrix.
inline Matrix rotation_matrix(const Rotary& rotary, std::size_t head_dim, double position) {
  Matrix out(head_dim, std::vector<double>(head_dim, 0.0));
  for (std::size_t column = 0; column < head_dim; ++column) {
    std::vector<double> unit(head_dim, 0.0);
    unit[column] = 1.0;
    const std::vector<double> turned = rotated(unit, position, rotary);
    for (std::size_t row = 0; row < head_dim; ++row) {
      out[row][column] = turned[row];
    }
  }
  return out;
}

/// Mean of the rotations by positions `first` .. `first + count - 1`.
inline Matrix mean_rotation(const Rotary& rotary, std::size_t head_dim, std::size_t first,
                            std::size_t count) {
  Matrix out(head_dim, std::vector<double>(head_dim, 0.0));
  for (std::size_t i = 0; i < count; ++i) {
    const Matrix one = rotation_matrix(rotary, head_dim, static_cast<double>(first + i));
    for (std::size_t row = 0; row < head_dim; ++row) {
      for (std::size_t column = 0; column < head_dim; ++column) {
        out[row][column] += one[row][column] / static_cast<double>(count);
      }
    }
  }
  return out;
}

inline std::vector<double> times(const Matrix& matrix, const std::vector<double>& vector) {
  std::vector<double> out(matrix.size(), 0.0);
  for (std::size_t i = 0; i < matrix.size(); ++i) {
    for (std::size_t j = 0; j < vector.size(); ++j) {
      out[i] += matrix[i][j] * vector[j];
    }
  }
  return out;
}

/// R C R^T.
inline Matrix conjugated(const Matrix& rotation, const Matrix& matrix) {
  const std::size_t size = matrix.size();
  Matrix half(size, std::vector<double>(size, 0.0));
  Matrix out = half;
  for (std::size_t i = 0; i < size; ++i) {
    for (std::size_t j = 0; j < size; ++j) {
      for (std::size_t k = 0; k < size; ++k) {
        half[i][j] += rotation[i][k] * matrix[k][j];
      }
    }
  }
  for (std::size_t i = 0; i < size; ++i) {
    for (std::size_t j = 0; j < size; ++j) {
      for (std::size_t k = 0; k < size; ++k) {
        out[i][j] += half[i][k] * rotation[j][k];
      }
    }
  }
  return out;
}

inline Matrix covariance_of(const QueryStatistics::Head& head) {
  const std::size_t size = head.mean.size();
  Matrix out(size, std::vector<double>(size));
  for (std::size_t i = 0; i < size; ++i) {
    for (std::size_t j = 0; j < size; ++j) {
      const std::size_t at = std::max(i, j) * (std::max(i, j) + 1) / 2 + std::min(i, j);
      out[i][j] = static_cast<double>(head.covariance[at]);
    }
  }
  return out;
}

template <class L>
std::vector<double> key_row(const L& layer, std::size_t kv_head, std::size_t row) {
  std::vector<double> out;
  for (std::size_t dim = 0; dim < layer.shape.head_dim; ++dim) {
    out.push_back(layer.key(kv_head, row, dim));
  }
  return out;
}

inline double dot(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0.0;
  for (std::size_t e = 0; e < a.size(); ++e) {
    sum += a[e] * b[e];
  }
  return sum;
}

/// Where a layer's sequence stands: rows of the first positions, and the position that comes next.
struct Standing {
  std::size_t sink_rows = 4;
  std::size_t next_position = 0;
};

/// docs/method.md, 3.19; of sinks 0. `largest_mass` bounds the rounding of a logit.
template <class L>
ScoreRows expected_attention(const L& layer, const QueryStatistics& statistics, std::size_t in_layer,
                             const Standing& at, std::size_t future, double epsilon, double& largest_mass) {
  const std::size_t evictable = layer.sizes.rows - layer.sizes.observed();
  const Matrix rotation = mean_rotation(statistics.rotary(), layer.shape.head_dim, at.next_position, future);
  ScoreRows rows;
  for (std::size_t kv_head = 0; kv_head < layer.sizes.kv_heads; ++kv_head) {
    std::vector<double> weights(evictable, 0.0);
    for (std::size_t i = 0; i < layer.sizes.group; ++i) {
      const QueryStatistics::Head& head = statistics.head(in_layer, kv_head * layer.sizes.group + i);
      const std::vector<double> mean = times(rotation, {head.mean.begin(), head.mean.end()});
      const Matrix covariance = conjugated(rotation, covariance_of(head));
      std::vector<double> logits;
      for (std::size_t t = at.sink_rows; t < layer.sizes.rows; ++t) {
        const std::vector<double> key = key_row(layer, kv_head, t);
        logits.push_back(dot(mean, key) * layer.scale() +
                         dot(times(covariance, key), key) * layer.scale() * layer.scale() / 2.0);
        double mass = 0.0;
        for (std::size_t a = 0; a < key.size(); ++a) {
          mass += std::abs(mean[a] * key[a]) * layer.scale();
          for (std::size_t b = 0; b < key.size(); ++b) {
            mass += std::abs(key[a] * covariance[a][b] * key[b]) * layer.scale() * layer.scale() / 2.0;
          }
        }
        largest_mass = std::max(largest_mass, mass);
      }
      if (logits.empty()) {
        continue;
      }
      const std::vector<double> attention = softmax(logits);
      for (std::size_t t = at.sink_rows; t < evictable; ++t) {
        weights[t] += attention[t - at.sink_rows] / static_cast<double>(layer.sizes.group);
      }
    }
    rows.emplace_back();
    for (std::size_t t = 0; t < evictable; ++t) {
      double norm = 0.0;
      for (std::size_t dim = 0; dim < layer.shape.head_dim; ++dim) {
        norm += layer.value(kv_head, t, dim) * layer.value(kv_head, t, dim);
      }
      rows.back().push_back(t < at.sink_rows ? 0.0 : (weights[t] + epsilon) * std::sqrt(norm));
    }
  }
  return rows;
}

/// docs/method.md, 3.21, as the paper has it: by cosines of distances, of keys turned back to before their
/// rotation. `positions[row]` are true positions.
template <class L>
ScoreRows tri_attention(const L& layer, const QueryStatistics& statistics, std::size_t in_layer,
                        const std::vector<std::size_t>& positions, std::size_t now, std::size_t distances,
                        bool normalise) {
  const Rotary& rotary = statistics.rotary();
  const std::size_t head_dim = layer.shape.head_dim;
  const std::size_t dims = rotary.dims == 0 ? head_dim : rotary.dims;
  const std::size_t evictable = layer.sizes.rows - layer.sizes.observed();
  ScoreRows rows;
  for (std::size_t kv_head = 0; kv_head < layer.sizes.kv_heads; ++kv_head) {
    rows.emplace_back();
    for (std::size_t i = 0; i < layer.sizes.group; ++i) {
      const QueryStatistics::Head& head = statistics.head(in_layer, kv_head * layer.sizes.group + i);
      std::vector<double> scores;
      for (std::size_t t = 0; t < evictable; ++t) {
        const auto position = static_cast<double>(positions[t]);
        const std::vector<double> plain = rotated(key_row(layer, kv_head, t), -position, rotary);
        double score = 0.0;
        for (std::size_t e = dims; e < head_dim; ++e) {
          score += static_cast<double>(head.mean[e]) * plain[e];
        }
        for (std::size_t f = 0; f < dims / 2; ++f) {
          const bool split = rotary.pairing == RotaryPairing::half_split;
          const std::size_t x = split ? f : 2 * f;
          const std::size_t y = split ? f + dims / 2 : 2 * f + 1;
          double frequency = rotary.position_scale *
                             std::pow(rotary.base, -2.0 * static_cast<double>(f) / static_cast<double>(dims));
          if (!rotary.frequency_factors.empty()) {
            frequency /= static_cast<double>(rotary.frequency_factors[f]);
          }
          const auto mean_x = static_cast<double>(head.mean[x]);
          const auto mean_y = static_cast<double>(head.mean[y]);
          const double of_mean = std::hypot(mean_x, mean_y);
          const double of_key = std::hypot(plain[x], plain[y]);
          const double angle = std::atan2(mean_y, mean_x) - std::atan2(plain[y], plain[x]);
          for (std::size_t n = 0; n < distances; ++n) {
            const double distance = static_cast<double>(now) - position + std::exp2(static_cast<double>(n));
            score +=
                of_mean * of_key * std::cos(frequency * distance + angle) / static_cast<double>(distances);
          }
          score += (static_cast<double>(head.modulus[f]) - of_mean) * of_key;
        }
        scores.push_back(score);
      }
      if (normalise && !scores.empty()) {
        double mean = 0.0;
        double square = 0.0;
        for (const double score : scores) {
          mean += score / static_cast<double>(scores.size());
        }
        for (const double score : scores) {
          square += (score - mean) * (score - mean) / static_cast<double>(scores.size());
        }
        for (double& score : scores) {
          score = square > 0.0 ? (score - mean) / std::sqrt(square) : 0.0;
        }
      }
      if (i == 0) {
        rows.back() = scores;
      }
      for (std::size_t t = 0; t < evictable; ++t) {
        rows.back()[t] = std::max(rows.back()[t], scores[t]);
      }
    }
  }
  return rows;
}

}  // namespace compresskv::reference
