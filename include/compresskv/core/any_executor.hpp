#pragma once

#include <concepts>
#include <cstddef>

#include "compresskv/core/executor.hpp"
#include "compresskv/core/function_ref.hpp"

namespace compresskv {

/// Any `Executor`, by reference: models `Executor`. The executor must outlive it; one task more or less goes
/// through a pointer, and nothing is allocated.
class AnyExecutor {
 public:
  /// Everything on the calling thread, in order.
  AnyExecutor() = default;

  template <class X>
  requires(!std::same_as<X, AnyExecutor> && Executor<X>) AnyExecutor(X& executor)
      : executor_(&executor), run_([](void* object, std::size_t count, FunctionRef<void(std::size_t)> task) {
          static_cast<X*>(object)->parallel_for(count, task);
        }) {}

  template <class Task>
  void parallel_for(std::size_t count, Task&& task) {
    if (run_ == nullptr) {
      SerialExecutor{}.parallel_for(count, task);
    } else {
      run_(executor_, count, task);
    }
  }

 private:
  void* executor_ = nullptr;
  void (*run_)(void* executor, std::size_t count, FunctionRef<void(std::size_t)> task) = nullptr;
};

}  // namespace compresskv
