#pragma once

#include <concepts>
#include <type_traits>
#include <utility>

namespace compresskv {

template <class Signature>
class FunctionRef;

/// A function object by reference, whatever its type: two pointers, no memory. What it refers to must outlive
/// it, which a lambda written as an argument does until the call returns. Results convert as in a `return`.
template <class R, class... Args>
class FunctionRef<R(Args...)> {
 public:
  /// None; to be asked for by its `bool`.
  FunctionRef() = default;

  template <class F>
  requires(!std::same_as<std::remove_cvref_t<F>, FunctionRef> && std::is_object_v<std::remove_cvref_t<F>> &&
           std::is_invocable_v<F&, Args...>) FunctionRef(F&& function)
  noexcept
      : object_(const_cast<void*>(static_cast<const void*>(&function))),
        call_([](void* object, Args... arguments) -> R {
          return (*static_cast<std::remove_reference_t<F>*>(object))(std::forward<Args>(arguments)...);
        }) {}

  explicit operator bool() const { return call_ != nullptr; }

  R operator()(Args... arguments) const { return call_(object_, std::forward<Args>(arguments)...); }

 private:
  void* object_ = nullptr;
  R (*call_)(void* object, Args... arguments) = nullptr;
};

}  // namespace compresskv
