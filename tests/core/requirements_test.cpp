// Executor, and how far a composition reaches. A requirement is a line here.

#include <gtest/gtest.h>

#include <compresskv/core/element.hpp>
#include <compresskv/core/executor.hpp>
#include <compresskv/core/policy.hpp>
#include <cstdint>
#include <vector>

#include "reference/executors.hpp"

namespace compresskv {
namespace {

// | Element | float, Eigen::half, Eigen::bfloat16, each of them const or not |
static_assert(Element<float> && Element<const float>);
static_assert(Element<Eigen::half> && Element<const Eigen::half>);
static_assert(Element<Eigen::bfloat16> && Element<const Eigen::bfloat16>);
static_assert(!Element<double> && !Element<int> && !Element<float&> && !Element<std::uint16_t>);

// | Executor | parallel_for(count, task) |
static_assert(Executor<SerialExecutor>);
static_assert(Executor<reference::ReverseExecutor> && Executor<reference::ShuffledExecutor> &&
              Executor<reference::ThreadExecutor>);
struct NoParallelFor {};
struct NoTask {
  void parallel_for(std::size_t) {}
};
struct OnlyOnRvalues {
  void parallel_for(std::size_t, void (*)(std::size_t)) && {}
};
static_assert(!Executor<NoParallelFor> && !Executor<NoTask> && !Executor<OnlyOnRvalues>);

// | Reach | the furthest of three |
static_assert(furthest(Reach::own_layer, Reach::own_layer, Reach::own_layer) == Reach::own_layer);
static_assert(furthest(Reach::own_layer, Reach::earlier_layers, Reach::own_layer) == Reach::earlier_layers);
static_assert(furthest(Reach::all_layers, Reach::earlier_layers, Reach::own_layer) == Reach::all_layers);

template <class X>
std::vector<int> calls(X executor, std::size_t count) {
  std::vector<int> seen(count, 0);
  executor.parallel_for(count, [&](std::size_t i) { ++seen[i]; });
  return seen;
}

TEST(Executor, CallsEachTaskOnce) {
  for (const std::size_t count : {0U, 1U, 100U}) {
    const std::vector<int> once(count, 1);
    EXPECT_EQ(calls(SerialExecutor{}, count), once);
    EXPECT_EQ(calls(reference::ReverseExecutor{}, count), once);
    EXPECT_EQ(calls(reference::ShuffledExecutor{}, count), once);
    EXPECT_EQ(calls(reference::ThreadExecutor{}, count), once);
  }
}

TEST(Executor, SerialGoesInOrder) {
  std::vector<std::size_t> order;
  SerialExecutor{}.parallel_for(4, [&](std::size_t i) { order.push_back(i); });
  EXPECT_EQ(order, (std::vector<std::size_t>{0, 1, 2, 3}));
}

}  // namespace
}  // namespace compresskv
