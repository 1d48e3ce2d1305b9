#pragma once

#include <algorithm>
#include <cstddef>
#include <limits>

#include "compresskv/core/float_bits.hpp"
#include "compresskv/core/narrowed.hpp"
#include "compresskv/core/query_statistics.hpp"
#include "compresskv/core/strict_float_begin.hpp"
#include "compresskv/kernel/lanes.hpp"

namespace compresskv::kernel {

/// Keys side by side, element after element: element `e` of key `k` at `tile[e * keys_per_tile + k]`.
inline constexpr std::size_t keys_per_tile = lane_count;

/// Logarithm of the mean of `exp(scale q . key)` over queries of a normal distribution:
///
///     scale mean . key  +  scale^2 / 2  key^T covariance key
///
/// for each of a tile's keys. Cost: head_dim^2 / 2 multiply-adds a key.
inline void expected_logits(const QueryStatistics::Head& query, const float* tile, float scale,
                            float* logits) {
  Lanes linear{};
  Lanes square{};
  const float* covariance = query.covariance.data();
  for (std::size_t i = 0; i < query.mean.size(); ++i) {
    const float* key = tile + i * keys_per_tile;
    Lanes sum{};
    for (std::size_t j = 0; j < i; ++j) {
      const float* other = tile + j * keys_per_tile;
      const float entry = covariance[j];
      for (std::size_t k = 0; k < keys_per_tile; ++k) {
        sum[k] += entry * other[k];
      }
    }
    const float variance = covariance[i];
    const float mean = query.mean[i];
    for (std::size_t k = 0; k < keys_per_tile; ++k) {
      square[k] += (2.0F * sum[k] + variance * key[k]) * key[k];
      linear[k] += mean * key[k];
    }
    covariance += i + 1;
  }
  for (std::size_t k = 0; k < keys_per_tile; ++k) {
    logits[k] = scale * linear[k] + 0.5F * scale * scale * square[k];
  }
}

/// The same for key `k` alone where float32 was not enough: in float64, cut to what float32 holds and softmax
/// can subtract. Not finite where the key is not.
inline float wide_expected_logit(const QueryStatistics::Head& query, const float* tile, std::size_t k,
                                 double scale) {
  double linear = 0.0;
  double square = 0.0;
  const float* covariance = query.covariance.data();
  const auto element = [&](std::size_t e) { return static_cast<double>(tile[e * keys_per_tile + k]); };
  for (std::size_t i = 0; i < query.mean.size(); ++i) {
    double sum = 0.0;
    for (std::size_t j = 0; j < i; ++j) {
      sum += static_cast<double>(covariance[j]) * element(j);
    }
    square += (2.0 * sum + static_cast<double>(covariance[i]) * element(i)) * element(i);
    linear += static_cast<double>(query.mean[i]) * element(i);
    covariance += i + 1;
  }
  const double logit = scale * linear + 0.5 * scale * scale * square;
  return compresskv::detail::narrowed<float>(logit, (std::numeric_limits<float>::max)() / 4);
}

}  // namespace compresskv::kernel

#include "compresskv/core/strict_float_end.hpp"
