#pragma once

#include <concepts>
#include <cstddef>
#include <type_traits>

#include "compresskv/core/element.hpp"
#include "compresskv/core/error.hpp"
#include "compresskv/core/shape.hpp"
#include "compresskv/core/sizes.hpp"
#include "compresskv/view/run.hpp"

namespace compresskv {

/// What a view's rows may be: a type, or `AnyElement` where the view tells the kind when the program runs
/// (`AnyKv`).
template <class T>
concept ViewElement = Stored<T> || ElementOfAnyKind<T>;

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
  requires ViewElement<typename V::key_element>;
  requires ViewElement<typename V::value_element>;
  { view.kv_heads() } -> std::convertible_to<std::size_t>;
  { view.head_dim() } -> std::convertible_to<std::size_t>;
  { view.rows(i) } -> std::convertible_to<std::size_t>;
  { view.run_count(i) } -> std::convertible_to<std::size_t>;
  { view.key_run(i, i) } -> std::same_as<Run<typename V::key_element>>;
  { view.value_run(i, i) } -> std::same_as<Run<typename V::value_element>>;
};

namespace detail {

template <class V>
concept HasKeyElement = requires {
  typename V::key_element;
};
template <class V>
concept HasValueElement = requires {
  typename V::value_element;
};
template <class T>
concept Size = std::convertible_to<T, std::size_t>;

}  // namespace detail

/// Whether `V` models `KvView`. Where it does not, what the compiler says names each member that is missing
/// or wrong: write `static_assert(compresskv::models_kv_view<MyKv>());` beside a view of your own.
template <class V>
consteval bool models_kv_view() {
  static_assert(std::copyable<V>,
                "a kv view must be copyable: let it point to the engine's memory, not own it");

  static_assert(detail::HasKeyElement<V>,
                "the kv view lacks key_element, the type that keys are stored as: see Stored in "
                "compresskv/core/element.hpp");
  if constexpr (detail::HasKeyElement<V>) {
    static_assert(ViewElement<typename V::key_element>,
                  "the kv view's key_element is no type that keys can be stored as: see Stored in "
                  "compresskv/core/element.hpp");
    static_assert(
        requires(const V& view, std::size_t i) { view.key_run(i, i); },
        "the kv view lacks key_run(kv_head, i) const that gives the keys of the i-th run");
    if constexpr (requires(const V& view, std::size_t i) { view.key_run(i, i); }) {
      static_assert(
          requires(const V& view, std::size_t i) {
            { view.key_run(i, i) } -> std::same_as<Run<typename V::key_element>>;
          },
          "the kv view's key_run(kv_head, i) must give a Run<key_element>");
    }
  }

  static_assert(detail::HasValueElement<V>,
                "the kv view lacks value_element, the type that values are stored as: see Stored in "
                "compresskv/core/element.hpp");
  if constexpr (detail::HasValueElement<V>) {
    static_assert(ViewElement<typename V::value_element>,
                  "the kv view's value_element is no type that values can be stored as: see Stored in "
                  "compresskv/core/element.hpp");
    static_assert(
        requires(const V& view, std::size_t i) { view.value_run(i, i); },
        "the kv view lacks value_run(kv_head, i) const that gives the values of the i-th run");
    if constexpr (requires(const V& view, std::size_t i) { view.value_run(i, i); }) {
      static_assert(
          requires(const V& view, std::size_t i) {
            { view.value_run(i, i) } -> std::same_as<Run<typename V::value_element>>;
          },
          "the kv view's value_run(kv_head, i) must give a Run<value_element>");
    }
  }

  static_assert(
      requires(const V& view) {
        { view.kv_heads() } -> detail::Size;
      },
      "the kv view lacks kv_heads() const that gives the number of the layer's KV heads");
  static_assert(
      requires(const V& view) {
        { view.head_dim() } -> detail::Size;
      },
      "the kv view lacks head_dim() const that gives the number of elements of one row");
  static_assert(
      requires(const V& view, std::size_t i) {
        { view.rows(i) } -> detail::Size;
      },
      "the kv view lacks rows(kv_head) const that gives the number of rows in the cache now");
  static_assert(
      requires(const V& view, std::size_t i) {
        { view.run_count(i) } -> detail::Size;
      },
      "the kv view lacks run_count(kv_head) const that gives the number of runs that the rows fall into");
  return KvView<V>;
}

/// What the keys of a view are stored as.
template <KvView V>
constexpr ElementKind key_kind(const V& view) {
  if constexpr (ElementOfAnyKind<typename V::key_element>) {
    return view.key_kind();
  } else {
    return kind_of_element<typename V::key_element>();
  }
}

/// What its values are stored as.
template <KvView V>
constexpr ElementKind value_kind(const V& view) {
  if constexpr (ElementOfAnyKind<typename V::value_element>) {
    return view.value_kind();
  } else {
    return kind_of_element<typename V::value_element>();
  }
}

/// Bytes of one K and one V row of one KV head.
template <KvView V>
std::size_t kv_row_bytes(const V& view) {
  const auto bytes = [&]<class T>(T*) { return row_bytes<T>(view.head_dim()); };
  return with_kind(key_kind(view), bytes) + with_kind(value_kind(view), bytes);
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
  for (std::size_t head = 0; head < shape.kv_heads; ++head) {
    const std::size_t rows = view.rows(head);
    require(rows > 0 && rows <= max_rows, "kv view has ", rows, " rows of KV head ", head,
            ": at least 1 and, as positions are held in 32 bits, at most ", max_rows);
  }
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
