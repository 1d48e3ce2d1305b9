#include "thread_pool.hpp"

#include <chrono>

namespace engine {
namespace {

// How long a helper watches for the next loop before it sleeps: longer than the gaps within one token's
// loops.
constexpr auto patience = std::chrono::microseconds(200);

constexpr std::uint32_t loop_of(std::uint64_t ticket) { return static_cast<std::uint32_t>(ticket >> 32U); }
constexpr std::uint32_t unclaimed(std::uint64_t ticket) { return static_cast<std::uint32_t>(ticket); }

}  // namespace

// Delegating: where a thread cannot be started, the destructor ends those that were.
ThreadPool::ThreadPool(int threads) : ThreadPool() {
  for (int i = 1; i < threads; ++i) helpers_.emplace_back([this] { help(); });
}

ThreadPool::~ThreadPool() {
  stop_.store(true);
  loops_.fetch_add(1);
  loops_.notify_all();
  for (std::thread& helper : helpers_) helper.join();
}

void ThreadPool::run(std::size_t count, Call call, void* body) {
  constexpr std::size_t most = 0xffff'ffff;
  const std::unique_lock lock{caller_, std::try_to_lock};
  if (!lock || helpers_.empty() || count <= 1 || count >= most) {
    for (std::size_t i = 0; i < count; ++i) call(body, i);
    return;
  }
  call_ = call;
  body_ = body;
  failed_.store(false, std::memory_order_relaxed);
  failure_ = nullptr;
  done_.store(0, std::memory_order_relaxed);
  count_ = count;
  const std::uint32_t loop = loops_.load(std::memory_order_relaxed) + 1;
  ticket_.store(std::uint64_t{loop} << 32U | count, std::memory_order_release);
  loops_.store(loop, std::memory_order_release);
  loops_.notify_all();

  while (work(loop)) {
  }
  while (done_.load(std::memory_order_acquire) != count) std::this_thread::yield();
  if (failure_) std::rethrow_exception(failure_);
}

// Claims and does one piece of the loop; false when there is none left.
bool ThreadPool::work(std::uint32_t loop) {
  std::uint64_t ticket = ticket_.load(std::memory_order_acquire);
  do {
    if (loop_of(ticket) != loop || unclaimed(ticket) == 0) return false;
  } while (!ticket_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acq_rel));
  invoke(count_ - unclaimed(ticket));
  return true;
}

void ThreadPool::invoke(std::size_t index) {
  if (!failed_.load(std::memory_order_relaxed)) {
    try {
      call_(body_, index);
    } catch (...) {
      if (!failed_.exchange(true)) failure_ = std::current_exception();
    }
  }
  done_.fetch_add(1, std::memory_order_acq_rel);
}

void ThreadPool::help() {
  std::uint32_t seen = 0;
  while (!stop_.load(std::memory_order_relaxed)) {
    const auto give_up = std::chrono::steady_clock::now() + patience;
    while (loops_.load(std::memory_order_acquire) == seen && std::chrono::steady_clock::now() < give_up) {
    }
    loops_.wait(seen, std::memory_order_acquire);
    seen = loops_.load(std::memory_order_acquire);
    while (work(seen)) {
    }
  }
}

}  // namespace engine
