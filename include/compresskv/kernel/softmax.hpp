#pragma once

#include <cstddef>

#include "compresskv/core/strict_float_begin.hpp"
#include "compresskv/kernel/code_path.hpp"
#include "compresskv/kernel/softmax_portable.hpp"
#include "compresskv/kernel/x86/softmax_avx2_avx512.hpp"

namespace compresskv::kernel {

/// Replaces `count` logits by `2^(logit - max)`: of logits times `log2_e`, softmax but for the division by
/// the sum. -inf gives 0; a NaN or +inf gives a sum that is not finite.
inline Exp2Sum exp2_row(float* row, std::size_t count) {
#if defined(__x86_64__)
  if (uses(CodePath::avx512)) {
    return avx512::exp2_row(row, count);
  }
  if (uses(CodePath::avx2)) {
    return avx2::exp2_row(row, count);
  }
#endif
  return portable::exp2_row(row, count);
}

/// `row[t] = cap * tanh(row[t] / cap)`, absolute error below 2e-7 cap. NaN stays NaN.
inline void soft_cap_row(float* row, std::size_t count, float cap) {
#if defined(__x86_64__)
  if (uses(CodePath::avx2)) {
    avx2::soft_cap(row, count, cap);
    return;
  }
#endif
  portable::soft_cap(row, 0, count, cap);
}

/// `sums[t] += factor * row[t]` for all rows, in order, one rounding each.
inline void add_scaled(const ScaledRows& rows, std::size_t tokens, float* sums) {
#if defined(__x86_64__)
  if (uses(CodePath::avx2)) {
    avx2::add_scaled(rows, tokens, sums);
    return;
  }
#endif
  portable::add_scaled(rows, 0, tokens, sums);
}

/// `maxima[t] = max(maxima[t], factor * row[t])` for all rows.
inline void max_scaled(const ScaledRows& rows, std::size_t tokens, float* maxima) {
#if defined(__x86_64__)
  if (uses(CodePath::avx2)) {
    avx2::max_scaled(rows, tokens, maxima);
    return;
  }
#endif
  portable::max_scaled(rows, 0, tokens, maxima);
}

/// `add_scaled` for one row.
inline void add_scaled(const float* row, float factor, std::size_t tokens, float* sums) {
  add_scaled({.first = row, .factors = &factor}, tokens, sums);
}

}  // namespace compresskv::kernel

#include "compresskv/core/strict_float_end.hpp"
