#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <type_traits>

#include "compresskv/core/element.hpp"
#include "compresskv/core/strict_float_begin.hpp"
#include "compresskv/view/run.hpp"

namespace compresskv::kernel {

/// Copies row `index` of a run to `head_dim` float32, whatever its layout and element type.
template <Stored T>
void decode_row(const Run<const T>& run, std::size_t index, std::size_t head_dim, float* out) {
  const T* row = run.row(index);
  const std::size_t units = head_dim / elements_per_unit<T>();
  if constexpr (std::same_as<T, float>) {
    if (run.chunk >= units) {
      std::copy_n(row, units, out);
      return;
    }
  }
  for (std::size_t u = 0; u < units; u += run.chunk) {
    const T* chunk = row + static_cast<std::ptrdiff_t>(u / run.chunk) * run.chunk_stride;
    const std::size_t count = (std::min)(run.chunk, units - u);
    for (std::size_t i = 0; i < count; ++i) {
      if constexpr (ElementBlock<T>) {
        decode_block(chunk[i], out + (u + i) * T::elements);
      } else {
        out[u + i] = to_float(chunk[i]);
      }
    }
  }
}

inline void decode_row(const Run<const AffineInt8>& run, std::size_t index, std::size_t head_dim,
                       float* out) {
  const auto offset = static_cast<std::ptrdiff_t>(index);
  const std::int8_t* row = run.base + offset * run.row_stride;
  const float scale = run.scales[offset * run.parameter_stride];
  const float zero = run.zeros[offset * run.parameter_stride];
  for (std::size_t e = 0; e < head_dim; ++e) {
    out[e] = scale * (static_cast<float>(row[e]) - zero);
  }
}

}  // namespace compresskv::kernel

#include "compresskv/core/strict_float_end.hpp"
