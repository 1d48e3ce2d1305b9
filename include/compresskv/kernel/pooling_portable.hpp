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
  const std::size_t after = pool == Pool::trailing ? 0 : width / 2;
  const std::size_t before = width - 1 - after;
  for (std::size_t t = first; t < last; ++t) {
    const std::size_t end = (std::min)(t + after + 1, in.size());
    std::size_t j = t < before ? 0 : t - before;
    float value = in[j];
    while (++j < end) {
      value = pool == Pool::max ? (value < in[j] ? in[j] : value) : value + in[j];
    }
    out[t] += pool == Pool::max ? value : value / static_cast<float>(width);
  }
}

}  // namespace portable

}  // namespace compresskv::kernel

#include "compresskv/core/strict_float_end.hpp"
