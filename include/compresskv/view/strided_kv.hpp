#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <span>
#include <type_traits>
#include <utility>

#include "compresskv/core/borrowed.hpp"
#include "compresskv/core/element.hpp"
#include "compresskv/core/error.hpp"
#include "compresskv/core/sizes.hpp"
#include "compresskv/view/argument.hpp"
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
template <class Key, class Value = Key>
class StridedKv {
 public:
  using key_element = Key;
  using value_element = Value;
  static_assert(detail::plain_stored<Key> && detail::plain_stored<Value>,
                "StridedKv<Key, Value> holds float, half, bfloat16, BlockQ8_0 or BlockQ4_0: see Stored "
                "in compresskv/core/element.hpp; int8 rows have the view Int8Kv");

  /// `keys` and `values` are pointers to buffers of unknown size, large enough for `allocated_rows` rows of
  /// every KV head, or spans (vectors, arrays) of known size; the view owns neither.
  /// Throws ArgumentError on null, a zero size, more rows than are allocated, blocks that do not divide
  /// head_dim, strides that lay rows over each other, or rows that leave a buffer of known size.
  template <class Keys, class Values, class Shape = KvShape, class KeyLayout = layout::Strides,
            class ValueLayout = layout::Strides>
  StridedKv(Keys&& keys, Values&& values, const Shape& shape, const KeyLayout& key_layout,
            const ValueLayout& value_layout) {
    constexpr bool elements = detail::points_to<Keys, Key> && detail::points_to<Values, Value>;
    constexpr bool kept = detail::outlives<Keys&&> && detail::outlives<Values&&>;
    constexpr bool shapes = std::is_convertible_v<const Shape&, KvShape>;
    constexpr bool layouts = layout::Layout<KeyLayout> && layout::Layout<ValueLayout>;
    static_assert(
        elements,
        "keys and values come first, as pointers or spans of the view's elements: float, half, "
        "bfloat16, BlockQ8_0 or BlockQ4_0; as_half or as_bfloat16 takes raw bits for what they are");
    static_assert(kept || !elements, "keys and values are not copied: give variables that outlive the view");
    static_assert(shapes || !elements,
                  "the third argument is a KvShape: StridedKv{keys, values, shape, layout}");
    static_assert(
        layouts || !shapes || !elements,
        "the layout is missing or none: StridedKv{keys, values, shape, layout} takes layout::head_token_dim, "
        "token_head_dim, head_dim_token, SplitDim, Strides or a function of layout::Extents");
    if constexpr (elements && kept && shapes && layouts) {
      const Borrowed<Key> key_memory = detail::memory_of<Key>(std::forward<Keys>(keys));
      const Borrowed<Value> value_memory = detail::memory_of<Value>(std::forward<Values>(values));
      keys_ = key_memory.data();
      values_ = value_memory.data();
      shape_ = shape;
      detail::require(keys_ != nullptr && values_ != nullptr,
                      "StridedKv: ", keys_ == nullptr ? "keys" : "values",
                      " is null: give the layer's buffer");
      detail::check_kv_shape("StridedKv", shape_);
      key_placement_ = place<Key>("StridedKv keys", key_layout, key_memory.size());
      value_placement_ = place<Value>("StridedKv values", value_layout, value_memory.size());
    }
  }
  template <class Keys, class Values, class Shape = KvShape, class KvLayout = layout::Strides>
  StridedKv(Keys&& keys, Values&& values, const Shape& shape, const KvLayout& layout)
      : StridedKv(std::forward<Keys>(keys), std::forward<Values>(values), shape, layout, layout) {}

  template <class Keys, class Values, class Shape = KvShape>
  StridedKv(Keys&&, Values&&, const Shape&) {
    static_assert(sizeof(Shape) == 0, "the layout is missing: StridedKv{keys, values, shape, layout}");
  }

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
  template <class T, class L>
  detail::Placement place(const char* what, const L& layout, std::size_t size) const {
    const layout::Extents allocated{.kv_heads = shape_.kv_heads,
                                    .rows = shape_.allocated_rows,
                                    .units = detail::units_of_row<T>(what, shape_.head_dim)};
    layout::Extents used = allocated;
    used.rows = shape_.rows;
    return detail::Placement(what, detail::checked_strides(what, layout, allocated, sizeof(T)), used, size,
                             sizeof(T));
  }

  Key* keys_ = nullptr;
  Value* values_ = nullptr;
  KvShape shape_;
  detail::Placement key_placement_;
  detail::Placement value_placement_;
};

template <class Keys, class Values, class Shape = KvShape, class KeyLayout = layout::Strides,
          class ValueLayout = layout::Strides>
StridedKv(Keys&&, Values&&, const Shape&, const KeyLayout& = {}, const ValueLayout& = {})
    -> StridedKv<detail::StoredIn<Keys>, detail::StoredIn<Values>>;

}  // namespace compresskv
