#pragma once

#include <array>
#include <cstddef>
#include <type_traits>

#include "compresskv/core/element.hpp"
#include "compresskv/core/error.hpp"
#include "compresskv/core/sizes.hpp"
#include "compresskv/view/argument.hpp"
#include "compresskv/view/observation.hpp"
#include "compresskv/view/placement.hpp"
#include "compresskv/view/run.hpp"

namespace compresskv {

/// Shape of hidden states, `[token][element]`.
struct HiddenShape {
  std::size_t tokens = 0;        ///< the last so many of the sequence
  std::size_t hidden_size = 0;   ///< elements of one; they lie side by side
  std::size_t token_stride = 0;  ///< elements from one token to the next; 0: `hidden_size`
};

/// What goes into a layer's attention, in the engine's own memory: after the norm, before the projections to
/// queries, keys and values. Models `HiddenObservation`.
template <Element T>
class HiddenStates {
 public:
  using element = T;

  /// Throws ArgumentError on null, a zero size, or a stride that lays tokens over each other.
  HiddenStates(const T* states, const HiddenShape& shape) : states_(states), shape_(shape) {
    detail::require(states != nullptr, "HiddenStates: states is null: give the layer's hidden states");
    detail::require(shape.tokens > 0 && shape.hidden_size > 0, "HiddenStates: shape has ", shape.tokens,
                    " tokens of ", shape.hidden_size, " elements: each must be at least 1");
    if (shape.token_stride == 0) {
      shape_.token_stride = shape.hidden_size;
    }
    std::array<detail::Axis, 1> axes = {detail::Axis{"token", shape_.token_stride, shape.tokens}};
    detail::reach_without_overlap("HiddenStates", axes, shape.hidden_size, detail::max_bytes / sizeof(T));
  }

  /// Does not compile, and says what is wrong.
  template <class States, class Shape>
  requires(!std::is_convertible_v<const States&, const T*> ||
           !std::is_convertible_v<const Shape&, HiddenShape>) HiddenStates(const States&, const Shape&) {
    constexpr bool elements = detail::points_to<States, const T> && std::is_pointer_v<States>;
    static_assert(elements,
                  "hidden states come first, as a pointer to float, half or bfloat16: "
                  "HiddenStates{states.data(), shape}");
    static_assert(!elements, "the second argument is a HiddenShape: HiddenStates{states, shape}");
  }

  std::size_t tokens() const { return shape_.tokens; }
  std::size_t hidden_size() const { return shape_.hidden_size; }
  /// One row a token, in order.
  Run<const T> hidden_run() const {
    return {.base = states_,
            .rows = shape_.tokens,
            .row_stride = static_cast<std::ptrdiff_t>(shape_.token_stride),
            .chunk = shape_.hidden_size,
            .chunk_stride = static_cast<std::ptrdiff_t>(shape_.hidden_size)};
  }

 private:
  const T* states_ = nullptr;
  HiddenShape shape_;
};

template <class States, class Shape>
HiddenStates(const States&, const Shape&) -> HiddenStates<detail::PointedElement<States>>;

}  // namespace compresskv
