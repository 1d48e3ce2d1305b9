#pragma once

#include <cmath>
#include <cstddef>

#include "compresskv/core/element.hpp"
#include "compresskv/core/error.hpp"
#include "compresskv/view/observation.hpp"
#include "compresskv/view/run.hpp"

namespace compresskv {

/// Shape of a query window, `[query_head][query][dim]` unless strides say otherwise.
struct QueryShape {
  std::size_t query_heads = 0;
  std::size_t queries = 0;   ///< the last so many queries of the prompt; those beyond the window are not read
  std::size_t head_dim = 0;  ///< elements of one query
  float scale = 0.0F;        ///< of the logits; 0: 1 / sqrt(head_dim)
};

/// Distances in elements between neighbouring heads and queries; elements of a query lie side by side.
struct QueryStrides {
  std::size_t head = 0;
  std::size_t query = 0;
};

/// The last queries of the prompt, after rotary embedding, in the engine's own memory: models
/// `QueryObservation`. The last query belongs to the last row of the cache.
template <Element T>
class QueryWindow {
 public:
  using element = T;

  /// Queries at `[query_head][query][dim]`. Throws ArgumentError on null, a zero size or a scale that is not
  /// positive and finite.
  QueryWindow(const T* queries, const QueryShape& shape)
      : QueryWindow(queries, shape, {.head = shape.queries * shape.head_dim, .query = shape.head_dim}) {}

  QueryWindow(const T* queries, const QueryShape& shape, const QueryStrides& strides)
      : queries_(queries), shape_(shape), strides_(strides) {
    detail::require(queries != nullptr, "QueryWindow: queries is null: give the window's queries");
    detail::require(shape.query_heads > 0 && shape.queries > 0 && shape.head_dim > 0,
                    "QueryWindow: shape has ", shape.query_heads, " heads, ", shape.queries,
                    " queries, head_dim ", shape.head_dim, ": each must be at least 1");
    detail::require(std::isfinite(shape.scale) && shape.scale >= 0.0F, "QueryWindow: scale is ", shape.scale,
                    ", must be finite and above 0 (0 stands for 1 / sqrt(head_dim))");
    if (shape_.scale == 0.0F) {
      shape_.scale = 1.0F / std::sqrt(static_cast<float>(shape.head_dim));
    }
  }

  std::size_t query_heads() const { return shape_.query_heads; }
  std::size_t queries() const { return shape_.queries; }
  std::size_t head_dim() const { return shape_.head_dim; }
  float scale() const { return shape_.scale; }
  /// One row a query, in order.
  Run<const T> query_run(std::size_t head) const {
    return {.base = queries_ + head * strides_.head,
            .rows = shape_.queries,
            .row_stride = static_cast<std::ptrdiff_t>(strides_.query),
            .chunk = shape_.head_dim,
            .chunk_stride = static_cast<std::ptrdiff_t>(shape_.head_dim)};
  }

 private:
  const T* queries_;
  QueryShape shape_;
  QueryStrides strides_;
};

static_assert(QueryObservation<QueryWindow<float>> && !AttentionObservation<QueryWindow<float>>);

}  // namespace compresskv
