#pragma once

#include <cstddef>
#include <cstdint>
#include <random>
#include <span>
#include <vector>

#include "tokenizer.hpp"

namespace engine {

/// The token with the highest logit; of equal ones the lowest id. Logits of -inf are masked tokens.
/// Throws `Error` for no logits, NaN, +inf, or when all are masked.
TokenId greedy(std::span<const float> logits);

struct SamplerOptions {
  float temperature = 0.0F;  ///< 0: greedy; otherwise logits are divided by it
  float top_p = 1.0F;        ///< in (0, 1]: sample among the likeliest tokens whose shares first reach it
  std::uint64_t seed = 0;
};

/// Picks the next token. The same seed and logits give the same tokens on every platform whose `exp` agrees:
/// random numbers come from the bits of std::mt19937_64, not from a library's distribution.
/// Belongs to one sequence.
class Sampler {
 public:
  /// Throws `Error` for a temperature that is negative or not finite, or a top_p outside (0, 1].
  explicit Sampler(SamplerOptions options);

  /// One token from logits [vocabulary]. Throws as `greedy` does. Costs a sort where top_p < 1.
  TokenId next(std::span<const float> logits);

 private:
  double uniform();  // in [0, 1)

  SamplerOptions options_;
  std::mt19937_64 generator_;
  std::vector<double> shares_;
  std::vector<std::size_t> order_;
};

}  // namespace engine
