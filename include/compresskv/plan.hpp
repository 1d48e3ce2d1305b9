#pragma once

#include <concepts>
#include <cstddef>
#include <span>
#include <utility>

#include "compresskv/budget/allocator.hpp"
#include "compresskv/core/budget.hpp"
#include "compresskv/core/policy.hpp"
#include "compresskv/core/shape.hpp"
#include "compresskv/score/scorer.hpp"
#include "compresskv/select/selector.hpp"

namespace compresskv {

namespace detail {

template <class Shape, class S, class T, class A>
inline constexpr bool plan_arguments = std::convertible_to<const Shape&, const ModelShape&>&&
    score::Scorer<S>&& select::Selector<T>&& budget::Allocator<A>;

/// Stands for the policies of a plan whose arguments are wrong: its constructor says which, and that error
/// stays alone.
struct NoPolicy {
  static constexpr Granularity granularity = Granularity::layer;
  static constexpr Needs needs = Needs::nothing;
  static constexpr Reach reach = Reach::own_layer;
  static constexpr bool accepts(Granularity) { return true; }
  std::size_t window() const { return 1; }
  Budget budget() const { return Budget::kept_ratio(1.0); }
  void validate(const ModelShape&) const {}
  void allocate(const budget::Allowance&, std::span<std::size_t>) const {}
};

}  // namespace detail

/// What to do for a model: a scorer, a selector and an allocator, made once, immutable, shared by all
/// sequences and threads.
///
/// A selector that cannot use the scorer's granularity does not compile.
template <score::Scorer S, select::Selector T, budget::Allocator A>
class Plan {
 public:
  using scorer_type = S;
  using selector_type = T;
  using allocator_type = A;
  static constexpr Reach reach = furthest(S::reach, T::reach, A::reach);

  static_assert(T::accepts(S::granularity),
                "this selector cannot use scores of this scorer's granularity: a shared selector needs one "
                "row a layer, "
                "a per-head selector one row a KV head");

  /// What has a capacity of its own.
  static constexpr Granularity capacity_granularity = budget::granularity_of<A>;
  static_assert(capacity_granularity == Granularity::layer ||
                    (select::SelectsByHead<T> && reach == Reach::own_layer),
                "this allocator gives each KV head a capacity of its own: it goes with a selector that takes "
                "them (select::GroupedTopK) and a scorer that looks at no other layer");

  static_assert(T::reach == Reach::own_layer || S::needs == Needs::repeats,
                "a selector that chooses from the whole model at once needs scores that are held until then: "
                "those of score::KvZip");

  /// Throws ArgumentError when a policy does not fit the model, or the budget cannot hold the window.
  Plan(const ModelShape& shape, S scorer, T selector, A allocator)
      : shape_(shape),
        scorer_(std::move(scorer)),
        selector_(std::move(selector)),
        allocator_(std::move(allocator)) {
    shape_.validate();
    scorer_.validate(shape_);
    allocator_.validate(shape_);
    allocator_.budget().validate(scorer_.window(), shape_);
  }

  /// Does not compile, and says what is wrong.
  template <class Shape, class U, class V, class W = detail::NoPolicy>
  requires(std::same_as<S, detail::NoPolicy>) Plan(const Shape&, const U&, const V&, const W& = {}) {
    constexpr bool shape = std::convertible_to<const Shape&, const ModelShape&>;
    constexpr bool scorer = score::Scorer<U>;
    constexpr bool selector = select::Selector<V>;
    constexpr bool budget = std::convertible_to<const W&, Budget>;
    static_assert(shape, "the ModelShape comes first: Plan{shape, scorer, selector, allocator}");
    static_assert(
        scorer || !shape,
        "a scorer comes second: Plan{shape, scorer, selector, allocator}, with one of score:: or of "
        "your own (compresskv/score/scorer.hpp)");
    static_assert(
        selector || !scorer || !shape,
        "a selector comes third: Plan{shape, scorer, selector, allocator}, with one of select:: or of "
        "your own (compresskv/select/selector.hpp)");
    static_assert(!budget || !selector || !scorer || !shape,
                  "an allocator comes fourth, made from the budget: budget::Uniform{budget}, ErrorAware, "
                  "Pyramid or Cake");
    static_assert(
        budget || !selector || !scorer || !shape,
        "an allocator comes fourth: Plan{shape, scorer, selector, allocator}, with one of budget:: or "
        "of your own (compresskv/budget/allocator.hpp)");
  }

  /// Resolves the budget for `tokens` tokens into `capacities`, which are `tokens` each, `[layer]` or
  /// `[layer][kv_head]` by `capacity_granularity`. Returns the mean rows a layer. Throws ArgumentError when
  /// the budget cannot be met.
  std::size_t resolve(std::size_t tokens, std::span<std::size_t> capacities) const {
    const std::size_t window = scorer_.window();
    const std::size_t per_layer = allocator_.budget().resolve(tokens, window, shape_);
    if (per_layer < tokens) {
      allocator_.allocate({.per_layer = per_layer, .window = window, .tokens = tokens}, capacities);
    }
    return per_layer;
  }

  const ModelShape& shape() const { return shape_; }
  const S& scorer() const { return scorer_; }
  const T& selector() const { return selector_; }
  const A& allocator() const { return allocator_; }

 private:
  ModelShape shape_;
  S scorer_;
  T selector_;
  A allocator_;
};

template <class Shape, class S, class T, class A = detail::NoPolicy>
requires(!detail::plan_arguments<Shape, S, T, A> || std::same_as<A, detail::NoPolicy>)
    Plan(const Shape&, const S&, const T&, const A& = {})
->Plan<detail::NoPolicy, detail::NoPolicy, detail::NoPolicy>;

}  // namespace compresskv
