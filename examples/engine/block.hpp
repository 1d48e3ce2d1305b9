// The small parts of a LLaMA block: normalisation, rotation, gated activation. Each treats a token by itself,
// with sums in one fixed order, so that a token's numbers do not depend on which others are computed beside
// it.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "model.hpp"

namespace engine {

/// out = x / sqrt(mean(x^2) + epsilon) * weight, all of the same length.
void rms_norm(std::span<const float> x, const Vector& weight, float epsilon, std::span<float> out);

/// Euclidean length.
float length(std::span<const float> x);

/// SwiGLU: gate = gate * sigmoid(gate) * up.
void swiglu(std::span<float> gate, std::span<const float> up);

/// The rotary embedding of one position.
class Rotation {
 public:
  Rotation(const Model& model, std::size_t position);

  /// Rotates the pairs of every head in a row of heads of `head_dim`.
  void apply(std::span<float> heads, std::size_t head_dim) const;

 private:
  std::vector<float> cosine_;  // [rope_dimensions / 2]
  std::vector<float> sine_;
};

}  // namespace engine
