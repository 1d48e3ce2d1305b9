#pragma once

#include <cmath>
#include <cstddef>

#include "compresskv/core/strict_float_begin.hpp"
#include "compresskv/kernel/row_reader.hpp"
#include "compresskv/view/kv_view.hpp"

namespace compresskv::kernel {

/// Calls `visit(row, key)` for every key of a KV head, in order, `key` being `head_dim` float32 in `buffer`.
template <KvView V, class Visit>
void for_each_key(const V& kv, std::size_t kv_head, float* buffer, Visit&& visit) {
  RowReader<Part::keys, V>(kv, kv_head, buffer).read_to(kv.rows(kv_head), visit);
}

/// Square of a decoded row's Euclidean length. Sums in float64, in order.
inline double squared_norm(const float* row, std::size_t head_dim) {
  double sum = 0.0;
  for (std::size_t e = 0; e < head_dim; ++e) {
    sum += static_cast<double>(row[e]) * static_cast<double>(row[e]);
  }
  return sum;
}

/// Euclidean length of a decoded key.
inline double key_norm(const float* key, std::size_t head_dim) {
  return std::sqrt(squared_norm(key, head_dim));
}

}  // namespace compresskv::kernel

#include "compresskv/core/strict_float_end.hpp"
