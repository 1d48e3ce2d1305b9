#pragma once

#include <compresskv/methods.hpp>
#include <type_traits>

namespace compresskv::reference {

/// `with_method` for tests that show the queries of layers as they arrive: methods that have the context
/// repeated or want hidden states have tests of their own, and `f` is not called for them.
template <class F>
void with_arriving_method(Method method, const MethodSettings& settings, F&& f) {
  with_method(method, settings, [&](auto scorer, auto selector, auto allocator) {
    if constexpr (decltype(scorer)::needs != Needs::repeats &&
                  decltype(scorer)::needs != Needs::hidden_states) {
      f(scorer, selector, allocator);
    }
  });
}

}  // namespace compresskv::reference
