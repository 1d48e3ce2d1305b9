#pragma once

#include <algorithm>
#include <cstddef>
#include <span>

#include "compresskv/core/strict_float_begin.hpp"
#include "compresskv/kernel/pool.hpp"

// Apart from pooling.hpp, as x86/pooling_avx2.hpp includes it.
namespace compresskv::kernel {

namespace portable {

/// `out[t] += pool(in)[t]` for `first <= t < last`.
inline void add_pooled(std::span<const float> in, Pool pool, std::size_t width, std::size_t first,
                       std::size_t last, std::span<float> out) {
  const std::size_t reach = width / 2;
  for (std::size_t t = first; t < last; ++t) {
    const std::size_t end = (std::min)(t + reach + 1, in.size());
    std::size_t j = t < reach ? 0 : t - reach;
    float value = in[j];
    while (++j < end) {
      value = pool == Pool::average ? value + in[j] : (value < in[j] ? in[j] : value);
    }
    out[t] += pool == Pool::average ? value / static_cast<float>(width) : value;
  }
}

}  // namespace portable

}  // namespace compresskv::kernel

#include "compresskv/core/strict_float_end.hpp"
