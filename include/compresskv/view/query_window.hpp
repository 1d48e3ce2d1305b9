#pragma once

#include <array>
#include <cstddef>
#include <limits>
#include <type_traits>

#include "compresskv/core/borrowed.hpp"
#include "compresskv/core/default_scale.hpp"
#include "compresskv/core/element.hpp"
#include "compresskv/core/error.hpp"
#include "compresskv/core/float_bits.hpp"
#include "compresskv/core/sizes.hpp"
#include "compresskv/view/argument.hpp"
#include "compresskv/view/observation.hpp"
#include "compresskv/view/placement.hpp"
#include "compresskv/view/run.hpp"

namespace compresskv {

/// Shape of a query window, `[query_head][query][dim]` unless strides say otherwise.
struct QueryShape {
  std::size_t query_heads = 0;
  std::size_t queries = 0;   ///< the last so many queries of the prompt; those beyond the window are not read
  std::size_t head_dim = 0;  ///< elements of one query
  float scale = 0.0F;        ///< of the logits; 0: 1 / sqrt(head_dim)
  float soft_cap = 0.0F;     ///< c of c * tanh(logit / c), as in Gemma 2; 0: none
  /// Positions that a query of this layer sees, its own included, as in Mistral and Gemma; 0: all before it.
  /// Tokens further back get no attention and are never an error.
  std::size_t sliding_window = 0;
  /// Logit of an extra softmax column a query head, as in gpt-oss: it takes weight and gives none; empty:
  /// none. Must outlive what keeps the shape.
  Borrowed<const float> sinks = {};
};

/// Distances in elements between neighbouring heads and queries; elements of a query lie side by side.
struct QueryStrides {
  std::size_t head = 0;
  std::size_t query = 0;
};

namespace detail {

/// Fills in what the shape leaves out: the scale. Throws ArgumentError on a zero size, sizes that do not fit
/// in memory, and on numbers that give no attention.
inline void check_query_shape(const char* what, QueryShape& shape, std::size_t element_bytes) {
  require(shape.query_heads > 0 && shape.queries > 0 && shape.head_dim > 0, what, ": shape has ",
          shape.query_heads, " heads, ", shape.queries, " queries, head_dim ", shape.head_dim,
          ": each must be at least 1");
  require(fits_in_memory(element_bytes, {shape.query_heads, shape.queries, shape.head_dim}), what, ": ",
          shape.query_heads, " heads of ", shape.queries, " queries of ", shape.head_dim,
          " elements do not fit in memory");
  // By its bits: where the compiler may forget signed zeros and NaN, a comparison does not tell them apart.
  if (is_finite(shape.scale) && shape.scale == 0.0F) {
    shape.scale = default_scale(shape.head_dim);
  }
  check_logit_numbers(what, shape.scale, shape.soft_cap);
  require(shape.sinks.empty() || shape.sinks.size() == shape.query_heads, what, ": ", shape.sinks.size(),
          " sinks for ", shape.query_heads, " query heads: give one a head");
  for (std::size_t head = 0; head < shape.sinks.size(); ++head) {
    check_sink(what, shape.sinks[head], head);
  }
}

}  // namespace detail

/// The last queries of the prompt, after rotary embedding, in the engine's own memory: models
/// `QueryObservation`. The last query belongs to the last row of the cache.
template <Element T>
class QueryWindow {
 public:
  using element = T;

  /// Queries at `[query_head][query][dim]`. Throws ArgumentError on null, a zero size, a scale that is not
  /// positive and finite, sinks that are no logits, or strides that lay queries over each other.
  QueryWindow(const T* queries, const QueryShape& shape)
      : QueryWindow(queries, shape, {.head = shape.queries * shape.head_dim, .query = shape.head_dim}) {}

  QueryWindow(const T* queries, const QueryShape& shape, const QueryStrides& strides)
      : queries_(queries), shape_(shape), strides_(strides) {
    detail::require(queries != nullptr, "QueryWindow: queries is null: give the window's queries");
    detail::check_query_shape("QueryWindow", shape_, sizeof(T));
    std::array<detail::Axis, 2> axes = {detail::Axis{"query", strides.query, shape.queries},
                                        detail::Axis{"head", strides.head, shape.query_heads}};
    detail::reach_without_overlap("QueryWindow", axes, shape.head_dim, detail::max_bytes / sizeof(T));
  }

  /// Does not compile, and says what is wrong.
  template <class Queries, class Shape, class... Rest>
  requires(!std::is_convertible_v<const Queries&, const T*> ||
           !std::is_convertible_v<const Shape&, QueryShape>)
      QueryWindow(const Queries&, const Shape&, const Rest&...) {
    constexpr bool elements = detail::points_to<Queries, const T> && std::is_pointer_v<Queries>;
    static_assert(elements,
                  "queries come first, as a pointer to float, half or bfloat16: "
                  "QueryWindow{queries.data(), shape}");
    static_assert(!elements, "the second argument is a QueryShape: QueryWindow{queries, shape}");
  }

  std::size_t query_heads() const { return shape_.query_heads; }
  std::size_t queries() const { return shape_.queries; }
  std::size_t head_dim() const { return shape_.head_dim; }
  float scale() const { return shape_.scale; }
  float soft_cap() const { return shape_.soft_cap; }
  std::size_t sliding_window() const { return shape_.sliding_window; }
  float sink_logit(std::size_t head) const {
    return shape_.sinks.empty() ? -std::numeric_limits<float>::infinity() : shape_.sinks[head];
  }
  /// One row a query, in order.
  Run<const T> query_run(std::size_t head) const {
    return {.base = queries_ + head * strides_.head,
            .rows = shape_.queries,
            .row_stride = static_cast<std::ptrdiff_t>(strides_.query),
            .chunk = shape_.head_dim,
            .chunk_stride = static_cast<std::ptrdiff_t>(shape_.head_dim)};
  }

 private:
  const T* queries_ = nullptr;
  QueryShape shape_;
  QueryStrides strides_;
};

template <class Queries, class Shape, class... Rest>
QueryWindow(const Queries&, const Shape&, const Rest&...) -> QueryWindow<detail::PointedElement<Queries>>;

}  // namespace compresskv
