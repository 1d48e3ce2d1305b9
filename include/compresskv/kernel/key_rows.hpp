#pragma once

#include <array>
#include <cmath>
#include <cstddef>

#include "compresskv/core/strict_float_begin.hpp"
#include "compresskv/kernel/code_path.hpp"
#include "compresskv/kernel/decode_row.hpp"
#include "compresskv/kernel/lanes.hpp"
#include "compresskv/kernel/row_reader.hpp"
#include "compresskv/kernel/x86/product_of_rows_avx2.hpp"
#include "compresskv/view/kv_view.hpp"

namespace compresskv::kernel {

/// Calls `visit(row, key)` for every key of a KV head, in order, `key` being `head_dim` float32 in `buffer`.
template <KvView V, class Visit>
void for_each_key(const V& kv, std::size_t kv_head, float* buffer, Visit&& visit) {
  RowReader<Part::keys, V>(kv, kv_head, buffer).read_to(kv.rows(kv_head), visit);
}

/// Decodes the key of one row to `head_dim` float32. Cost: a look at each run before it.
template <KvView V>
void read_key(const V& kv, std::size_t kv_head, std::size_t row, float* out) {
  std::size_t begin = 0;
  for (std::size_t i = 0; i < kv.run_count(kv_head); ++i) {
    const Run<const typename V::key_element> run = kv.key_run(kv_head, i);
    if (row < begin + run.rows) {
      with_element(run, [&](const auto& keys) { decode_row(keys, row - begin, kv.head_dim(), out); });
      return;
    }
    begin += run.rows;
  }
}

/// Product of two decoded rows. Sums in float64, in 16 lanes (lanes.hpp).
inline double product_of_rows(const float* a, const float* b, std::size_t head_dim) {
  std::array<double, lane_count> sums{};
  std::size_t e = 0;
#if defined(__x86_64__)
  if (uses(CodePath::avx2)) {
    e = avx2::add_products(a, b, head_dim, sums.data());
  }
#endif
  for (; e < head_dim; ++e) {
    sums[e % lane_count] += static_cast<double>(a[e]) * static_cast<double>(b[e]);
  }
  return fold(sums);
}

/// Square of a decoded row's Euclidean length.
inline double squared_norm(const float* row, std::size_t head_dim) {
  return product_of_rows(row, row, head_dim);
}

/// Euclidean length of a decoded key.
inline double key_norm(const float* key, std::size_t head_dim) {
  return std::sqrt(squared_norm(key, head_dim));
}

}  // namespace compresskv::kernel

#include "compresskv/core/strict_float_end.hpp"
