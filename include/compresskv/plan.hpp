#pragma once

#include <utility>

#include "compresskv/budget/allocator.hpp"
#include "compresskv/core/policy.hpp"
#include "compresskv/core/shape.hpp"
#include "compresskv/score/scorer.hpp"
#include "compresskv/select/selector.hpp"

namespace compresskv {

/// What to do for a model: a scorer, a selector and an allocator, made once, immutable, shared by all
/// sequences and threads.
///
/// A selector that cannot use the scorer's granularity does not compile.
template <score::Scorer S, select::Selector T, budget::Allocator A>
class Plan {
 public:
  using scorer_type = S;
  using allocator_type = A;
  static constexpr Reach reach = furthest(S::reach, T::reach, A::reach);

  static_assert(T::accepts(S::granularity),
                "this selector cannot use scores of this scorer's granularity: a shared selector needs one "
                "row a layer, "
                "a per-head selector one row a KV head");

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

}  // namespace compresskv
