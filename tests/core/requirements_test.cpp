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

// | Element | float, half, bfloat16, each of them const or not |
static_assert(Element<float> && Element<const float>);
static_assert(Element<half> && Element<const half>);
static_assert(Element<bfloat16> && Element<const bfloat16>);
static_assert(!Element<double> && !Element<int> && !Element<float&> && !Element<std::uint16_t>);

// | Stored | an Element, a quantised block, or int8 with scale and zero point apart |
static_assert(Stored<float> && Stored<const BlockQ8_0> && Stored<BlockQ4_0> && Stored<AffineInt8>);
static_assert(ElementBlock<BlockQ8_0> && !ElementBlock<float> && !ElementBlock<AffineInt8>);
static_assert(!Stored<double> && !Stored<std::int8_t> && !Element<BlockQ8_0> && !Element<AffineInt8>);
static_assert(row_bytes<float>(64) == 256 && row_bytes<half>(64) == 128);
static_assert(row_bytes<BlockQ8_0>(64) == 68 && row_bytes<BlockQ4_0>(64) == 36);
static_assert(row_bytes<AffineInt8>(64) == 72, "the scale and the zero point count");

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
