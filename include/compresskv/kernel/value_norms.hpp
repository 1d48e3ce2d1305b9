#pragma once

#include <cstddef>

#include "compresskv/core/strict_float_begin.hpp"
#include "compresskv/kernel/decode_row.hpp"
#include "compresskv/kernel/key_rows.hpp"
#include "compresskv/view/kv_view.hpp"

namespace compresskv::kernel {

/// Calls `visit(row, norm)` with the Euclidean length of every value of a KV head, in order; float64.
/// `buffer` has `head_dim` floats.
template <KvView V, class Visit>
void value_norms(const V& kv, std::size_t kv_head, float* buffer, Visit&& visit) {
  std::size_t row = 0;
  for (std::size_t i = 0; i < kv.run_count(kv_head); ++i) {
    const Run<const typename V::value_element> run = kv.value_run(kv_head, i);
    with_element(run, [&](const auto& values) {
      for (std::size_t r = 0; r < values.rows; ++r, ++row) {
        decode_row(values, r, kv.head_dim(), buffer);
        visit(row, key_norm(buffer, kv.head_dim()));
      }
    });
  }
}

}  // namespace compresskv::kernel

#include "compresskv/core/strict_float_end.hpp"
