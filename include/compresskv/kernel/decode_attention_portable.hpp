#pragma once

#include <cstddef>

#include "compresskv/core/element.hpp"
#include "compresskv/core/strict_float_begin.hpp"
#include "compresskv/kernel/fused.hpp"
#include "compresskv/kernel/lanes.hpp"

// Apart from decode_attention.hpp, as the functions in x86/ include it: they call these for what fills no
// register.
namespace compresskv::kernel::portable {

/// `query . key` of one padded query and one decoded key, by lanes.
inline float dot_row(const float* query, const float* key, std::size_t head_dim) {
  Lanes lanes{};
  for (std::size_t e = 0; e < head_dim; ++e) {
    lanes[e % lane_count] = fused(query[e], key[e], lanes[e % lane_count]);
  }
  return kernel::fold(lanes);
}

template <Element T>
void add_row(const T* value, float weight, std::size_t first, std::size_t count, float* out) {
  for (std::size_t e = first; e < count; ++e) {
    out[e] = fused(weight, to_float(value[e]), out[e]);
  }
}

}  // namespace compresskv::kernel::portable

#include "compresskv/core/strict_float_end.hpp"
