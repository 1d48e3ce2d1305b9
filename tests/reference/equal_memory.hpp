#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <compresskv/core/retained.hpp>
#include <cstddef>

namespace compresskv::reference {

/// Two compressors, of whatever kind, remember the same of their first `layers` layers of two KV heads: all
/// that can be asked.
template <class C>
void expect_equal_memory(const C& a, const C& b, std::size_t layers) {
  EXPECT_TRUE(std::ranges::equal(a.capacities(), b.capacities()));
  for (std::size_t layer = 0; layer < layers; ++layer) {
    const Retained& left = a.retained(layer);
    const Retained& right = b.retained(layer);
    EXPECT_EQ(left.next_position(), right.next_position());
    EXPECT_EQ(left.bytes_freed(), right.bytes_freed());
    ASSERT_EQ(left.lists(), right.lists());
    for (std::size_t head = 0; head < 2; ++head) {
      ASSERT_TRUE(std::ranges::equal(left.positions(head), right.positions(head)));
      ASSERT_EQ(left.rows(head), right.rows(head));
      for (std::size_t row = 0; row < left.rows(head) + 3; ++row) {
        ASSERT_EQ(left.position(row, head), right.position(row, head));
      }
      for (std::size_t position = 0; position < left.next_position() + 3; ++position) {
        ASSERT_EQ(left.row(position, head), right.row(position, head));
        ASSERT_EQ(left.rows_before(position, head), right.rows_before(position, head));
      }
    }
  }
}

}  // namespace compresskv::reference
