#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <span>

#include "compresskv/core/borrowed.hpp"
#include "compresskv/core/element.hpp"
#include "compresskv/core/error.hpp"
#include "compresskv/core/sizes.hpp"
#include "compresskv/view/kv_view.hpp"
#include "compresskv/view/layout.hpp"
#include "compresskv/view/placement.hpp"
#include "compresskv/view/run.hpp"

namespace compresskv {

/// Shape of one layer's cache.
struct KvShape {
  std::size_t kv_heads = 0;
  std::size_t rows = 0;      ///< rows in use now
  std::size_t head_dim = 0;  ///< elements of one key or value row
  /// Rows that the memory has room for, where the layout's strides depend on it; 0: as many as `rows`.
  std::size_t allocated_rows = 0;
  /// Ragged caches: rows in use of each KV head, in place of `rows`. Must outlive the view.
  Borrowed<const std::size_t> head_rows = {};
};

namespace detail {

/// Fills in what the shape leaves out: allocated rows, and `rows` of a ragged cache (its longest head).
/// Throws ArgumentError on a zero size, a wrong number of lengths, or more rows than are allocated or than
/// positions can count.
inline void check_kv_shape(const char* what, KvShape& shape) {
  require(shape.head_rows.empty() || shape.head_rows.size() == shape.kv_heads, what, ": ",
          shape.head_rows.size(), " head_rows for ", shape.kv_heads, " KV heads: give one length a head");
  for (std::size_t head = 0; head < shape.head_rows.size(); ++head) {
    require(shape.head_rows[head] > 0, what, ": head_rows of KV head ", head,
            " is 0: each head has at least one row");
    shape.rows = head == 0 ? shape.head_rows[0] : (std::max)(shape.rows, shape.head_rows[head]);
  }
  require(shape.kv_heads > 0 && shape.rows > 0 && shape.head_dim > 0, what, ": shape has ", shape.kv_heads,
          " KV heads, ", shape.rows, " rows, head_dim ", shape.head_dim, ": each must be at least 1");
  shape.allocated_rows = shape.allocated_rows == 0 ? shape.rows : shape.allocated_rows;
  require(shape.rows <= shape.allocated_rows, what, ": ", shape.rows, " rows in use, only ",
          shape.allocated_rows, " allocated");
  require(shape.rows <= max_rows, what, ": ", shape.rows,
          " rows in use, positions are held in 32 bits: at most ", max_rows);
}

}  // namespace detail

/// Keys and values in two buffers at constant strides: models `KvView` with one run a KV head.
///
/// `Key` and `Value` are the element types: `Element`s, or quantised blocks, whose strides count blocks.
/// Layouts are those of `layout`, or any strides; keys and values may differ in both.
template <Stored Key, Stored Value = Key>
requires(!std::same_as<Key, AffineInt8> && !std::same_as<Value, AffineInt8>) class StridedKv {
 public:
  using key_element = Key;
  using value_element = Value;

  /// Buffers of unknown size, large enough for `allocated_rows` rows of every KV head.
  /// Throws ArgumentError on a null pointer, a zero size, more rows than are allocated, blocks that do not
  /// divide head_dim, or strides that lay rows over each other.
  template <layout::Layout KeyLayout = layout::Strides>
  StridedKv(Key* keys, Value* values, const KvShape& shape, const KeyLayout& layout)
      : StridedKv(keys, values, shape, layout, layout) {}
  template <layout::Layout KeyLayout = layout::Strides, layout::Layout ValueLayout = layout::Strides>
  StridedKv(Key* keys, Value* values, const KvShape& shape, const KeyLayout& key_layout,
            const ValueLayout& value_layout)
      : StridedKv(Borrowed<Key>(keys, detail::unknown_size<Key>),
                  Borrowed<Value>(values, detail::unknown_size<Value>), shape, key_layout, value_layout) {}

  /// Buffers of known size: also throws where a row would leave its buffer.
  template <layout::Layout KeyLayout = layout::Strides>
  StridedKv(Borrowed<Key> keys, Borrowed<Value> values, const KvShape& shape, const KeyLayout& layout)
      : StridedKv(keys, values, shape, layout, layout) {}
  template <layout::Layout KeyLayout = layout::Strides, layout::Layout ValueLayout = layout::Strides>
  StridedKv(Borrowed<Key> keys, Borrowed<Value> values, const KvShape& shape, const KeyLayout& key_layout,
            const ValueLayout& value_layout)
      : keys_(keys.data()),
        values_(values.data()),
        shape_(checked(keys.data(), values.data(), shape)),
        key_placement_(place<Key>("StridedKv keys", shape_, key_layout, keys.size())),
        value_placement_(place<Value>("StridedKv values", shape_, value_layout, values.size())) {}

  std::size_t kv_heads() const { return shape_.kv_heads; }
  std::size_t head_dim() const { return shape_.head_dim; }
  std::size_t rows(std::size_t kv_head) const {
    return shape_.head_rows.empty() ? shape_.rows : shape_.head_rows[kv_head];
  }
  std::size_t run_count(std::size_t) const { return 1; }
  Run<Key> key_run(std::size_t kv_head, std::size_t) const {
    return key_placement_.run(keys_, kv_head, rows(kv_head));
  }
  Run<Value> value_run(std::size_t kv_head, std::size_t) const {
    return value_placement_.run(values_, kv_head, rows(kv_head));
  }

 private:
  static KvShape checked(const void* keys, const void* values, KvShape shape) {
    detail::require(keys != nullptr && values != nullptr, "StridedKv: ", keys == nullptr ? "keys" : "values",
                    " is null: give the layer's buffer");
    detail::check_kv_shape("StridedKv", shape);
    return shape;
  }

  template <Stored T, class L>
  static detail::Placement place(const char* what, const KvShape& shape, const L& layout, std::size_t size) {
    const layout::Extents allocated{.kv_heads = shape.kv_heads,
                                    .rows = shape.allocated_rows,
                                    .units = detail::units_of_row<T>(what, shape.head_dim)};
    layout::Extents used = allocated;
    used.rows = shape.rows;
    return detail::Placement(what, detail::checked_strides(what, layout, allocated, sizeof(T)), used, size,
                             sizeof(T));
  }

  Key* keys_;
  Value* values_;
  KvShape shape_;
  detail::Placement key_placement_;
  detail::Placement value_placement_;
};

template <class Key, class Value, class L = layout::Strides>
StridedKv(Key*, Value*, KvShape, L) -> StridedKv<Key, Value>;
template <class Key, class Value, class L = layout::Strides, class M = layout::Strides>
StridedKv(Key*, Value*, KvShape, L, M) -> StridedKv<Key, Value>;
template <class Key, class Value, class L = layout::Strides>
StridedKv(std::span<Key>, std::span<Value>, KvShape, L) -> StridedKv<Key, Value>;
template <class Key, class Value, class L = layout::Strides, class M = layout::Strides>
StridedKv(std::span<Key>, std::span<Value>, KvShape, L, M) -> StridedKv<Key, Value>;

static_assert(KvView<StridedKv<float>> && KvView<StridedKv<Eigen::half, Eigen::bfloat16>> &&
              KvView<StridedKv<BlockQ8_0, BlockQ4_0>>);

}  // namespace compresskv
