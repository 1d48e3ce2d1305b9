#pragma once

#include <cstddef>

#include "compresskv/core/strict_float_begin.hpp"
#include "compresskv/kernel/fused.hpp"
#include "compresskv/kernel/key_blocks.hpp"
#include "compresskv/kernel/packed_queries.hpp"

namespace compresskv::kernel::portable {

/// `out[q * out_stride + k] = scale * (query q . key k)`. Even and odd elements have a sum each, in order,
/// each addition fused; at the end the two are added: the order of every path.
inline void dot(const detail::ContiguousKeys<float>& keys, const PackedQueries& queries, float scale,
                float* out, std::size_t out_stride) {
  for (std::size_t q = 0; q < queries.count; ++q) {
    const float* query =
        queries.data +
        (q / queries_per_panel * queries.steps() * queries_per_panel + q % queries_per_panel) * 2;
    for (std::size_t k = 0; k < keys.count; ++k) {
      const float* key = keys.row(k);
      float even = 0.0F;
      float odd = 0.0F;
      for (std::size_t s = 0; s < queries.steps(); ++s) {
        even = fused(query[s * PackedQueries::floats_per_step], key[2 * s], even);
        odd = fused(query[s * PackedQueries::floats_per_step + 1], key[2 * s + 1], odd);
      }
      out[q * out_stride + k] = (even + odd) * scale;
    }
  }
}

}  // namespace compresskv::kernel::portable

#include "compresskv/core/strict_float_end.hpp"
