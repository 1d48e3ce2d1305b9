#include <gtest/gtest.h>

#include <compresskv/core/selection.hpp>
#include <cstdint>
#include <vector>

#include "reference/errors.hpp"

namespace compresskv {
namespace {

using reference::expect_error;
using Rows = std::vector<std::uint32_t>;

Rows rows_of(const Selection& lists, std::size_t head) {
  return {lists.rows(head).begin(), lists.rows(head).end()};
}

/// Validates for two KV heads of ten rows each.
void validate(const Selection& selection) {
  selection.validate(2, [](std::size_t) { return std::size_t{10}; });
}

TEST(Selection, OneListServesAllHeads) {
  const auto selection = Selection::shared_by_heads(Rows{1, 4, 9});
  EXPECT_TRUE(selection.shared());
  EXPECT_EQ(selection.lists(), 1U);
  EXPECT_EQ(rows_of(selection, 0), (Rows{1, 4, 9}));
  EXPECT_EQ(rows_of(selection, 7), (Rows{1, 4, 9}));
  EXPECT_NO_THROW(validate(selection));
}

TEST(Selection, ListsOfHeadsMayDifferInLength) {
  const std::vector<Rows> lists{{0, 9}, {2, 3, 4, 5}};
  const auto selection = Selection::per_head(lists);
  EXPECT_FALSE(selection.shared());
  EXPECT_EQ(selection.lists(), 2U);
  EXPECT_EQ(rows_of(selection, 0), lists[0]);
  EXPECT_EQ(rows_of(selection, 1), lists[1]);
  EXPECT_NO_THROW(validate(selection));
}

TEST(Selection, IsAValue) {
  const auto shared = Selection::shared_by_heads(Rows{1, 2});
  Selection copy = shared;
  EXPECT_EQ(copy, shared);
  copy.assign_shared(2)[0] = 0;
  EXPECT_NE(copy, shared);
  EXPECT_EQ(rows_of(shared, 0), (Rows{1, 2}));
  EXPECT_NE(Selection::per_head(std::vector<Rows>{{1, 2}}), shared)
      << "a list for one head is not one for all";
}

TEST(Selection, MemoryOfListsIsReused) {
  Selection selection;
  selection.assign_shared(100);
  const std::size_t bytes = selection.memory_bytes();
  selection.assign_per_head(4);
  selection.append_head(3)[2] = 8;
  selection.append_head(1)[0] = 5;
  EXPECT_FALSE(selection.shared());
  EXPECT_EQ(selection.rows(0).size(), 3U);
  EXPECT_EQ(selection.rows(0)[2], 8U);
  EXPECT_EQ(rows_of(selection, 1), (Rows{5}));
  EXPECT_GE(selection.memory_bytes(), bytes) << "memory is kept";
  EXPECT_EQ(selection.assign_shared(100).size(), 100U);
  EXPECT_TRUE(selection.shared());
}

TEST(Selection, RejectsListsForOtherHeads) {
  expect_error<ArgumentError>(
      [] {
        validate(Selection::per_head(std::vector<Rows>{{1}, {1}, {1}}));
      },
      {"selection has lists for 3 KV heads", "the layer has 2"});
  expect_error<ArgumentError>([] { validate(Selection::per_head(std::vector<Rows>{})); },
                              {"selection has lists for 0 KV heads", "the layer has 2"});
}

TEST(Selection, RejectsAHeadWithoutRows) {
  expect_error<ArgumentError>([] { validate(Selection{}); }, {"selection keeps no row of KV head 0"});
  expect_error<ArgumentError>(
      [] {
        validate(Selection::per_head(std::vector<Rows>{{1}, {}}));
      },
      {"selection keeps no row of KV head 1", "keep at least one"});
}

TEST(Selection, RejectsRowsThatDoNotAscend) {
  expect_error<ArgumentError>(
      [] {
        validate(Selection::shared_by_heads(Rows{1, 5, 5}));
      },
      {"selection of KV head 0 has row 5 after row 5", "must ascend, each once"});
  expect_error<ArgumentError>(
      [] {
        validate(Selection::per_head(std::vector<Rows>{{0}, {4, 2}}));
      },
      {"selection of KV head 1 has row 2 after row 4"});
}

TEST(Selection, RejectsRowsBeyondTheCache) {
  expect_error<ArgumentError>(
      [] {
        validate(Selection::shared_by_heads(Rows{0, 10}));
      },
      {"selection of KV head 0 keeps row 10", "rows 0 to 9"});
  // Heads may hold different numbers of rows.
  const auto selection = Selection::per_head(std::vector<Rows>{{9}, {9}});
  expect_error<ArgumentError>(
      [&] {
        selection.validate(2, [](std::size_t head) { return head == 0 ? std::size_t{10} : std::size_t{4}; });
      },
      {"selection of KV head 1 keeps row 9", "rows 0 to 3"});
}

}  // namespace
}  // namespace compresskv
