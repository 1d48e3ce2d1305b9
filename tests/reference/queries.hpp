#pragma once

#include <cmath>
#include <compresskv/core/query_statistics.hpp>
#include <compresskv/core/rotary.hpp>
#include <compresskv/core/shape.hpp>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "reference/random.hpp"

namespace compresskv::reference {

/// A row rotated by `position`, as docs/method.md, 7.4, has it.
inline std::vector<double> rotated(const std::vector<double>& row, double position, const Rotary& rotary) {
  std::vector<double> out = row;
  const std::size_t dims = rotary.dims == 0 ? row.size() : rotary.dims;
  for (std::size_t j = 0; j < dims / 2; ++j) {
    double angle = position * rotary.position_scale *
                   std::pow(rotary.base, -2.0 * static_cast<double>(j) / static_cast<double>(dims));
    if (!rotary.frequency_factors.empty()) {
      angle /= static_cast<double>(rotary.frequency_factors[j]);
    }
    const bool split = rotary.pairing == RotaryPairing::half_split;
    const std::size_t x = split ? j : 2 * j;
    const std::size_t y = split ? j + dims / 2 : 2 * j + 1;
    out[x] = row[x] * std::cos(angle) - row[y] * std::sin(angle);
    out[y] = row[x] * std::sin(angle) + row[y] * std::cos(angle);
  }
  return out;
}

/// Queries of a head as rows: a mean of their own, and elements that vary together.
inline std::vector<std::vector<double>> spread_queries(Random& random, std::size_t count,
                                                       std::size_t head_dim, double mean_size = 1.0) {
  std::vector<double> mean(head_dim);
  std::vector<std::vector<double>> mix(head_dim, std::vector<double>(head_dim));
  for (std::size_t i = 0; i < head_dim; ++i) {
    mean[i] = mean_size * static_cast<double>(random.gaussian());
    for (double& x : mix[i]) {
      x = static_cast<double>(random.gaussian()) / std::sqrt(static_cast<double>(head_dim));
    }
  }
  std::vector<std::vector<double>> queries;
  for (std::size_t q = 0; q < count; ++q) {
    std::vector<double> free(head_dim);
    for (double& x : free) {
      x = static_cast<double>(random.gaussian());
    }
    queries.push_back(mean);
    for (std::size_t i = 0; i < head_dim; ++i) {
      for (std::size_t j = 0; j < head_dim; ++j) {
        queries.back()[i] += mix[i][j] * free[j];
      }
    }
  }
  return queries;
}

/// Mean, covariance and mean moduli of rows, one loop after the other.
struct SpreadOfRows {
  std::vector<double> mean;
  std::vector<std::vector<double>> covariance;
  std::vector<double> modulus;

  SpreadOfRows(const std::vector<std::vector<double>>& rows, const Rotary& rotary) {
    const std::size_t head_dim = rows.front().size();
    const auto count = static_cast<double>(rows.size());
    const std::size_t dims = rotary.dims == 0 ? head_dim : rotary.dims;
    mean.assign(head_dim, 0.0);
    covariance.assign(head_dim, std::vector<double>(head_dim, 0.0));
    modulus.assign(dims / 2, 0.0);
    for (const auto& row : rows) {
      for (std::size_t e = 0; e < head_dim; ++e) {
        mean[e] += row[e] / count;
      }
    }
    for (const auto& row : rows) {
      for (std::size_t i = 0; i < head_dim; ++i) {
        for (std::size_t j = 0; j < head_dim; ++j) {
          covariance[i][j] += (row[i] - mean[i]) * (row[j] - mean[j]) / count;
        }
      }
      for (std::size_t j = 0; j < dims / 2; ++j) {
        const bool split = rotary.pairing == RotaryPairing::half_split;
        modulus[j] += std::hypot(row[split ? j : 2 * j], row[split ? j + dims / 2 : 2 * j + 1]) / count;
      }
    }
  }

  QueryStatistics::Head head(std::uint64_t count) const {
    QueryStatistics::Head out{.count = count};
    for (const double x : mean) {
      out.mean.push_back(static_cast<float>(x));
    }
    for (const double x : modulus) {
      out.modulus.push_back(static_cast<float>(x));
    }
    for (std::size_t i = 0; i < covariance.size(); ++i) {
      for (std::size_t j = 0; j <= i; ++j) {
        out.covariance.push_back(static_cast<float>(covariance[i][j]));
      }
    }
    return out;
  }
};

/// Statistics of a model whose heads all differ, from a few queries each.
inline QueryStatistics query_statistics(const ModelShape& shape, std::uint64_t seed = 1,
                                        const Rotary& rotary = {}) {
  Random random(seed);
  std::vector<QueryStatistics::Head> heads;
  for (std::size_t i = 0; i < shape.layers * shape.query_heads; ++i) {
    heads.push_back(SpreadOfRows(spread_queries(random, 12, shape.head_dim), rotary).head(12));
  }
  return {shape.layers, shape.query_heads, shape.head_dim, rotary, std::move(heads)};
}

/// A model's rotary embeddings of all kinds, for rows of `head_dim` elements, a multiple of 4. The factors
/// are static.
inline std::vector<Rotary> rotary_kinds(std::size_t head_dim) {
  static const std::vector<float> factors(std::size_t{256}, 3.0F);
  std::vector<Rotary> all;
  for (const RotaryPairing pairing : {RotaryPairing::half_split, RotaryPairing::interleaved}) {
    all.push_back({.pairing = pairing});
    all.push_back({.base = 500000.0, .dims = head_dim / 2, .pairing = pairing});
    Rotary scaled{.base = 1e6, .pairing = pairing, .position_scale = 0.5};
    scaled.frequency_factors = std::span(factors).first(head_dim / 2);
    all.push_back(scaled);
  }
  return all;
}

}  // namespace compresskv::reference
