#pragma once

#include <cstddef>

#include "compresskv/core/strict_float_begin.hpp"
#include "compresskv/kernel/key_rows.hpp"
#include "compresskv/kernel/row_reader.hpp"
#include "compresskv/view/kv_view.hpp"

namespace compresskv::kernel {

/// Calls `visit(row, norm)` with the Euclidean length of every value of a KV head, in order; float64.
/// `buffer` has `head_dim` floats.
template <KvView V, class Visit>
void value_norms(const V& kv, std::size_t kv_head, float* buffer, Visit&& visit) {
  RowReader<Part::values, V>(kv, kv_head, buffer)
      .read_to(kv.rows(kv_head),
               [&](std::size_t row, const float* value) { visit(row, key_norm(value, kv.head_dim())); });
}

}  // namespace compresskv::kernel

#include "compresskv/core/strict_float_end.hpp"
