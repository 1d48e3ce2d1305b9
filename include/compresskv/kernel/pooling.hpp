#pragma once

#include <cstddef>
#include <span>

#include "compresskv/core/error.hpp"
#include "compresskv/core/float_mode.hpp"
#include "compresskv/core/strict_float_begin.hpp"
#include "compresskv/kernel/code_path.hpp"
#include "compresskv/kernel/pool.hpp"
#include "compresskv/kernel/pooling_portable.hpp"
#include "compresskv/kernel/x86/pooling_avx2.hpp"

namespace compresskv::kernel {

/// Throws ArgumentError for an even width: it would change the length.
inline void check_pool_width(std::size_t width) {
  compresskv::detail::require(width % 2 == 1, "pooling width is ", width,
                              ", must be odd so that every token keeps its place");
}

/// `out[t] += pool(in)[t]`, stride 1, same length. `in` must not be NaN. Cost: width adds a token.
inline void add_pooled(std::span<const float> in, Pool pool, std::size_t width, std::span<float> out) {
  std::size_t done = 0;
#if defined(__x86_64__)
  if (uses(CodePath::avx2) && in.size() >= width + 8) {
    const std::size_t reach = width / 2;
    // Trailing is the average around the token in the middle.
    const std::size_t behind = pool == Pool::trailing ? reach : 0;
    portable::add_pooled(in, pool, width, 0, reach + behind, out);
    const auto inside = pool == Pool::max ? avx2::add_pooled<Pool::max> : avx2::add_pooled<Pool::average>;
    done = behind + inside(in.data(), width, reach, in.size() - reach, out.data() + behind);
  }
#endif
  portable::add_pooled(in, pool, width, done, in.size(), out);
}

/// Sums to means: each divided by `count`.
inline void divide(std::span<float> sums, std::size_t count) {
  const compresskv::detail::PlainFloats plain;
  const auto divisor = static_cast<float>(count);
  std::size_t t = 0;
#if defined(__x86_64__)
  if (uses(CodePath::avx2)) {
    t = avx2::divide(sums, divisor);
  }
#endif
  for (; t < sums.size(); ++t) {
    sums[t] /= divisor;
  }
}

}  // namespace compresskv::kernel

#include "compresskv/core/strict_float_end.hpp"
