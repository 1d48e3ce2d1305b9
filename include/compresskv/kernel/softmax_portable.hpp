#pragma once

#include <cstddef>
#include <numbers>

#include "compresskv/core/float_bits.hpp"
#include "compresskv/core/strict_float_begin.hpp"
#include "compresskv/kernel/exp2.hpp"
#include "compresskv/kernel/fused.hpp"
#include "compresskv/kernel/lanes.hpp"

// Apart from softmax.hpp, as the functions in x86/ include it: they call these for what fills no register.
namespace compresskv::kernel {

/// e^x = 2^(x log2(e)): the factor goes into the scale of the logits.
inline constexpr float log2_e = std::numbers::log2e_v<float>;

/// What `exp2_row` returns of a row.
struct Exp2Sum {
  float max;  ///< highest logit; NaN ones are skipped
  float sum;  ///< of `2^(logit - max)`
};

/// Rows of weights and a factor for each.
struct ScaledRows {
  const float* first = nullptr;
  std::size_t stride = 0;  ///< floats from a row to the next
  std::size_t count = 1;
  const float* factors = nullptr;
  std::size_t factor_stride = 0;  ///< floats from a factor to the next

  const float* row(std::size_t index) const { return first + index * stride; }
  float factor(std::size_t index) const { return factors[index * factor_stride]; }
};

namespace portable {

inline float row_max(const float* row, std::size_t count) {
  float max = compresskv::detail::minus_infinity;
  for (std::size_t t = 0; t < count; ++t) {
    max = row[t] > max ? row[t] : max;
  }
  return max;
}

inline void exp2_tail(float* row, std::size_t first, std::size_t count, float shift, Lanes& lanes) {
  for (std::size_t t = first; t < count; ++t) {
    row[t] = exp2(row[t] - shift);
    lanes[t % lane_count] += row[t];
  }
}

/// What is subtracted from a row's logits: their maximum, or 0 where all are -inf or NaN, so that -inf gives
/// 0 there too.
inline float shift_of(float max) { return compresskv::detail::is_minus_infinity(max) ? 0.0F : max; }

inline Exp2Sum exp2_row(float* row, std::size_t count) {
  const float max = row_max(row, count);
  Lanes lanes{};
  exp2_tail(row, 0, count, shift_of(max), lanes);
  return {.max = max, .sum = kernel::fold(lanes)};
}

inline void soft_cap(float* row, std::size_t first, std::size_t count, float cap) {
  const float inverse = 1.0F / cap;
  for (std::size_t t = first; t < count; ++t) {
    // tanh |x| = (1 - e^-2|x|) / (1 + e^-2|x|), so that one exp2 serves all code paths.
    const float decay = exp2(-2.0F * log2_e * __builtin_fabsf(row[t] * inverse));
    row[t] = __builtin_copysignf(cap * ((1.0F - decay) / (1.0F + decay)), row[t]);
  }
}

inline void add_scaled(const ScaledRows& rows, std::size_t first, std::size_t tokens, float* sums) {
  for (std::size_t i = 0; i < rows.count; ++i) {
    for (std::size_t t = first; t < tokens; ++t) {
      sums[t] = fused(rows.row(i)[t], rows.factor(i), sums[t]);
    }
  }
}

inline void max_scaled(const ScaledRows& rows, std::size_t first, std::size_t tokens, float* maxima) {
  for (std::size_t i = 0; i < rows.count; ++i) {
    for (std::size_t t = first; t < tokens; ++t) {
      const float value = rows.row(i)[t] * rows.factor(i);
      maxima[t] = value > maxima[t] ? value : maxima[t];
    }
  }
}

}  // namespace portable

}  // namespace compresskv::kernel

#include "compresskv/core/strict_float_end.hpp"
