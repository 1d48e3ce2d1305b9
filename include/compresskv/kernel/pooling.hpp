#pragma once

#include <algorithm>
#include <cstddef>
#include <span>

#include "compresskv/core/error.hpp"

namespace compresskv::kernel {

/// How neighbouring tokens share their scores (METHOD.md section 2, step 5).
enum class Pool {
  average,  ///< divides by the width at the borders too: padding counts as zeros
  max,      ///< ignores padding
};

/// Throws ArgumentError for an even width: it would change the length.
inline void check_pool_width(std::size_t width) {
  compresskv::detail::require(width % 2 == 1, "pooling width is ", width,
                              ", must be odd so that every token keeps its place");
}

/// `out[t] += pool(in)[t]`, stride 1, same length. Cost: width adds a token.
inline void add_pooled(std::span<const float> in, Pool pool, std::size_t width, std::span<float> out) {
  const std::size_t reach = width / 2;
  const std::size_t count = in.size();
  const auto pooled = [&](std::size_t first, std::size_t last) {
    float value = in[first];
    for (std::size_t j = first + 1; j < last; ++j) {
      value = pool == Pool::average ? value + in[j] : std::max(value, in[j]);
    }
    return pool == Pool::average ? value / static_cast<float>(width) : value;
  };
  for (std::size_t t = 0; t < count; ++t) {
    out[t] += pooled(t < reach ? 0 : t - reach, std::min(t + reach + 1, count));
  }
}

}  // namespace compresskv::kernel
