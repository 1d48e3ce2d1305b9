#pragma once

#include <concepts>
#include <cstddef>

#include "compresskv/core/element.hpp"
#include "compresskv/core/error.hpp"
#include "compresskv/core/shape.hpp"
#include "compresskv/view/run.hpp"

namespace compresskv {

/// Shows the window by its queries; the keys complete it.
template <class O>
concept QueryObservation = std::copyable<O> && requires(const O& observation, std::size_t i) {
  requires Element<typename O::element>;
  { observation.query_heads() } -> std::convertible_to<std::size_t>;
  { observation.queries() } -> std::convertible_to<std::size_t>;
  { observation.head_dim() } -> std::convertible_to<std::size_t>;
  { observation.scale() } -> std::convertible_to<float>;
  { observation.query_run(i) } -> std::same_as<Run<const typename O::element>>;
};

/// Shows the window by the attention that the engine has computed already.
template <class O>
concept AttentionObservation = std::copyable<O> && requires(const O& observation, std::size_t i) {
  requires Element<typename O::element>;
  { observation.query_heads() } -> std::convertible_to<std::size_t>;
  { observation.queries() } -> std::convertible_to<std::size_t>;
  { observation.tokens() } -> std::convertible_to<std::size_t>;
  { observation.attention_run(i) } -> std::same_as<Run<const typename O::element>>;
};

/// What shows how the window's queries attend.
template <class O>
concept Observation = QueryObservation<O> || AttentionObservation<O>;

namespace detail {

/// Throws ArgumentError when `observation` does not show `window` queries of a layer of `rows` cached rows.
template <Observation O>
void check_observation(const O& observation, const ModelShape& shape, std::size_t rows, std::size_t window) {
  require(observation.query_heads() == shape.query_heads, "observation has ", observation.query_heads(),
          " query heads, the plan's model has ", shape.query_heads);
  require(observation.queries() >= window, "observation shows ", observation.queries(),
          " queries, the window needs the last ", window, ": keep that many queries of the prompt");
  if constexpr (QueryObservation<O>) {
    require(observation.head_dim() == shape.head_dim, "queries have ", observation.head_dim(),
            " elements, the plan's head_dim is ", shape.head_dim);
  } else {
    require(observation.tokens() == rows, "attention matrix has ", observation.tokens(),
            " columns, the layer has ", rows, " rows: give one column a cached row");
  }
}

}  // namespace detail
}  // namespace compresskv
