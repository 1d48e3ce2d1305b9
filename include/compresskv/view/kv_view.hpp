#pragma once

#include <concepts>
#include <cstddef>
#include <type_traits>

#include "compresskv/core/element.hpp"
#include "compresskv/core/error.hpp"
#include "compresskv/core/shape.hpp"
#include "compresskv/view/run.hpp"

namespace compresskv {

/// One layer's keys and values in the engine's own memory: a handle that owns nothing and is cheap to copy.
///
/// | member | meaning |
/// | --- | --- |
/// | `key_element`, `value_element` | element types, see `Stored` |
/// | `kv_heads()`, `head_dim()` | the layer's shape |
/// | `rows(kv_head)` | rows in the cache now |
/// | `run_count(kv_head)` | runs that these rows fall into |
/// | `key_run(kv_head, i)`, `value_run(kv_head, i)` | the i-th run, in row order; both of the same rows |
/// | `check_writable(kv_head, first, last)` | optional: throws where rows [first, last) must not be written;
/// by default all may |
template <class V>
concept KvView = std::copyable<V> && requires(const V& view, std::size_t i) {
  requires Stored<typename V::key_element>;
  requires Stored<typename V::value_element>;
  { view.kv_heads() } -> std::convertible_to<std::size_t>;
  { view.head_dim() } -> std::convertible_to<std::size_t>;
  { view.rows(i) } -> std::convertible_to<std::size_t>;
  { view.run_count(i) } -> std::convertible_to<std::size_t>;
  { view.key_run(i, i) } -> std::same_as<Run<typename V::key_element>>;
  { view.value_run(i, i) } -> std::same_as<Run<typename V::value_element>>;
};

/// Bytes of one K and one V row of one KV head.
template <KvView V>
std::size_t kv_row_bytes(const V& view) {
  return row_bytes<typename V::key_element>(view.head_dim()) +
         row_bytes<typename V::value_element>(view.head_dim());
}

namespace detail {

/// Throws ArgumentError when `view` is not a layer of a model of `shape`.
template <KvView V>
void check_view(const V& view, const ModelShape& shape) {
  require(view.kv_heads() == shape.kv_heads, "kv view has ", view.kv_heads(),
          " KV heads, the plan's model has ", shape.kv_heads, ": give the view of one whole layer");
  require(view.head_dim() == shape.head_dim, "kv view has rows of ", view.head_dim(),
          " elements, the plan's head_dim is ", shape.head_dim);
  require(shape.kv_row_bytes == 0 || shape.kv_row_bytes == kv_row_bytes(view), "kv view has ",
          kv_row_bytes(view), " bytes a K and V row, ModelShape::kv_row_bytes is ", shape.kv_row_bytes,
          ": a budget in bytes would not be met; make them agree");
}

/// Throws, as the view says it, where rows [first, last) of a KV head must not be written.
template <KvView V>
void check_writable(const V& view, std::size_t kv_head, std::size_t first, std::size_t last) {
  if constexpr (requires { view.check_writable(kv_head, first, last); }) {
    view.check_writable(kv_head, first, last);
  }
}

}  // namespace detail
}  // namespace compresskv
