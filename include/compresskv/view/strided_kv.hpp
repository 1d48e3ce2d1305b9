#pragma once

#include <cstddef>
#include <limits>
#include <utility>

#include "compresskv/core/element.hpp"
#include "compresskv/core/error.hpp"
#include "compresskv/view/kv_view.hpp"
#include "compresskv/view/run.hpp"

namespace compresskv {

/// Shape of one layer's cache.
struct KvShape {
  std::size_t kv_heads = 0;
  std::size_t rows = 0;      ///< rows in use now
  std::size_t head_dim = 0;  ///< elements of one key or value row
  /// Rows that the memory has room for, where the layout's strides depend on it; 0: as many as `rows`.
  std::size_t allocated_rows = 0;
};

namespace layout {

/// Distances in elements between neighbours of each kind.
struct Strides {
  std::size_t head = 0;
  std::size_t row = 0;
  std::size_t dim = 1;
};

/// `[kv_head][row][dim]`, what most engines hold.
struct HeadTokenDim {
  constexpr Strides operator()(const KvShape& shape, std::size_t allocated) const {
    return {allocated * shape.head_dim, shape.head_dim, 1};
  }
};

/// `[row][kv_head][dim]`, the projection's own order.
struct TokenHeadDim {
  constexpr Strides operator()(const KvShape& shape, std::size_t) const {
    return {shape.head_dim, shape.kv_heads * shape.head_dim, 1};
  }
};

inline constexpr HeadTokenDim head_token_dim{};
inline constexpr TokenHeadDim token_head_dim{};

}  // namespace layout

/// Keys and values in two buffers at constant strides: models `KvView` with one run a KV head.
///
/// `Key` and `Value` are the element types. The buffers must hold `allocated_rows` rows of every KV head.
template <Element Key, Element Value = Key>
class StridedKv {
 public:
  using key_element = Key;
  using value_element = Value;

  /// `layout` is `layout::head_token_dim`, `layout::token_head_dim` or a function of (shape, allocated rows)
  /// that gives `layout::Strides`. Throws ArgumentError on a null pointer, a zero size, or more rows than are
  /// allocated.
  template <class Layout>
  requires requires(const Layout& layout, const KvShape& shape) {
    { layout(shape, std::size_t{}) } -> std::convertible_to<layout::Strides>;
  }
  StridedKv(Key* keys, Value* values, const KvShape& shape, const Layout& layout)
      : StridedKv(keys, values, shape, layout(shape, allocated(shape))) {}

  /// Any strides, the same for keys and values.
  /// Throws ArgumentError also when elements of one head would lie over each other.
  StridedKv(Key* keys, Value* values, const KvShape& shape, const layout::Strides& strides)
      : keys_(keys), values_(values), shape_(shape), strides_(strides) {
    detail::require(keys != nullptr && values != nullptr, "StridedKv: ", keys == nullptr ? "keys" : "values",
                    " is null: give the layer's buffer");
    detail::require(shape.kv_heads > 0 && shape.rows > 0 && shape.head_dim > 0, "StridedKv: shape has ",
                    shape.kv_heads, " KV heads, ", shape.rows, " rows, head_dim ", shape.head_dim,
                    ": each must be at least 1");
    detail::require(shape.rows <= allocated(shape), "StridedKv: ", shape.rows, " rows in use, only ",
                    shape.allocated_rows, " allocated");
    check_overlap();
  }

  std::size_t kv_heads() const { return shape_.kv_heads; }
  std::size_t head_dim() const { return shape_.head_dim; }
  std::size_t rows(std::size_t) const { return shape_.rows; }
  std::size_t run_count(std::size_t) const { return 1; }
  Run<Key> key_run(std::size_t kv_head, std::size_t) const { return run(keys_, kv_head); }
  Run<Value> value_run(std::size_t kv_head, std::size_t) const { return run(values_, kv_head); }

 private:
  static std::size_t allocated(const KvShape& shape) {
    return shape.allocated_rows == 0 ? shape.rows : shape.allocated_rows;
  }

  /// Sorted by stride, each axis must step over all that the axes below it cover.
  void check_overlap() const {
    struct Axis {
      const char* name;
      std::size_t stride;
      std::size_t count;
    };
    Axis axes[] = {{"dim", strides_.dim, shape_.head_dim},
                   {"row", strides_.row, shape_.rows},
                   {"head", strides_.head, shape_.kv_heads}};
    for (std::size_t i = 0; i < 3; ++i) {
      for (std::size_t j = i + 1; j < 3; ++j) {
        if (axes[j].stride < axes[i].stride) {
          std::swap(axes[i], axes[j]);
        }
      }
    }
    std::size_t extent = 1;
    for (const Axis& axis : axes) {
      if (axis.count == 1) {
        continue;
      }
      detail::require(axis.stride >= extent, "StridedKv: ", axis.name, " stride is ", axis.stride,
                      " elements, but what lies below it covers ", extent, ": rows would overlap");
      detail::require(axis.stride <= (std::numeric_limits<std::size_t>::max() / 4 - extent) / axis.count,
                      "StridedKv: ", axis.name, " stride ", axis.stride, " times ", axis.count,
                      " does not fit in memory");
      extent += axis.stride * (axis.count - 1);
    }
  }

  template <class T>
  Run<T> run(T* base, std::size_t kv_head) const {
    const bool contiguous = strides_.dim == 1;
    return {.base = base + kv_head * strides_.head,
            .rows = shape_.rows,
            .row_stride = static_cast<std::ptrdiff_t>(strides_.row),
            .chunk = contiguous ? shape_.head_dim : 1,
            .chunk_stride = static_cast<std::ptrdiff_t>(contiguous ? shape_.head_dim : strides_.dim)};
  }

  Key* keys_;
  Value* values_;
  KvShape shape_;
  layout::Strides strides_;
};

template <class Key, class Value, class Layout>
StridedKv(Key*, Value*, KvShape, Layout) -> StridedKv<Key, Value>;

static_assert(KvView<StridedKv<float>> && KvView<StridedKv<Eigen::half, Eigen::bfloat16>>);

}  // namespace compresskv
