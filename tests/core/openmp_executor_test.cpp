#include <gtest/gtest.h>

#include <atomic>
#include <compresskv/compresskv.hpp>
#include <compresskv/core/openmp_executor.hpp>
#include <set>
#include <vector>

namespace compresskv {
namespace {

static_assert(Executor<OpenMpExecutor>);

TEST(OpenMpExecutor, RunsEveryTaskOnceOnAsManyThreadsAsAsked) {
  for (const int threads : {0, 1, 2, 3}) {
    OpenMpExecutor executor{threads};
    std::vector<std::atomic<int>> runs(1000);
    std::vector<int> on(1000);
    executor.parallel_for(runs.size(), [&](std::size_t i) {
      ++runs[i];
      on[i] = omp_get_thread_num();
    });
    for (const auto& count : runs) {
      EXPECT_EQ(count, 1);
    }
    if (threads > 0) {
      EXPECT_LE(std::set<int>(on.begin(), on.end()).size(), static_cast<std::size_t>(threads));
    }
    executor.parallel_for(0, [](std::size_t) { FAIL() << "there is nothing to do"; });
  }
}

}  // namespace
}  // namespace compresskv
