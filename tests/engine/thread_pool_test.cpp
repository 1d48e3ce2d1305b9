#include "engine/thread_pool.hpp"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <compresskv/core/executor.hpp>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace engine {
namespace {

static_assert(compresskv::Executor<ThreadPool>);
static_assert(compresskv::Executor<PoolExecutor>);

TEST(ThreadPool, DoesEveryPieceOnce) {
  for (const int threads : {1, 2, 5}) {
    ThreadPool pool{threads};
    EXPECT_EQ(pool.threads(), threads);
    for (const std::size_t count : {0UL, 1UL, 2UL, 3UL, 100UL, 1000UL}) {
      std::vector<std::atomic<int>> done(count);
      pool.parallel_for(count, [&](std::size_t i) { done[i].fetch_add(1); });
      for (std::size_t i = 0; i < count; ++i) ASSERT_EQ(done[i].load(), 1) << i << " of " << count;
    }
  }
}

// Short loops in quick succession are where a helper that wakes late could work on a loop that is over.
TEST(ThreadPool, KeepsLoopsApart) {
  ThreadPool pool{4};
  for (int round = 0; round < 20000; ++round) {
    std::vector<int> out(static_cast<std::size_t>(1 + round % 7), -1);
    pool.parallel_for(out.size(), [&](std::size_t i) { out[i] = round; });
    for (const int value : out) ASSERT_EQ(value, round);
  }
}

TEST(ThreadPool, WakesHelpersThatSleep) {
  ThreadPool pool{2};
  for (int round = 0; round < 5; ++round) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    std::atomic<int> done{0};
    // Each piece waits for the other: only two threads at once can finish them.
    pool.parallel_for(2, [&](std::size_t) {
      done.fetch_add(1);
      while (done.load() < 2) std::this_thread::yield();
    });
    EXPECT_EQ(done.load(), 2);
  }
}

TEST(ThreadPool, ThrowsWhatATaskThrewAndGoesOn) {
  ThreadPool pool{3};
  for (int round = 0; round < 100; ++round) {
    try {
      pool.parallel_for(50, [](std::size_t i) {
        if (i % 10 == 7) throw std::runtime_error("piece " + std::to_string(i));
      });
      FAIL() << "no exception";
    } catch (const std::runtime_error& error) {
      EXPECT_EQ(std::string{error.what()}.substr(0, 6), "piece ");
    }
    std::atomic<int> done{0};
    pool.parallel_for(50, [&](std::size_t) { done.fetch_add(1); });
    ASSERT_EQ(done.load(), 50);
  }
}

TEST(ThreadPool, ServesSeveralCallers) {
  ThreadPool pool{2};
  std::atomic<int> done{0};
  std::vector<std::thread> callers;
  for (int c = 0; c < 4; ++c) {
    callers.emplace_back([&] {
      for (int round = 0; round < 500; ++round)
        pool.parallel_for(10, [&](std::size_t) { done.fetch_add(1); });
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(done.load(), 4 * 500 * 10);
}

}  // namespace
}  // namespace engine
