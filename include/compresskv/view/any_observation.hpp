#pragma once

#include <concepts>
#include <cstddef>
#include <span>
#include <type_traits>
#include <variant>

#include "compresskv/core/element.hpp"
#include "compresskv/view/observation.hpp"
#include "compresskv/view/run.hpp"

namespace compresskv {

namespace detail {

/// A run of const elements of a type as one of `AnyElement`.
template <Element T>
Run<const AnyElement> erased_run(const Run<const T>& run) {
  return {.kind = kind_of_element<T>(),
          .base = run.base,
          .rows = run.rows,
          .row_stride = run.row_stride,
          .chunk = run.chunk,
          .chunk_stride = run.chunk_stride};
}

}  // namespace detail

/// Any `QueryObservation`, by reference: models `QueryObservation` with `AnyElement`.
class AnyQueries {
 public:
  using element = AnyElement;

  template <class O>
  requires(!std::same_as<O, AnyQueries> && QueryObservation<O>) explicit AnyQueries(const O& observation)
      : observation_(&observation),
        kind_(kind_of_element<typename O::element>()),
        query_heads_(observation.query_heads()),
        queries_(observation.queries()),
        head_dim_(observation.head_dim()),
        scale_(observation.scale()),
        soft_cap_(detail::soft_cap(observation)),
        sliding_window_(detail::sliding_window(observation)),
        sink_logit_([](const void* object, std::size_t head) {
          return detail::sink_logit(*static_cast<const O*>(object), head);
        }),
        query_run_([](const void* object, std::size_t head) {
          return detail::erased_run(static_cast<const O*>(object)->query_run(head));
        }) {}

  ElementKind kind() const { return kind_; }
  std::size_t query_heads() const { return query_heads_; }
  std::size_t queries() const { return queries_; }
  std::size_t head_dim() const { return head_dim_; }
  float scale() const { return scale_; }
  float soft_cap() const { return soft_cap_; }
  std::size_t sliding_window() const { return sliding_window_; }
  float sink_logit(std::size_t head) const { return sink_logit_(observation_, head); }
  Run<const AnyElement> query_run(std::size_t head) const { return query_run_(observation_, head); }

 private:
  const void* observation_;
  ElementKind kind_;
  std::size_t query_heads_;
  std::size_t queries_;
  std::size_t head_dim_;
  float scale_;
  float soft_cap_;
  std::size_t sliding_window_;
  float (*sink_logit_)(const void* observation, std::size_t head);
  Run<const AnyElement> (*query_run_)(const void* observation, std::size_t head);
};

/// Any `AttentionObservation`, by reference: models `AttentionObservation` with `AnyElement`.
class AnyAttention {
 public:
  using element = AnyElement;

  template <class O>
  requires(!std::same_as<O, AnyAttention> &&
           AttentionObservation<O>) explicit AnyAttention(const O& observation)
      : observation_(&observation),
        kind_(kind_of_element<typename O::element>()),
        query_heads_(observation.query_heads()),
        queries_(observation.queries()),
        tokens_(observation.tokens()),
        attention_run_([](const void* object, std::size_t head) {
          return detail::erased_run(static_cast<const O*>(object)->attention_run(head));
        }) {}

  ElementKind kind() const { return kind_; }
  std::size_t query_heads() const { return query_heads_; }
  std::size_t queries() const { return queries_; }
  std::size_t tokens() const { return tokens_; }
  Run<const AnyElement> attention_run(std::size_t head) const { return attention_run_(observation_, head); }

 private:
  const void* observation_;
  ElementKind kind_;
  std::size_t query_heads_;
  std::size_t queries_;
  std::size_t tokens_;
  Run<const AnyElement> (*attention_run_)(const void* observation, std::size_t head);
};

/// Any `SumsObservation`, by reference: models `SumsObservation`.
class AnySums {
 public:
  template <class O>
  requires(!std::same_as<O, AnySums> && SumsObservation<O>) explicit AnySums(const O& observation)
      : observation_(&observation),
        query_heads_(observation.query_heads()),
        queries_(observation.queries()),
        tokens_(observation.tokens()),
        sums_([](const void* object, std::size_t head) {
          return std::span<const float>(static_cast<const O*>(object)->sums(head));
        }) {}

  std::size_t query_heads() const { return query_heads_; }
  std::size_t queries() const { return queries_; }
  std::size_t tokens() const { return tokens_; }
  std::span<const float> sums(std::size_t head) const { return sums_(observation_, head); }

 private:
  const void* observation_;
  std::size_t query_heads_;
  std::size_t queries_;
  std::size_t tokens_;
  std::span<const float> (*sums_)(const void* observation, std::size_t head);
};

/// Any `HiddenObservation`, by reference: models `HiddenObservation` with `AnyElement`.
class AnyHiddenStates {
 public:
  using element = AnyElement;

  template <class O>
  requires(!std::same_as<O, AnyHiddenStates> &&
           HiddenObservation<O>) explicit AnyHiddenStates(const O& observation)
      : observation_(&observation),
        tokens_(observation.tokens()),
        hidden_size_(observation.hidden_size()),
        hidden_run_([](const void* object) {
          return detail::erased_run(static_cast<const O*>(object)->hidden_run());
        }) {}

  std::size_t tokens() const { return tokens_; }
  std::size_t hidden_size() const { return hidden_size_; }
  Run<const AnyElement> hidden_run() const { return hidden_run_(observation_); }

 private:
  const void* observation_;
  std::size_t tokens_;
  std::size_t hidden_size_;
  Run<const AnyElement> (*hidden_run_)(const void* observation);
};

/// What shows a layer, if anything: any `Observation` or `HiddenObservation`, by reference. Made for one
/// call, as an argument; the observation must live until the call returns.
class AnyObservation {
 public:
  using Held = std::variant<std::monostate, AnyQueries, AnyAttention, AnySums, AnyHiddenStates>;

  /// None: for methods that look at keys or positions alone.
  AnyObservation() = default;

  template <class O>
  requires(!std::same_as<O, AnyObservation> && (Observation<O> || HiddenObservation<O>))
      AnyObservation(const O& observation)
      : held_(hold(observation)) {}

  const Held& held() const { return held_; }

 private:
  template <class O>
  static Held hold(const O& observation) {
    if constexpr (HiddenObservation<O>) {
      return AnyHiddenStates(observation);
    } else if constexpr (SumsObservation<O>) {
      return AnySums(observation);
    } else if constexpr (QueryObservation<O>) {
      return AnyQueries(observation);
    } else {
      return AnyAttention(observation);
    }
  }

  Held held_;
};

}  // namespace compresskv
