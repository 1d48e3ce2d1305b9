#pragma once

#include <concepts>
#include <cstddef>
#include <limits>
#include <span>

#include "compresskv/core/element.hpp"
#include "compresskv/core/error.hpp"
#include "compresskv/core/float_bits.hpp"
#include "compresskv/core/shape.hpp"
#include "compresskv/view/run.hpp"

namespace compresskv {

/// What an observation may hold: a type, or `AnyElement` where its kind is told when the program runs
/// (`AnyObservation`).
template <class T>
concept ObservedElement = Element<T> || ElementOfAnyKind<T>;

/// Shows the window by its queries; the keys complete it.
///
/// Optional members, with what their absence means: `soft_cap()` (none), `sliding_window()` (none),
/// `sink_logit(head)` (no sink); see `QueryShape`.
template <class O>
concept QueryObservation = std::copyable<O> && requires(const O& observation, std::size_t i) {
  requires ObservedElement<typename O::element>;
  { observation.query_heads() } -> std::convertible_to<std::size_t>;
  { observation.queries() } -> std::convertible_to<std::size_t>;
  { observation.head_dim() } -> std::convertible_to<std::size_t>;
  { observation.scale() } -> std::convertible_to<float>;
  { observation.query_run(i) } -> std::same_as<Run<const typename O::element>>;
};

/// Shows the window by the attention that the engine has computed already.
template <class O>
concept AttentionObservation = std::copyable<O> && requires(const O& observation, std::size_t i) {
  requires ObservedElement<typename O::element>;
  { observation.query_heads() } -> std::convertible_to<std::size_t>;
  { observation.queries() } -> std::convertible_to<std::size_t>;
  { observation.tokens() } -> std::convertible_to<std::size_t>;
  { observation.attention_run(i) } -> std::same_as<Run<const typename O::element>>;
};

/// Shows the window by its attention, summed over its rows already: a few MiB that a device engine hands
/// over.
template <class O>
concept SumsObservation = std::copyable<O> && requires(const O& observation, std::size_t i) {
  { observation.query_heads() } -> std::convertible_to<std::size_t>;
  { observation.queries() } -> std::convertible_to<std::size_t>;
  { observation.tokens() } -> std::convertible_to<std::size_t>;
  { observation.sums(i) } -> std::convertible_to<std::span<const float>>;
};

/// Shows the window without the keys.
template <class O>
concept KeylessObservation = AttentionObservation<O> || SumsObservation<O>;

/// What shows how the window's queries attend.
template <class O>
concept Observation = QueryObservation<O> || KeylessObservation<O>;

/// Shows what goes into a layer's attention, a row a token: the normed hidden states that its queries, keys
/// and values are made of. The last one belongs to the last row of the cache.
template <class O>
concept HiddenObservation = std::copyable<O> && requires(const O& observation) {
  requires ObservedElement<typename O::element>;
  { observation.tokens() } -> std::convertible_to<std::size_t>;
  { observation.hidden_size() } -> std::convertible_to<std::size_t>;
  { observation.hidden_run() } -> std::same_as<Run<const typename O::element>>;
};

namespace detail {

/// What an observation's elements are.
template <Observation O>
constexpr ElementKind observed_kind(const O& observation) {
  if constexpr (ElementOfAnyKind<typename O::element>) {
    return observation.kind();
  } else {
    return kind_of_element<typename O::element>();
  }
}

/// c of `c * tanh(logit / c)`; 0: none.
template <QueryObservation O>
float soft_cap(const O& observation) {
  if constexpr (requires { observation.soft_cap(); }) {
    return observation.soft_cap();
  }
  return 0.0F;
}

/// Positions that a query sees, its own included; 0: all before it.
template <QueryObservation O>
std::size_t sliding_window(const O& observation) {
  if constexpr (requires { observation.sliding_window(); }) {
    return observation.sliding_window();
  }
  return 0;
}

/// Logit of the head's extra softmax column; -inf: none.
template <QueryObservation O>
float sink_logit(const O& observation, std::size_t head) {
  if constexpr (requires { observation.sink_logit(head); }) {
    return observation.sink_logit(head);
  }
  return -std::numeric_limits<float>::infinity();
}

/// Throws ArgumentError unless a scale is finite and above 0, and a soft cap finite and not below 0.
inline void check_logit_numbers(const char* what, float scale, float soft_cap) {
  require(is_finite(scale) && scale > 0.0F, what, ": scale is ", scale, ", must be finite and above 0");
  require(is_finite(soft_cap) && soft_cap >= 0.0F, what, ": soft_cap is ", soft_cap,
          ", must be finite and above 0 (0 stands for none)");
}

/// Throws ArgumentError on a sink that leaves no weights: NaN or +infinity.
inline void check_sink(const char* what, float sink, std::size_t head) {
  require(is_finite(sink) || (!is_nan(sink) && sink < 0.0F), what, ": sink of query head ", head, " is ",
          sink, ", must be a logit, or -infinity for none");
}

/// Throws ArgumentError when `observation` does not show `window` queries of a layer of `rows` cached rows.
template <Observation O>
void check_observation(const O& observation, const ModelShape& shape, std::size_t rows, std::size_t window) {
  require(observation.query_heads() == shape.query_heads, "observation has ", observation.query_heads(),
          " query heads, the plan's model has ", shape.query_heads);
  if constexpr (SumsObservation<O>) {
    require(observation.queries() == window, "attention sums are over ", observation.queries(),
            " queries, the window has ", window, ": sum over the last ", window);
  } else {
    require(observation.queries() >= window, "observation shows ", observation.queries(),
            " queries, the window needs the last ", window, ": keep that many queries of the prompt");
  }
  if constexpr (QueryObservation<O>) {
    require(observation.head_dim() == shape.head_dim, "queries have ", observation.head_dim(),
            " elements, the plan's head_dim is ", shape.head_dim);
    check_logit_numbers("observation", static_cast<float>(observation.scale()), soft_cap(observation));
    for (std::size_t head = 0; head < shape.query_heads; ++head) {
      check_sink("observation", sink_logit(observation, head), head);
    }
  } else {
    require(observation.tokens() == rows, "attention has ", observation.tokens(), " columns, the layer has ",
            rows, " rows: give one column a cached row");
  }
}

/// Throws ArgumentError when hidden states do not show at least the last `least` of `tokens` tokens, or more.
/// `remedy` says how so many come.
template <HiddenObservation O>
void check_hidden_states(const O& observation, std::size_t layer, std::size_t least, std::size_t tokens,
                         const char* remedy) {
  const std::size_t shown = observation.tokens();
  require(shown <= tokens, "hidden states of layer ", layer, " are of ", shown, " tokens, the sequence has ",
          tokens, ": the last one belongs to the last row of the cache");
  require(shown >= least, "hidden states of layer ", layer, " are of ", shown, " tokens, expected the last ",
          least, " of ", tokens, ": ", remedy);
}

}  // namespace detail
}  // namespace compresskv
