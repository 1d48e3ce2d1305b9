// Threads for loops whose pieces are independent.
//
// Made for decoding, which needs hundreds of short loops a token. The caller works too and waits only for
// pieces that a helper has begun, so that a helper which the system has put aside (a busy machine) holds
// nothing up; helpers spin for a moment between loops, because waking a sleeping thread takes longer than
// such a loop.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace engine {

class ThreadPool {
 public:
  /// `threads` at work at once, the caller among them. Throws std::system_error when they cannot be started.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return static_cast<int>(helpers_.size()) + 1; }

  /// Calls `task(i)` once for each i in [0, count), ascending but at the same time, and returns when all have
  /// ended. The first exception of a task is thrown here, after the rest have ended or been skipped. When two
  /// threads call at once, the second does its loop alone; a task may not call it again.
  template <typename Task>
  void parallel_for(std::size_t count, Task&& task) {
    using Body = std::remove_reference_t<Task>;
    const auto call = [](void* body, std::size_t i) { (*static_cast<Body*>(body))(i); };
    run(count, call, const_cast<std::remove_const_t<Body>*>(std::addressof(task)));
  }

 private:
  ThreadPool() = default;

  using Call = void (*)(void* body, std::size_t index);

  void run(std::size_t count, Call call, void* body);
  void help();
  bool work(std::uint32_t loop);
  void invoke(std::size_t index);

  // The number of the loop in the high half, the pieces that nobody has claimed in the low half. Claiming is
  // one compare-and-swap on both, so a helper that comes late cannot claim from a loop that it has not seen
  // begin.
  std::atomic<std::uint64_t> ticket_{0};
  std::size_t count_ = 0;  // this and the task are read by those alone who have claimed a piece
  std::atomic<std::uint32_t> done_{0};
  std::atomic<bool> stop_{false};
  std::atomic<bool> failed_{false};
  Call call_ = nullptr;
  void* body_ = nullptr;
  std::exception_ptr failure_;
  std::atomic<std::uint32_t> loops_{0};  // what sleeping helpers wait on
  std::mutex caller_;
  std::vector<std::thread> helpers_;
};

/// A pool as the library's `Executor`: copyable, does not own the pool.
struct PoolExecutor {
  ThreadPool* pool = nullptr;

  template <typename Task>
  void parallel_for(std::size_t count, Task&& task) {
    pool->parallel_for(count, task);
  }
};

}  // namespace engine
