#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <vector>

#include "compresskv/core/element.hpp"
#include "compresskv/core/error.hpp"
#include "compresskv/core/sizes.hpp"
#include "compresskv/view/placement.hpp"
#include "compresskv/view/query_window.hpp"

namespace compresskv {

/// The last `window` queries of a layer, gathered while a prompt is prefilled in chunks: `view()` after the
/// last chunk shows what a one-shot prefill would have shown, bit for bit.
///
/// Unlike a view it owns its memory: `query_heads * window * head_dim` elements, one object a layer in
/// flight.
template <Element T>
class RecentQueries {
 public:
  /// `shape.queries` is the window; the rest is handed on to the `QueryWindow`s. Throws as `QueryWindow`.
  explicit RecentQueries(const QueryShape& shape)
      : shape_(checked(shape)), queries_(shape.query_heads * shape.queries * shape.head_dim) {}

  /// Adds the queries of the next chunk, `count` of them for each head, in order; more than the window are
  /// skipped. Throws ArgumentError on null, or strides that lay queries over each other. Cost: copies at most
  /// the window.
  void append(const T* queries, std::size_t count, const QueryStrides& strides) {
    detail::require(queries != nullptr || count == 0,
                    "RecentQueries: queries is null: give the chunk's queries");
    std::array<detail::Axis, 2> axes = {
        detail::Axis{"query", strides.query, count},
        detail::Axis{"head", strides.head, count > 0 ? shape_.query_heads : 0}};
    detail::reach_without_overlap("RecentQueries", axes, shape_.head_dim, detail::max_bytes / sizeof(T));
    const std::size_t taken = (std::min)(count, shape_.queries);
    const std::size_t stays = (std::min)(held_, shape_.queries - taken);
    for (std::size_t head = 0; head < shape_.query_heads; ++head) {
      T* own = queries_.data() + head * shape_.queries * shape_.head_dim;
      std::copy_n(own + (held_ - stays) * shape_.head_dim, stays * shape_.head_dim, own);
      for (std::size_t i = 0; i < taken; ++i) {
        std::copy_n(queries + head * strides.head + (count - taken + i) * strides.query, shape_.head_dim,
                    own + (stays + i) * shape_.head_dim);
      }
    }
    held_ = stays + taken;
  }

  /// As given, the scale filled in; `queries` is the window.
  const QueryShape& shape() const { return shape_; }

  /// Queries held, at most the window.
  std::size_t size() const { return held_; }

  /// Forgets all queries: the next sequence.
  void clear() { held_ = 0; }

  /// The queries held. Valid until the next `append`, and no longer than this object. Throws ArgumentError
  /// where there are none.
  QueryWindow<T> view() const& {
    detail::require(held_ > 0, "RecentQueries: no queries were appended");
    QueryShape shape = shape_;
    shape.queries = held_;
    return QueryWindow<T>(queries_.data(), shape,
                          QueryStrides{.head = shape_.queries * shape_.head_dim, .query = shape_.head_dim});
  }
  template <class U = T>
  QueryWindow<U> view() const&& {
    static_assert(sizeof(U) == 0,
                  "the queries would die with this temporary: keep the RecentQueries in a variable");
    return view();
  }

 private:
  static QueryShape checked(QueryShape shape) {
    detail::check_query_shape("RecentQueries", shape, sizeof(T));
    return shape;
  }

  QueryShape shape_;
  std::vector<T> queries_;  // [query_head][window][head_dim], the first held_ of each head in use
  std::size_t held_ = 0;
};

}  // namespace compresskv
