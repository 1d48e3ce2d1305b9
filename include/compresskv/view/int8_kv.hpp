#pragma once

#include <cstddef>
#include <cstdint>

#include "compresskv/core/borrowed.hpp"
#include "compresskv/core/element.hpp"
#include "compresskv/core/error.hpp"
#include "compresskv/core/sizes.hpp"
#include "compresskv/view/kv_view.hpp"
#include "compresskv/view/layout.hpp"
#include "compresskv/view/placement.hpp"
#include "compresskv/view/strided_kv.hpp"

namespace compresskv {

/// int8 rows of all KV heads, with one scale and one zero point a token and head at `[kv_head][row]`:
/// element = scale * (quant - zero).
struct Int8Rows {
  Borrowed<std::int8_t> data = {};
  Borrowed<float> scales = {};
  Borrowed<float> zeros = {};
};

/// Keys and values as `Int8Rows`: models `KvView` with one run a KV head. Rows move with their scale and zero
/// point and are never re-quantised.
class Int8Kv {
 public:
  using key_element = AffineInt8;
  using value_element = AffineInt8;

  /// `layout` places the int8 data; a row lies side by side.
  /// Throws ArgumentError on a zero size, a buffer too small, or strides that lay rows over each other.
  template <layout::Layout L>
  Int8Kv(const Int8Rows& keys, const Int8Rows& values, const KvShape& shape, const L& layout)
      : shape_(shape), keys_(keys), values_(values), placement_(place(layout)) {}

  std::size_t kv_heads() const { return shape_.kv_heads; }
  std::size_t head_dim() const { return shape_.head_dim; }
  std::size_t rows(std::size_t kv_head) const {
    return shape_.head_rows.empty() ? shape_.rows : shape_.head_rows[kv_head];
  }
  std::size_t run_count(std::size_t) const { return 1; }
  Run<AffineInt8> key_run(std::size_t kv_head, std::size_t) const { return run(keys_, kv_head); }
  Run<AffineInt8> value_run(std::size_t kv_head, std::size_t) const { return run(values_, kv_head); }

 private:
  template <class L>
  detail::Placement place(const L& layout) {
    detail::check_kv_shape("Int8Kv", shape_);
    detail::require(detail::fits_in_memory(sizeof(float), {shape_.kv_heads, shape_.allocated_rows}),
                    "Int8Kv: ", shape_.kv_heads, " KV heads of ", shape_.allocated_rows,
                    " rows: so many scales do not fit in memory");
    // Those behind the rows of the last head are not read.
    const std::size_t parameters = (shape_.kv_heads - 1) * shape_.allocated_rows + shape_.rows;
    for (const Int8Rows* rows : {&keys_, &values_}) {
      const char* name = rows == &keys_ ? "keys" : "values";
      detail::require(rows->scales.size() >= parameters && rows->zeros.size() >= parameters, "Int8Kv: ", name,
                      " have ", rows->scales.size(), " scales and ", rows->zeros.size(), " zero points, ",
                      shape_.kv_heads, " KV heads of ", shape_.allocated_rows, " rows need ", parameters,
                      " of each");
    }
    const layout::Extents allocated{
        .kv_heads = shape_.kv_heads, .rows = shape_.allocated_rows, .units = shape_.head_dim};
    layout::Extents used = allocated;
    used.rows = shape_.rows;
    const layout::Strides strides = detail::checked_strides("Int8Kv", layout, allocated, 1);
    detail::require(strides.chunk == 0 || strides.chunk >= shape_.head_dim, "Int8Kv: chunks of ",
                    strides.chunk, " units: int8 rows lie side by side");
    detail::Placement("Int8Kv values", strides, used, values_.data.size(), 1);
    return detail::Placement("Int8Kv keys", strides, used, keys_.data.size(), 1);
  }

  Run<AffineInt8> run(const Int8Rows& rows_of, std::size_t kv_head) const {
    const std::size_t parameters = kv_head * shape_.allocated_rows;
    return {.base = rows_of.data.data() + kv_head * placement_.strides().head,
            .scales = rows_of.scales.data() + parameters,
            .zeros = rows_of.zeros.data() + parameters,
            .rows = rows(kv_head),
            .row_stride = static_cast<std::ptrdiff_t>(placement_.strides().row),
            .parameter_stride = 1};
  }

  KvShape shape_;
  Int8Rows keys_;
  Int8Rows values_;
  detail::Placement placement_;
};

}  // namespace compresskv
