#include <gtest/gtest.h>

#include <algorithm>
#include <compresskv/core/positions.hpp>
#include <cstdint>
#include <vector>

#include "reference/random.hpp"

namespace compresskv {
namespace {

using Positions = std::vector<std::uint32_t>;

void expect_same(const PositionSet& set, const Positions& expected) {
  ASSERT_EQ(set.size(), expected.size());
  ASSERT_EQ(Positions(set.begin(), set.end()), expected);
  const std::size_t limit = expected.empty() ? 130 : expected.back() + 700U;
  for (std::size_t position = 0; position < limit; ++position) {
    const auto at = std::lower_bound(expected.begin(), expected.end(), position);
    const auto before = static_cast<std::size_t>(at - expected.begin());
    ASSERT_EQ(set.rows_before(position), before) << "position " << position;
    if (at != expected.end() && *at == position) {
      ASSERT_EQ(set.row(position), before);
    } else {
      ASSERT_EQ(set.row(position), std::nullopt) << "position " << position;
    }
  }
  for (std::size_t row = 0; row < expected.size(); ++row) {
    ASSERT_EQ(set[row], expected[row]) << "row " << row;
  }
}

/// Positions below `limit` with gaps of every size: inside a word, over words, over counts.
Positions drawn(reference::Random& random, std::size_t first, std::size_t limit) {
  Positions positions;
  const std::size_t largest_gap = random.pick(std::vector<std::size_t>{1, 2, 40, 300, 3000});
  for (std::size_t p = first + random.below(largest_gap); p < limit; p += random.between(1, largest_gap)) {
    positions.push_back(static_cast<std::uint32_t>(p));
  }
  return positions;
}

TEST(PositionSet, IsTheSortedListThatItStandsFor) {
  reference::Random random(1);
  PositionSet set;
  for (int i = 0; i < 60; ++i) {
    SCOPED_TRACE(i);
    const Positions expected = drawn(random, 0, random.pick(std::vector<std::size_t>{1, 64, 65, 513, 4000}));
    set.clear();
    for (const std::uint32_t position : expected) {
      set.push_back(position);
    }
    expect_same(set, expected);
  }
}

TEST(PositionSet, GrowsByRangesAndIsCutAnywhere) {
  reference::Random random(2);
  for (int i = 0; i < 60; ++i) {
    SCOPED_TRACE(i);
    PositionSet set;
    Positions expected;
    std::size_t next = 0;
    for (int step = 0; step < 6; ++step) {
      const std::size_t first = next + random.pick(std::vector<std::size_t>{0, 0, 1, 63, 64, 600});
      next = first + random.pick(std::vector<std::size_t>{0, 1, 63, 64, 65, 1000, 3000});
      set.append(first, next);
      for (std::size_t p = first; p < next; ++p) {
        expected.push_back(static_cast<std::uint32_t>(p));
      }
      if (random.coin()) {
        set.push_back(next);
        expected.push_back(static_cast<std::uint32_t>(next));
        ++next;
      }
      if (random.coin()) {
        const std::size_t limit = random.between(1, next + 70);
        set.truncate(limit);
        expected.erase(std::lower_bound(expected.begin(), expected.end(), limit), expected.end());
        next = std::min(next, limit);
      }
      expect_same(set, expected);
    }
  }
}

TEST(PositionSet, IteratorsSeekAscendingRows) {
  reference::Random random(3);
  for (int i = 0; i < 60; ++i) {
    const Positions expected = drawn(random, 0, 3000);
    PositionSet set;
    for (const std::uint32_t position : expected) {
      set.push_back(position);
    }
    auto at = set.begin();
    for (std::size_t row = 0; row < expected.size(); row += random.below(90)) {
      at.seek(row);
      ASSERT_EQ(*at, expected[row]) << "row " << row;
    }
  }
}

TEST(PositionSet, AssigningAfterReservingKeepsItsMemory) {
  PositionSet large;
  large.append(0, 5000);
  PositionSet set;
  set.reserve_for(large);
  const std::size_t bytes = set.memory_bytes();
  set = large;
  EXPECT_EQ(set.memory_bytes(), bytes);
  EXPECT_LE(bytes * 8, 5000 * 11 / 10 + 1024U) << "about 1.1 bits a position";
  set.truncate(3);
  EXPECT_EQ(set.memory_bytes(), bytes);
}

}  // namespace
}  // namespace compresskv
