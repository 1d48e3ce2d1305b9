#pragma once

#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstddef>
#include <span>

#include "compresskv/core/element.hpp"
#include "compresskv/kernel/code_path.hpp"
#include "compresskv/kernel/logits.hpp"
#include "compresskv/kernel/softmax.hpp"
#include "compresskv/kernel/window_attention.hpp"
#include "compresskv/view/kv_view.hpp"

namespace compresskv::kernel {

namespace portable {

template <Element T>
void add_row(const T* value, float weight, std::size_t first, std::size_t count, float* out) {
  for (std::size_t e = first; e < count; ++e) {
    out[e] = std::fma(weight, to_float(value[e]), out[e]);
  }
}

}  // namespace portable

#if defined(__x86_64__)
namespace avx2 {

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

}  // namespace avx2
#endif

/// `out[e] += weight * value[e]`, one rounding each.
template <Element T>
void add_row(const T* value, float weight, std::size_t count, float* out) {
#if defined(__x86_64__)
  if (code_path() == CodePath::avx2) {
    avx2::add_row(value, weight, count, out);
    return;
  }
#endif
  portable::add_row(value, weight, 0, count, out);
}

/// Attention of one query over one KV head's rows, as they stand in the cache: full or compressed alike.
///
/// `query` and `out` have `head_dim` floats, `attention` one float a row; on return it holds the softmax
/// weights. `scratch` has `2 * round_up_to_lanes(head_dim)` floats. Rows are added in ascending order, so the
/// result does not depend on the runs. Cost: keys and values are read once.
template <KvView V>
void decode_attention(const V& kv, std::size_t kv_head, const float* query, float scale,
                      std::span<float> scratch, std::span<float> attention, float* out) {
  const std::size_t head_dim = kv.head_dim();
  const std::size_t padded = round_up_to_lanes(head_dim);
  const std::size_t rows = kv.rows(kv_head);
  assert(attention.size() >= rows && scratch.size() >= 2 * padded);
  float* padded_query = scratch.data();
  float* row_buffer = scratch.data() + padded;
  std::copy_n(query, head_dim, padded_query);
  std::fill(padded_query + head_dim, padded_query + padded, 0.0F);
  const QueryBlock block{.data = padded_query, .count = 1, .head_dim = head_dim};
  detail::logits_of_rows(kv, kv_head, 0, rows, block, scale, row_buffer, attention.data(), rows);
  const float inverse = 1.0F / exp_row(attention.data(), rows);

  std::fill_n(out, head_dim, 0.0F);
  std::size_t t = 0;
  for (std::size_t i = 0; i < kv.run_count(kv_head); ++i) {
    const Run<const typename V::value_element> run = kv.value_run(kv_head, i);
    for (std::size_t r = 0; r < run.rows; ++r, ++t) {
      attention[t] *= inverse;
      if constexpr (Element<typename V::value_element>) {
        if (run.chunk >= head_dim) {
          add_row(run.row(r), attention[t], head_dim, out);
          continue;
        }
      }
      decode_row(run, r, head_dim, row_buffer);
      add_row(row_buffer, attention[t], head_dim, out);
    }
  }
}

}  // namespace compresskv::kernel
