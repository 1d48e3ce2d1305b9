#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <compresskv/select/adaptive.hpp>
#include <cstdint>
#include <functional>
#include <tuple>
#include <vector>

#include "reference/errors.hpp"
#include "reference/random.hpp"
#include "reference/scores.hpp"

namespace compresskv::select {
namespace {

using reference::expect_error;
using Rows = std::vector<std::uint32_t>;
using Heads = std::vector<std::vector<float>>;

std::vector<Rows> selected(const Heads& heads, std::size_t window, std::size_t capacity, double safeguard) {
  std::vector<float> values;
  std::vector<std::size_t> ends;
  for (const auto& head : heads) {
    values.insert(values.end(), head.begin(), head.end());
    ends.push_back(values.size());
  }
  const std::vector<std::size_t> windows(heads.size(), window);
  Workspace workspace;
  Selection selection;
  Adaptive(safeguard).select(Scores<Granularity::kv_head>(values, ends, windows), capacity, workspace,
                             selection);
  std::vector<Rows> rows;
  for (std::size_t head = 0; head < heads.size(); ++head) {
    rows.emplace_back(selection.rows(head).begin(), selection.rows(head).end());
  }
  return rows;
}

/// The rule by a full sort: own shares first, then pairs by score, row and head.
std::vector<Rows> expected(const Heads& heads, std::size_t window, std::size_t capacity, double safeguard) {
  const std::size_t share = capacity - window;
  const auto own = static_cast<std::size_t>(std::floor(safeguard * static_cast<double>(share)));
  std::vector<Rows> rows;
  std::vector<std::tuple<float, std::size_t, std::size_t>> rest;  // minus the score, row, head
  std::size_t open = share * heads.size();
  for (std::size_t head = 0; head < heads.size(); ++head) {
    rows.push_back(reference::top_k(heads[head], std::min(own, heads[head].size())));
    open -= rows.back().size();
    for (std::uint32_t row = 0; row < heads[head].size(); ++row) {
      if (std::find(rows.back().begin(), rows.back().end(), row) == rows.back().end()) {
        rest.emplace_back(-heads[head][row], row, head);
      }
    }
  }
  std::sort(rest.begin(), rest.end());
  for (std::size_t i = 0; i < std::min(open, rest.size()); ++i) {
    rows[std::get<2>(rest[i])].push_back(static_cast<std::uint32_t>(std::get<1>(rest[i])));
  }
  for (std::size_t head = 0; head < heads.size(); ++head) {
    std::sort(rows[head].begin(), rows[head].end());
    for (std::size_t i = 0; i < window; ++i) {
      rows[head].push_back(static_cast<std::uint32_t>(heads[head].size() + i));
    }
  }
  return rows;
}

TEST(Adaptive, HeadsThatNeedMoreGetMore) {
  const Heads heads{{9, 8, 7, 6, 5, 4}, {1, 1, 1, 1, 1, 2}};
  EXPECT_EQ(selected(heads, 1, 4, 0.0), (std::vector<Rows>{{0, 1, 2, 3, 4, 5, 6}, {6}}));
  EXPECT_EQ(selected(heads, 1, 4, 0.34), (std::vector<Rows>{{0, 1, 2, 3, 4, 6}, {5, 6}})) << "each its own";
  EXPECT_EQ(selected(heads, 1, 4, 1.0), (std::vector<Rows>{{0, 1, 2, 6}, {0, 1, 5, 6}})) << "all the same";
}

TEST(Adaptive, TiesGoToTheLowerRowThenTheLowerHead) {
  EXPECT_EQ(selected({{1, 1, 1}, {1, 1, 1}}, 1, 2, 0.0), (std::vector<Rows>{{0, 3}, {0, 3}}));
  EXPECT_EQ(selected({{1, 1, 1}, {1, 1, 1}, {1, 1, 1}}, 1, 2, 0.0),
            (std::vector<Rows>{{0, 3}, {0, 3}, {0, 3}}));
  EXPECT_EQ(selected({{0, 1}, {1, 0}}, 1, 2, 0.0), (std::vector<Rows>{{1, 2}, {0, 2}}));
}

TEST(Adaptive, IsTheFullSortsOverGeneratedScores) {
  reference::Random random(91);
  for (int round = 0; round < 2000; ++round) {
    SCOPED_TRACE(round);
    Heads heads(random.between(1, 5));
    const std::size_t levels = random.pick(std::vector<std::size_t>{1, 2, 5, 1000});  // few: many ties
    const std::size_t length = random.between(0, 40);
    for (auto& head : heads) {
      head.resize(random.coin() ? length : random.between(0, 40));
      for (float& score : head) {
        score = static_cast<float>(random.below(levels));
      }
    }
    const std::size_t window = random.between(1, 4);
    const std::size_t capacity = window + random.between(0, 45);
    const double safeguard = random.pick(std::vector<double>{0.0, 0.2, 0.5, 1.0});
    const auto rows = selected(heads, window, capacity, safeguard);
    ASSERT_EQ(rows, expected(heads, window, capacity, safeguard));
    std::size_t kept = 0;
    std::size_t there = 0;
    for (std::size_t head = 0; head < heads.size(); ++head) {
      kept += rows[head].size();
      there += heads[head].size() + window;
    }
    ASSERT_EQ(kept, std::min(there, heads.size() * capacity)) << "the layer's budget, whole";
  }
}

TEST(Adaptive, RejectsASafeguardThatIsNoShare) {
  expect_error<ArgumentError>([] { Adaptive{-0.1}; }, {"safeguard is -0.1", "0 to 1"});
  expect_error<ArgumentError>([] { Adaptive{1.5}; }, {"safeguard is 1.5"});
}

static_assert(Selector<Adaptive>);
static_assert(Adaptive::accepts(Granularity::kv_head) && !Adaptive::accepts(Granularity::layer));

/// A row that stands for no number must not lead out of the scores.
TEST(Adaptive, KeepsWhatItMayWhateverTheScores) {
  reference::Random random(92);
  for (int round = 0; round < 300; ++round) {
    Heads heads(random.between(1, 4));
    for (auto& head : heads) {
      head.resize(random.between(0, 30));
      for (float& score : head) {
        constexpr std::uint32_t bits[] = {0x7FC00000U, 0xFFC00000U, 0x7F800000U, 0x80000000U, 0x00000000U};
        score = std::bit_cast<float>(bits[random.below(5)]);
      }
    }
    const std::size_t capacity = 2 + random.between(0, 30);
    const auto rows = selected(heads, 2, capacity, 0.2);
    std::size_t kept = 0;
    std::size_t there = 0;
    for (std::size_t head = 0; head < heads.size(); ++head) {
      kept += rows[head].size();
      there += heads[head].size() + 2;
      ASSERT_TRUE(std::adjacent_find(rows[head].begin(), rows[head].end(), std::greater_equal<>()) ==
                  rows[head].end());
      ASSERT_EQ(rows[head].back(), heads[head].size() + 1);
    }
    ASSERT_EQ(kept, std::min(there, heads.size() * capacity));
  }
}

}  // namespace
}  // namespace compresskv::select
