#pragma once

#include <concepts>
#include <cstddef>

namespace compresskv {

/// Where parallel work runs. Threads belong to the engine: `parallel_for(n, task)` calls `task(i)` once for
/// each i in [0, n), in any order, on any threads, and returns when all have ended. Tasks do not throw. The
/// number of threads never changes a result. Neighbouring tasks read neighbouring memory: give each thread a
/// stretch of them.
template <class X>
concept Executor = requires(X& executor, std::size_t count, void (*task)(std::size_t)) {
  executor.parallel_for(count, task);
};

/// The default: everything on the calling thread, in order.
struct SerialExecutor {
  template <class Task>
  void parallel_for(std::size_t count, Task&& task) {
    for (std::size_t i = 0; i < count; ++i) {
      task(i);
    }
  }
};

}  // namespace compresskv
