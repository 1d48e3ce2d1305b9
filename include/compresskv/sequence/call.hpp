#pragma once

#include <concepts>
#include <cstddef>
#include <initializer_list>
#include <span>
#include <type_traits>

#include "compresskv/core/element.hpp"
#include "compresskv/core/executor.hpp"
#include "compresskv/core/policy.hpp"
#include "compresskv/core/selection.hpp"
#include "compresskv/kernel/rotary.hpp"
#include "compresskv/kernel/row_moves.hpp"
#include "compresskv/view/kv_view.hpp"
#include "compresskv/view/observation.hpp"

// What the calls of a compressor take. Each finds the first thing that is wrong with the types of its
// arguments, and `fits` says it in one error; the call then does nothing, so that no error follows.

namespace compresskv {

/// Stands for the keys or the observation where a scorer needs none.
struct NotGiven {};

namespace call {

/// `Executor`, of which clang++ does not say what it asks for.
template <class X>
constexpr bool runs = Executor<X>;

/// What can be wrong with a call.
enum class Fault {
  none,
  not_one_layer,
  one_layer_alone,
  not_whole_model,
  needs_repeats,
  no_repeats,
  repeats_by_queries,
  no_views,
  observation_first,
  no_view,
  partial_view,
  no_observation,
  no_attention,
  no_queries,
  queries_alone,
  keys_needed,
  values_needed,
  rows_differ,
  no_selection,
  no_reduction,
  quantised_keys,
  const_keys,
  no_rotary,
};

/// Whether nothing is wrong. Compilers print some lines for each function they came through: all that can be
/// said stands in this one.
template <Fault fault>
consteval bool fits() {
  using enum Fault;
  static_assert(fault != not_one_layer,
                "this composition must see more than one layer before it can shrink any: it needs arrive(), "
                "not compress()");
  static_assert(fault != one_layer_alone,
                "this composition shrinks each layer on its own: call compress(), not arrive()");
  static_assert(fault != not_whole_model,
                "this composition need not see the whole model: there is nothing to finish");
  static_assert(fault != needs_repeats,
                "this scorer is shown tokens that repeat the context: call observe() for each stretch and "
                "layer, then finish()");
  static_assert(fault != no_repeats,
                "this scorer does not ask for the context to be repeated: call compress() or arrive()");
  static_assert(fault != repeats_by_queries,
                "what repeats the context is shown by its queries: give a QueryWindow");
  static_assert(fault != no_views,
                "the views are given as a function: [&](std::size_t layer) { return view_of(layer); }");
  static_assert(fault != observation_first,
                "queries need the keys: the layer's view comes second, the observation after it");
  static_assert(fault != no_view,
                "the layer's view is missing, pointers and vectors do not say how its rows lie: give "
                "StridedKv{keys, values, shape, layout}, PagedKv, Int8Kv or a KvView of your own "
                "(compresskv/view/kv_view.hpp)");
  static_assert(fault != partial_view,
                "the kv view lacks a member or has one of another type: "
                "static_assert(compresskv::models_kv_view<MyKv>()) names it");
  static_assert(fault != no_observation,
                "this scorer needs the window's attention: give it a QueryWindow, an AttentionMatrix or "
                "another Observation (compresskv/view/observation.hpp)");
  static_assert(fault != no_attention,
                "select() takes the scores that score() filled, with this plan's granularity, or attention: "
                "an AttentionMatrix or AttentionSums");
  static_assert(fault != no_queries,
                "this scorer compares logits, which attention no longer shows: give it the window's queries, "
                "a QueryWindow");
  static_assert(fault != queries_alone,
                "queries need the keys: give the layer's view as well, to score() or compress()");
  static_assert(fault != keys_needed,
                "this scorer reads the keys: give it the layer's view, to score() or compress()");
  static_assert(fault != values_needed,
                "this scorer reads keys and values: give it the layer's view, to score() or compress()");
  static_assert(fault != rows_differ,
                "rows move as they are: the cache written needs the element types of the cache read, not "
                "const");
  static_assert(fault != no_selection,
                "the rows to keep are a Selection, and come after their view: give what select() gave, "
                "Selection::shared_by_heads(rows) or Selection::per_head(rows)");
  static_assert(fault != no_reduction,
                "reduce is called with the scores: [&](std::span<float> scores) { all_reduce(scores); }");
  static_assert(fault != quantised_keys,
                "only plain keys can be turned: quantised rows are never re-quantised");
  static_assert(fault != const_keys, "keys are turned in place: give a view whose keys are not const");
  static_assert(fault != no_rotary,
                "how keys turn is a kernel::Rotary, after their view: {.base = 10000.0, .pairing = ...}");
  return fault == none;
}

/// The first fault, if any.
constexpr Fault first(std::initializer_list<Fault> faults) {
  for (const Fault fault : faults) {
    if (fault != Fault::none) {
      return fault;
    }
  }
  return Fault::none;
}

constexpr Fault unless(bool holds, Fault fault) { return holds ? Fault::none : fault; }

template <class V>
constexpr Fault of_view() {
  if constexpr (KvView<V>) {
    return Fault::none;
  } else if constexpr (Observation<V>) {
    return Fault::observation_first;
  } else if constexpr (detail::HasKeyElement<V> || requires(const V& view) { view.kv_heads(); }) {
    return Fault::partial_view;
  } else {
    return Fault::no_view;
  }
}

/// Of rows that move from `V` to `W`.
template <class V, class W>
constexpr Fault of_rows() {
  if constexpr (KvView<V> && KvView<W>) {
    return unless(kernel::rows_fit<V, W>, Fault::rows_differ);
  } else {
    return first({of_view<V>(), of_view<W>()});
  }
}

template <class Views>
constexpr Fault of_views() {
  if constexpr (std::invocable<Views&, std::size_t>) {
    using V = std::remove_cvref_t<std::invoke_result_t<Views&, std::size_t>>;
    return of_rows<V, V>();
  } else {
    return Fault::no_views;
  }
}

template <class P, class O>
constexpr Fault of_observation() {
  constexpr Needs needs = P::scorer_type::needs;
  return first({unless(!observes(needs) || Observation<O>, Fault::no_observation),
                unless(needs != Needs::window_queries || QueryObservation<O>, Fault::no_queries)});
}

template <class Reduce>
constexpr Fault of_reduction() {
  return unless(
      std::same_as<std::remove_cvref_t<Reduce>, NotGiven> || std::invocable<Reduce&, std::span<float>>,
      Fault::no_reduction);
}

template <class R>
constexpr Fault of_selection() {
  return unless(std::convertible_to<const R&, const Selection&>, Fault::no_selection);
}

// The calls.

/// A composition that observes repeats is shown nothing else.
template <class P>
constexpr Fault of_repeats = unless(P::scorer_type::needs != Needs::repeats, Fault::needs_repeats);

template <class P, class V, class O, class Reduce>
constexpr Fault compress = first({of_repeats<P>, unless(P::reach == Reach::own_layer, Fault::not_one_layer),
                                  of_rows<V, V>(), of_observation<P, O>(), of_reduction<Reduce>()});

template <class P, class Views, class O, class Reduce>
constexpr Fault arrive = first({of_repeats<P>, unless(P::reach != Reach::own_layer, Fault::one_layer_alone),
                                of_views<Views>(), of_observation<P, O>(), of_reduction<Reduce>()});

template <class P, class V, class O>
constexpr Fault observe = first({unless(P::scorer_type::needs == Needs::repeats, Fault::no_repeats),
                                 of_view<V>(), unless(QueryObservation<O>, Fault::repeats_by_queries)});

template <class P, class Views>
constexpr Fault finish = first({unless(P::reach == Reach::all_layers, Fault::not_whole_model),
                                of_views<Views>()});

template <class P, class V, class O>
constexpr Fault score = first({of_repeats<P>, of_view<V>(), of_observation<P, O>()});

/// Scores or a selection from attention alone.
template <class P, class O>
constexpr Fault attention = first({of_repeats<P>, unless(!QueryObservation<O>, Fault::queries_alone),
                                   unless(KeylessObservation<O>, Fault::no_attention),
                                   unless(P::scorer_type::needs != Needs::keys &&
                                              P::scorer_type::needs != Needs::window_queries,
                                          Fault::keys_needed),
                                   unless(!reads_values<typename P::scorer_type>, Fault::values_needed)});

template <class V, class R>
constexpr Fault compact = first({of_view<V>(), of_selection<R>(), of_rows<V, V>()});

template <class V, class R, class W>
constexpr Fault gather = first({of_view<V>(), of_selection<R>(), of_rows<V, W>()});

template <class V, class R>
constexpr Fault rerotate = [] {
  if constexpr (KvView<V>) {
    using Key = typename V::key_element;
    return first({unless(Element<Key> || ElementOfAnyKind<Key>, Fault::quantised_keys),
                  unless(!std::is_const_v<Key>, Fault::const_keys),
                  unless(std::convertible_to<const R&, const kernel::Rotary&>, Fault::no_rotary)});
  } else {
    return of_view<V>();
  }
}();

}  // namespace call
}  // namespace compresskv
