#pragma once

#include <algorithm>
#include <cassert>
#include <cstddef>
#include <span>

#include "compresskv/core/element.hpp"
#include "compresskv/core/float_mode.hpp"
#include "compresskv/core/strict_float_begin.hpp"
#include "compresskv/kernel/code_path.hpp"
#include "compresskv/kernel/decode_attention_portable.hpp"
#include "compresskv/kernel/decode_row.hpp"
#include "compresskv/kernel/lanes.hpp"
#include "compresskv/kernel/softmax.hpp"
#include "compresskv/kernel/x86/decode_attention_avx2.hpp"
#include "compresskv/view/kv_view.hpp"

namespace compresskv::kernel {

/// `out[e] += weight * value[e]`, one rounding each.
template <Element T>
void add_row(const T* value, float weight, std::size_t count, float* out) {
#if defined(__x86_64__)
  if (uses(CodePath::avx2)) {
    avx2::add_row(value, weight, count, out);
    return;
  }
#endif
  portable::add_row(value, weight, 0, count, out);
}

namespace detail {

/// `query . key` of row `index`. The sum runs over lanes, other than in `kernel::logits`: a single query
/// fills no register.
template <Stored T>
float dot_row(const Run<const T>& keys, std::size_t index, const float* query, std::size_t head_dim,
              float* row_buffer) {
#if defined(__x86_64__)
  if (uses(CodePath::avx2)) {
    if constexpr (Element<T>) {
      if (keys.chunk >= head_dim && head_dim % lane_count == 0) {
        return avx2::dot_row(query, keys.row(index), head_dim);
      }
    }
    decode_row(keys, index, head_dim, row_buffer);
    std::fill(row_buffer + head_dim, row_buffer + round_up_to_lanes(head_dim), 0.0F);
    return avx2::dot_row(query, static_cast<const float*>(row_buffer), head_dim);
  }
#endif
  decode_row(keys, index, head_dim, row_buffer);
  return portable::dot_row(query, row_buffer, head_dim);
}

}  // namespace detail

/// Attention of one query over one KV head's rows, in place, whether the cache is full or compressed.
///
/// `query` and `out` have `head_dim` floats, `attention` one float a row; on return it holds the softmax
/// weights. `scratch` has `2 * round_up_to_lanes(head_dim)` floats. Rows are added in ascending order, so the
/// result does not depend on the runs. Cost: keys and values are read once.
template <KvView V>
void decode_attention(const V& kv, std::size_t kv_head, const float* query, float scale,
                      std::span<float> scratch, std::span<float> attention, float* out) {
  const compresskv::detail::PlainFloats plain;
  const std::size_t head_dim = kv.head_dim();
  const std::size_t padded = round_up_to_lanes(head_dim);
  const std::size_t rows = kv.rows(kv_head);
  assert(attention.size() >= rows && scratch.size() >= 2 * padded);
  float* padded_query = scratch.data();
  float* row_buffer = scratch.data() + padded;
  std::copy_n(query, head_dim, padded_query);
  std::fill(padded_query + head_dim, padded_query + padded, 0.0F);
  std::size_t row = 0;
  for (std::size_t i = 0; i < kv.run_count(kv_head); ++i) {
    const Run<const typename V::key_element> run = kv.key_run(kv_head, i);
    for (std::size_t r = 0; r < run.rows; ++r, ++row) {
      attention[row] = log2_e * scale * detail::dot_row(run, r, padded_query, head_dim, row_buffer);
    }
  }
  const float inverse = 1.0F / exp2_row(attention.data(), rows).sum;

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

#include "compresskv/core/strict_float_end.hpp"
