#pragma once

#include <cstddef>

#include "compresskv/core/element.hpp"
#include "compresskv/kernel/decode_attention_portable.hpp"
#include "compresskv/kernel/lanes.hpp"
#include "compresskv/kernel/x86/lanes_avx2.hpp"

#if defined(__x86_64__)
#include <immintrin.h>

#include "compresskv/core/strict_float_begin.hpp"

namespace compresskv::kernel::avx2 {

/// As portable::dot_row; reads `round_up_to_lanes(head_dim)` elements of the key.
template <Element T>
[[gnu::target("avx2,fma,f16c")]] inline float dot_row(const float* query, const T* key,
                                                      std::size_t head_dim) {
  __m256 low = _mm256_setzero_ps();
  __m256 high = low;
  for (std::size_t e = 0; e < head_dim; e += lane_count) {
    low = _mm256_fmadd_ps(_mm256_loadu_ps(query + e), load8(key + e), low);
    high = _mm256_fmadd_ps(_mm256_loadu_ps(query + e + 8), load8(key + e + 8), high);
  }
  return fold(low, high);
}

template <Element T>
[[gnu::target("avx2,fma,f16c")]] inline void add_row(const T* value, float weight, std::size_t count,
                                                     float* out) {
  const __m256 weights = _mm256_set1_ps(weight);
  std::size_t e = 0;
  for (; e + 8 <= count; e += 8) {
    _mm256_storeu_ps(out + e, _mm256_fmadd_ps(weights, load8(value + e), _mm256_loadu_ps(out + e)));
  }
  portable::add_row(value, weight, e, count, out);
}

}  // namespace compresskv::kernel::avx2

#include "compresskv/core/strict_float_end.hpp"
#endif
