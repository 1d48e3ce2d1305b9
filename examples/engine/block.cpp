#include "block.hpp"

#include <Eigen/Core>
#include <algorithm>
#include <cmath>

namespace engine {
namespace {

// Eight numbers at a time, the last few padded: Eigen's scalar and vector functions round differently, and a
// number must not depend on where its row lies in memory.
constexpr std::size_t width = 8;
using Lanes = Eigen::Array<float, width, 1>;

Lanes load(std::span<const float> from, std::size_t at) {
  if (from.size() - at >= width) return Eigen::Map<const Lanes>{from.data() + at};
  Lanes lanes = Lanes::Zero();
  std::copy(from.begin() + static_cast<std::ptrdiff_t>(at), from.end(), lanes.data());
  return lanes;
}

void store(const Lanes& lanes, std::span<float> to, std::size_t at) {
  std::copy_n(lanes.data(), std::min(width, to.size() - at), to.data() + at);
}

float sum_of_squares(std::span<const float> x) {
  Lanes squares = Lanes::Zero();
  for (std::size_t i = 0; i < x.size(); i += width) squares += load(x, i).square();
  return squares.sum();
}

}  // namespace

float length(std::span<const float> x) { return std::sqrt(sum_of_squares(x)); }

void rms_norm(std::span<const float> x, const Vector& weight, float epsilon, std::span<float> out) {
  const float scale = 1.0F / std::sqrt(sum_of_squares(x) / static_cast<float>(x.size()) + epsilon);
  for (std::size_t i = 0; i < x.size(); ++i) out[i] = x[i] * scale * weight[static_cast<Eigen::Index>(i)];
}

void swiglu(std::span<float> gate, std::span<const float> up) {
  for (std::size_t i = 0; i < gate.size(); i += width) {
    const Lanes x = load(gate, i);
    store(x / (1.0F + (-x).exp()) * load(up, i), gate, i);
  }
}

Rotation::Rotation(const Model& model, std::size_t position) {
  for (const double frequency : model.rope_frequencies()) {
    const double angle = static_cast<double>(position) * frequency;
    cosine_.push_back(static_cast<float>(model.rope_magnitude() * std::cos(angle)));
    sine_.push_back(static_cast<float>(model.rope_magnitude() * std::sin(angle)));
  }
}

void Rotation::apply(std::span<float> heads, std::size_t head_dim) const {
  for (std::size_t first = 0; first < heads.size(); first += head_dim) {
    // GGUF's llama keeps the two numbers of a pair side by side.
    for (std::size_t i = 0; i < cosine_.size(); ++i) {
      float& a = heads[first + 2 * i];
      float& b = heads[first + 2 * i + 1];
      const float turned = a * cosine_[i] - b * sine_[i];
      b = a * sine_[i] + b * cosine_[i];
      a = turned;
    }
  }
}

}  // namespace engine
