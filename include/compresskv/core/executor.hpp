#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <span>

namespace compresskv {

/// Where parallel work runs. Threads belong to the engine: `parallel_for(n, task)` calls `task(i)` once for
/// each i in [0, n), in any order, on any threads, and returns when all have ended. Tasks do not throw. The
/// number of threads never changes a result. Neighbouring tasks read neighbouring memory: give each thread a
/// stretch of them.
///
/// `parallel_for` may throw (a pool that has stopped), before, between or after the tasks, once none of them
/// runs any more. While scores are computed its exception goes on to the caller, and nothing has changed.
/// Where rows move there is no way back: the tasks that it left are then done on the calling thread, and its
/// exception is dropped.
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

namespace detail {

/// Every task once, whatever the executor does. `done` has a number a task.
template <Executor X, class Task>
void run_all(X& executor, std::span<std::size_t> done, Task&& task) noexcept {
  std::fill(done.begin(), done.end(), std::size_t{0});
  const auto once = [&](std::size_t i) {
    if (done[i] == 0) {
      task(i);
      done[i] = 1;
    }
  };
  try {
    executor.parallel_for(done.size(), once);
  } catch (...) {  // what is left follows
  }
  for (std::size_t i = 0; i < done.size(); ++i) {
    once(i);
  }
}

}  // namespace detail
}  // namespace compresskv
