#pragma once

#include <algorithm>
#include <cmath>
#include <compresskv/core/element.hpp>
#include <compresskv/core/shape.hpp>
#include <compresskv/core/surrogate.hpp>
#include <compresskv/view/hidden_states.hpp>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "reference/random.hpp"

namespace compresskv::reference {

inline Surrogate surrogate(const ModelShape& shape, std::size_t hidden_size, std::uint64_t seed = 21) {
  Random random(seed);
  const std::size_t heads = shape.layers * shape.kv_heads;
  std::vector<float> weights(heads * hidden_size);
  std::vector<float> biases(heads);
  for (float& weight : weights) {
    weight = random.gaussian();
  }
  for (float& bias : biases) {
    bias = random.gaussian() - 4.0F;
  }
  return {shape.layers, shape.kv_heads, hidden_size, std::move(weights), std::move(biases)};
}

/// Hidden states of all tokens of one layer, with gaps of NaN between tokens.
template <Element T>
struct Hidden {
  std::size_t tokens;
  std::size_t hidden_size;
  std::size_t stride;
  std::vector<T> states;

  Hidden(std::size_t of_tokens, std::size_t of_size, std::size_t gap, std::uint64_t seed)
      : tokens(of_tokens),
        hidden_size(of_size),
        stride(of_size + gap),
        states((of_tokens - 1) * (of_size + gap) + of_size,
               static_cast<T>(std::numeric_limits<float>::quiet_NaN())) {
    Random random(seed);
    for (std::size_t t = 0; t < tokens; ++t) {
      for (std::size_t e = 0; e < hidden_size; ++e) {
        states[t * stride + e] = static_cast<T>(random.gaussian());
      }
    }
  }

  /// Those of tokens `begin` to `end` - 1.
  HiddenStates<T> shown(std::size_t begin, std::size_t end) const {
    return {states.data() + begin * stride,
            HiddenShape{.tokens = end - begin, .hidden_size = hidden_size, .token_stride = stride}};
  }
  HiddenStates<T> shown() const { return shown(0, tokens); }

  struct Foretold {
    double score = 0.0;
    double mass = 0.0;  ///< sum of absolute products: what rounding is a share of
  };
  /// docs/method.md, 3.26.
  Foretold score(const Surrogate& by, std::size_t layer, std::size_t kv_head, std::size_t token) const {
    Foretold out{.score = static_cast<double>(by.bias(layer, kv_head))};
    out.mass = std::abs(out.score);
    for (std::size_t e = 0; e < hidden_size; ++e) {
      const double product = static_cast<double>(by.weights(layer, kv_head)[e]) *
                             static_cast<double>(to_float(states[token * stride + e]));
      out.score += product;
      out.mass += std::abs(product);
    }
    return out;
  }
};

}  // namespace compresskv::reference
