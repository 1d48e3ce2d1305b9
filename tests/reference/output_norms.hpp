// What a value adds to the hidden state, in double, one loop after the other.
#pragma once

#include <cmath>
#include <compresskv/core/output_weights.hpp>
#include <compresskv/core/shape.hpp>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <vector>

#include "reference/random.hpp"

namespace compresskv::reference {

inline constexpr std::size_t output_rows = 24;  ///< elements of the hidden state of the tests' models

/// Output weights of a layer, `[output_rows][query_head][dim]`.
inline std::vector<float> random_outputs(std::uint64_t seed, const ModelShape& shape) {
  Random random(seed);
  std::vector<float> weights(output_rows * shape.query_heads * shape.head_dim);
  for (float& weight : weights) {
    weight = 0.3F * random.gaussian();
  }
  return weights;
}

/// Output weights of a model of this shape, held until the program ends. Each layer's begin a number later.
inline OutputWeights output_weights(const ModelShape& shape, std::uint64_t seed = 31) {
  static std::deque<std::vector<float>> held;
  std::vector<float>& numbers = held.emplace_back(random_outputs(seed, shape));
  numbers.resize(numbers.size() + shape.layers, 0.5F);
  std::vector<const float*> layers;
  for (std::size_t layer = 0; layer < shape.layers; ++layer) {
    layers.push_back(numbers.data() + layer);
  }
  return {layers, {.hidden = output_rows, .query_heads = shape.query_heads, .head_dim = shape.head_dim}};
}

/// `W_o[query_head] value` of one row.
template <class L>
std::vector<double> added_to_output(const L& layer, const std::vector<float>& weights, std::size_t query_head,
                                    std::size_t row) {
  std::vector<double> sums;
  const std::size_t inputs = layer.shape.query_heads * layer.shape.head_dim;
  for (std::size_t out = 0; out < weights.size() / inputs; ++out) {
    double sum = 0.0;
    for (std::size_t dim = 0; dim < layer.shape.head_dim; ++dim) {
      sum += static_cast<double>(weights[out * inputs + query_head * layer.shape.head_dim + dim]) *
             layer.value(query_head / layer.shape.group(), row, dim);
    }
    sums.push_back(sum);
  }
  return sums;
}

inline double euclidean(const std::vector<double>& numbers) {
  double sum = 0.0;
  for (const double x : numbers) {
    sum += x * x;
  }
  return std::sqrt(sum);
}

inline double absolute_sum(const std::vector<double>& numbers) {
  double sum = 0.0;
  for (const double x : numbers) {
    sum += std::abs(x);
  }
  return sum;
}

}  // namespace compresskv::reference
