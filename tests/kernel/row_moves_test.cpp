#include <gtest/gtest.h>

#include <compresskv/kernel/row_moves.hpp>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "reference/cache.hpp"
#include "reference/random.hpp"
#include "reference/scattered_kv.hpp"

namespace compresskv::kernel {
namespace {

using reference::Cache;
using reference::Random;
using Rows = std::vector<std::uint32_t>;

/// Ascending rows, some of them neighbours, as in a selection.
Rows random_rows(Random& random, std::size_t count) {
  Rows rows;
  bool keep = random.coin();
  for (std::uint32_t row = 0; row < count; ++row) {
    keep = random.below(3) == 0 ? !keep : keep;
    if (keep) {
      rows.push_back(row);
    }
  }
  if (rows.empty()) {
    rows.push_back(static_cast<std::uint32_t>(random.below(count)));
  }
  return rows;
}

template <class T>
struct RowMoves : testing::Test {};
using Elements = testing::Types<float, half>;
TYPED_TEST_SUITE(RowMoves, Elements);

TYPED_TEST(RowMoves, InPlaceIsACopyToANewCache) {
  Random random(61);
  for (int round = 0; round < 400; ++round) {
    const KvShape shape{.kv_heads = random.between(1, 3),
                        .rows = random.between(1, 60),
                        .head_dim = random.pick(std::vector<std::size_t>{1, 4, 7, 16}),
                        .allocated_rows = 64};
    Cache<TypeParam> cache(shape, random.pick(reference::all_arrangements));
    cache.fill(random);
    std::vector<Rows> rows;
    for (std::size_t head = 0; head < shape.kv_heads; ++head) {
      rows.push_back(random_rows(random, shape.rows));
    }
    const auto expected = cache.compacted([&](std::size_t head) { return rows[head]; });
    for (std::size_t head = 0; head < shape.kv_heads; ++head) {
      copy_rows(cache.view(), cache.view(), head, rows[head]);
    }
    ASSERT_EQ(cache, expected) << round;
  }
}

TYPED_TEST(RowMoves, BetweenAnyTwoLayoutsOfRuns) {
  Random random(62);
  for (int round = 0; round < 400; ++round) {
    const std::size_t head_dim = random.pick(std::vector<std::size_t>{1, 4, 12, 20});
    const KvShape shape{.kv_heads = 2, .rows = random.between(1, 40), .head_dim = head_dim};
    Cache<TypeParam> source(shape, random.pick(reference::all_arrangements));
    source.fill(random);
    const auto original = source;
    const std::vector<std::size_t> chunks{1, 3, 4, 8, head_dim};
    reference::ScatteredMemory<TypeParam> scattered(source, random, 7, random.pick(chunks));
    reference::ScatteredMemory<TypeParam> target(source, random, 7, random.pick(chunks));
    const Rows rows = random_rows(random, shape.rows);
    const auto expected = source.compacted([&](std::size_t) { return rows; });
    for (std::size_t head = 0; head < 2; ++head) {
      copy_rows(source.view(), target.view(), head, rows);
    }
    ASSERT_TRUE(target.starts_like(expected, rows.size())) << round;
    ASSERT_EQ(source, original);
    Cache<TypeParam> back(shape, random.pick(reference::all_arrangements));
    for (std::size_t head = 0; head < 2; ++head) {
      copy_rows(scattered.view(), back.view(), head, rows);
    }
    reference::ScatteredMemory<TypeParam> again(back, random, 40, head_dim);
    ASSERT_TRUE(again.starts_like(expected, rows.size())) << round;
    for (std::size_t head = 0; head < 2; ++head) {
      copy_rows(scattered.view(), scattered.view(), head, rows);
    }
    ASSERT_TRUE(scattered.starts_like(expected, rows.size())) << "in place, round " << round;
  }
}

TEST(RowMoves, KeysAndValuesMayDifferInType) {
  Random random(63);
  Cache<bfloat16, float> cache({.kv_heads = 2, .rows = 30, .head_dim = 6},
                               reference::Arrangement::token_head_dim);
  cache.fill(random);
  const Rows rows{0, 3, 4, 5, 29};
  const auto expected = cache.compacted([&](std::size_t) { return rows; });
  copy_rows(cache.view(), cache.view(), 0, rows);
  copy_rows(cache.view(), cache.view(), 1, rows);
  EXPECT_EQ(cache, expected);
}

TEST(RowMoves, NoRowsMoveNothing) {
  Random random(64);
  Cache<float> cache({.kv_heads = 1, .rows = 5, .head_dim = 4}, reference::Arrangement::head_token_dim);
  cache.fill(random);
  const auto original = cache;
  copy_rows(cache.view(), cache.view(), 0, Rows{});
  EXPECT_EQ(cache, original);
}

}  // namespace
}  // namespace compresskv::kernel
