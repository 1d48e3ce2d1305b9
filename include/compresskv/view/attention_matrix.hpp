#pragma once

#include <cstddef>
#include <span>
#include <type_traits>

#include "compresskv/core/element.hpp"
#include "compresskv/core/error.hpp"
#include "compresskv/core/sizes.hpp"
#include "compresskv/view/argument.hpp"
#include "compresskv/view/observation.hpp"
#include "compresskv/view/run.hpp"

namespace compresskv {

/// Shape of attention that the engine has: `[query_head][query][token]`.
struct AttentionShape {
  std::size_t query_heads = 0;
  std::size_t queries = 0;  ///< the last so many queries; all S of them or only the window's
  std::size_t tokens = 0;   ///< S, one column a cached row
};

namespace detail {

/// Throws ArgumentError on a zero size, or sizes that no array of `counts` can have.
inline void check_attention_shape(const char* what, const AttentionShape& shape, bool fits) {
  require(shape.query_heads > 0 && shape.queries > 0 && shape.tokens > 0, what, ": shape has ",
          shape.query_heads, " heads, ", shape.queries, " queries, ", shape.tokens,
          " tokens: each must be at least 1");
  require(shape.tokens <= max_rows, what, ": shape has ", shape.tokens,
          " tokens, positions are held in 32 bits: at most ", max_rows);
  require(fits, what, ": ", shape.query_heads, " heads of ", shape.queries, " queries of ", shape.tokens,
          " tokens do not fit in memory");
}

}  // namespace detail

/// Attention probabilities (after softmax) of the last queries over all cached rows: models
/// `AttentionObservation`. With it the keys are not read at all.
template <Element T>
class AttentionMatrix {
 public:
  using element = T;

  /// Throws ArgumentError on null or a zero size.
  AttentionMatrix(const T* probabilities, const AttentionShape& shape)
      : probabilities_(probabilities), shape_(shape) {
    detail::require(probabilities != nullptr,
                    "AttentionMatrix: probabilities is null: give the attention weights");
    detail::check_attention_shape(
        "AttentionMatrix", shape,
        detail::fits_in_memory(sizeof(T), {shape.query_heads, shape.queries, shape.tokens}));
  }

  /// Does not compile, and says what is wrong.
  template <class Weights, class Shape>
  requires(!std::is_convertible_v<const Weights&, const T*> ||
           !std::is_convertible_v<const Shape&, AttentionShape>)
      AttentionMatrix(const Weights&, const Shape&) {
    constexpr bool elements = detail::points_to<Weights, const T> && std::is_pointer_v<Weights>;
    static_assert(elements,
                  "the weights come first, as a pointer to float, half or bfloat16: "
                  "AttentionMatrix{weights.data(), shape}");
    static_assert(!elements, "the second argument is an AttentionShape: AttentionMatrix{weights, shape}");
  }

  std::size_t query_heads() const { return shape_.query_heads; }
  std::size_t queries() const { return shape_.queries; }
  std::size_t tokens() const { return shape_.tokens; }
  /// One row a query, in order.
  Run<const T> attention_run(std::size_t head) const {
    return {.base = probabilities_ + head * shape_.queries * shape_.tokens,
            .rows = shape_.queries,
            .row_stride = static_cast<std::ptrdiff_t>(shape_.tokens),
            .chunk = shape_.tokens,
            .chunk_stride = static_cast<std::ptrdiff_t>(shape_.tokens)};
  }

 private:
  const T* probabilities_ = nullptr;
  AttentionShape shape_;
};

template <class Weights, class Shape>
AttentionMatrix(const Weights&, const Shape&) -> AttentionMatrix<detail::PointedElement<Weights>>;

/// Attention probabilities summed over the window's rows, float32 `[query_head][token]`: models
/// `SumsObservation`.
class AttentionSums {
 public:
  /// `shape.queries` is the window that was summed over; columns of the window are there and not read.
  /// Throws ArgumentError on null or a zero size.
  AttentionSums(const float* sums, const AttentionShape& shape) : sums_(sums), shape_(shape) {
    detail::require(sums != nullptr, "AttentionSums: sums is null: give the summed attention weights");
    // Summed over already: the queries take no room.
    detail::check_attention_shape("AttentionSums", shape,
                                  detail::fits_in_memory(sizeof(float), {shape.query_heads, shape.tokens}));
  }

  std::size_t query_heads() const { return shape_.query_heads; }
  std::size_t queries() const { return shape_.queries; }
  std::size_t tokens() const { return shape_.tokens; }
  std::span<const float> sums(std::size_t head) const {
    return {sums_ + head * shape_.tokens, shape_.tokens};
  }

 private:
  const float* sums_;
  AttentionShape shape_;
};

}  // namespace compresskv
