#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <numeric>
#include <thread>
#include <vector>

#include "reference/random.hpp"

namespace compresskv::reference {

/// Last task first.
struct ReverseExecutor {
  template <class Task>
  void parallel_for(std::size_t count, Task&& task) {
    for (std::size_t i = count; i > 0; --i) {
      task(i - 1);
    }
  }
};

/// Another order every time.
struct ShuffledExecutor {
  Random random{7};

  template <class Task>
  void parallel_for(std::size_t count, Task&& task) {
    std::vector<std::size_t> order(count);
    std::iota(order.begin(), order.end(), std::size_t{0});
    for (std::size_t i = count; i > 1; --i) {
      std::swap(order[i - 1], order[random.below(i)]);
    }
    std::for_each(order.begin(), order.end(), task);
  }
};

/// Threads that take tasks as they come.
struct ThreadExecutor {
  std::size_t threads = 3;

  template <class Task>
  void parallel_for(std::size_t count, Task&& task) {
    std::atomic<std::size_t> next{0};
    std::vector<std::thread> pool;
    for (std::size_t t = 0; t < threads; ++t) {
      pool.emplace_back([&] {
        for (std::size_t i = next++; i < count; i = next++) {
          task(i);
        }
      });
    }
    for (std::thread& thread : pool) {
      thread.join();
    }
  }
};

}  // namespace compresskv::reference
