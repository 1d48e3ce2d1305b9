#pragma once

#include <array>
#include <concepts>
#include <cstddef>
#include <memory>
#include <type_traits>

#include "compresskv/core/element.hpp"
#include "compresskv/core/error.hpp"
#include "compresskv/view/kv_view.hpp"
#include "compresskv/view/run.hpp"

namespace compresskv {

/// Any `KvView` in one type: models `KvView` with `AnyElement`. Holds a copy of the view, in memory of its
/// own: nothing is allocated. What it costs is a call through a pointer where a view is asked for rows or a
/// run; the kernels ask for the type once a run.
///
/// A view of const elements can be scored and read; where rows would be written, `check_writable` throws.
class AnyKv {
 public:
  using key_element = AnyElement;
  using value_element = AnyElement;
  /// Bytes that a view may have: those of the library need 208 at most.
  static constexpr std::size_t room = 256;

  template <class V>
  requires(!std::same_as<V, AnyKv>) AnyKv(const V& view)
      : kv_heads_(view.kv_heads()), head_dim_(view.head_dim()), functions_(&functions_of<V>) {
    static_assert(models_kv_view<V>(),
                  "an AnyKv is made of a KvView: see compresskv/view/kv_view.hpp for its members");
    static_assert(sizeof(V) <= room && alignof(V) <= alignof(std::max_align_t),
                  "AnyKv has room for views of 256 bytes: let yours point to what it needs");
    std::construct_at(reinterpret_cast<V*>(view_.data()), view);
  }
  AnyKv(const AnyKv& other)
      : kv_heads_(other.kv_heads_), head_dim_(other.head_dim_), functions_(other.functions_) {
    copy_view(other);
  }
  AnyKv& operator=(const AnyKv& other) {
    if (this != &other) {
      destroy_view();
      functions_ = nullptr;  // where copying throws there is no view any more, and nothing to destroy
      copy_view(other);
      kv_heads_ = other.kv_heads_;
      head_dim_ = other.head_dim_;
      functions_ = other.functions_;
    }
    return *this;
  }
  ~AnyKv() { destroy_view(); }

  ElementKind key_kind() const { return functions_->key_kind; }
  ElementKind value_kind() const { return functions_->value_kind; }
  std::size_t kv_heads() const { return kv_heads_; }
  std::size_t head_dim() const { return head_dim_; }
  std::size_t rows(std::size_t kv_head) const { return functions_->rows(view_.data(), kv_head); }
  std::size_t run_count(std::size_t kv_head) const { return functions_->run_count(view_.data(), kv_head); }
  Run<AnyElement> key_run(std::size_t kv_head, std::size_t i) const {
    return functions_->key_run(view_.data(), kv_head, i);
  }
  Run<AnyElement> value_run(std::size_t kv_head, std::size_t i) const {
    return functions_->value_run(view_.data(), kv_head, i);
  }
  /// Throws, as the view says it, where rows [first, last) must not be written, and where its elements are
  /// const.
  void check_writable(std::size_t kv_head, std::size_t first, std::size_t last) const {
    functions_->check_writable(view_.data(), kv_head, first, last);
  }

 private:
  struct Functions {
    ElementKind key_kind;
    ElementKind value_kind;
    void (*copy)(const void* from, void* to);  // null: the bytes are enough
    void (*destroy)(void* view);
    std::size_t (*rows)(const void* view, std::size_t kv_head);
    std::size_t (*run_count)(const void* view, std::size_t kv_head);
    Run<AnyElement> (*key_run)(const void* view, std::size_t kv_head, std::size_t i);
    Run<AnyElement> (*value_run)(const void* view, std::size_t kv_head, std::size_t i);
    void (*check_writable)(const void* view, std::size_t kv_head, std::size_t first, std::size_t last);
  };

  /// Runs of const elements too: `check_writable` guards them.
  template <class T>
  static Run<AnyElement> erased(const Run<T>& run) {
    using E = std::remove_const_t<T>;
    if constexpr (std::same_as<E, AffineInt8>) {
      return Run<AnyElement>::of(Run<E>{const_cast<std::int8_t*>(run.base), const_cast<float*>(run.scales),
                                        const_cast<float*>(run.zeros), run.rows, run.row_stride,
                                        run.parameter_stride});
    } else {
      return Run<AnyElement>::of(
          Run<E>{const_cast<E*>(run.base), run.rows, run.row_stride, run.chunk, run.chunk_stride});
    }
  }

  template <class V>
  static constexpr Functions functions_of = {
      .key_kind = kind_of_element<typename V::key_element>(),
      .value_kind = kind_of_element<typename V::value_element>(),
      .copy = std::is_trivially_copyable_v<V>
                  ? nullptr
                  : +[](const void* from,
                        void* to) { std::construct_at(static_cast<V*>(to), *static_cast<const V*>(from)); },
      .destroy = std::is_trivially_destructible_v<V>
                     ? nullptr
                     : +[](void* view) { std::destroy_at(static_cast<V*>(view)); },
      .rows = [](const void* view, std::size_t kv_head) -> std::size_t {
        return static_cast<const V*>(view)->rows(kv_head);
      },
      .run_count = [](const void* view, std::size_t kv_head) -> std::size_t {
        return static_cast<const V*>(view)->run_count(kv_head);
      },
      .key_run = [](const void* view, std::size_t kv_head,
                    std::size_t i) { return erased(static_cast<const V*>(view)->key_run(kv_head, i)); },
      .value_run = [](const void* view, std::size_t kv_head,
                      std::size_t i) { return erased(static_cast<const V*>(view)->value_run(kv_head, i)); },
      .check_writable =
          [](const void* view, std::size_t kv_head, std::size_t first, std::size_t last) {
            detail::require(first >= last || (!std::is_const_v<typename V::key_element> &&
                                              !std::is_const_v<typename V::value_element>),
                            "rows ", first, " to ", last, " of KV head ", kv_head,
                            " would be written, the view's elements are const: give a view of the cache to "
                            "be written");
            detail::check_writable(*static_cast<const V*>(view), kv_head, first, last);
          }};

  void copy_view(const AnyKv& other) {
    if (other.functions_->copy == nullptr) {
      view_ = other.view_;
    } else {
      other.functions_->copy(other.view_.data(), view_.data());
    }
  }
  void destroy_view() {
    if (functions_ != nullptr && functions_->destroy != nullptr) {
      functions_->destroy(view_.data());
    }
  }

  std::size_t kv_heads_;
  std::size_t head_dim_;
  const Functions* functions_;
  alignas(std::max_align_t) std::array<std::byte, room> view_;
};

}  // namespace compresskv
