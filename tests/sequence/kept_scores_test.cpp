#include <gtest/gtest.h>

#include <compresskv/sequence/kept_scores.hpp>
#include <cstdint>
#include <vector>

#include "reference/random.hpp"

namespace compresskv::sequence {
namespace {

using reference::Random;
using Rows = std::vector<std::uint32_t>;

/// Scores of a layer as plain lists, one a KV head, window left out.
using Lists = std::vector<std::vector<float>>;

TEST(KeptScores, FollowTheRowsThatEachLayerStillHolds) {
  Random random(74);
  for (int round = 0; round < 200; ++round) {
    const std::size_t heads = random.between(1, 3);
    const std::size_t window = random.between(1, 4);
    KeptScores kept;
    std::vector<Lists> expected;
    // Keeps some of each head's scores, and always the window behind them.
    const auto keep_some = [&](Lists& lists) {
      std::vector<Rows> selection;
      for (auto& list : lists) {
        Rows rows;
        std::vector<float> left;
        for (std::uint32_t row = 0; row < list.size(); ++row) {
          if (random.below(3) > 0) {
            rows.push_back(row);
            left.push_back(list[row]);
          }
        }
        for (std::size_t i = 0; i < window; ++i) {
          rows.push_back(static_cast<std::uint32_t>(list.size() + i));
        }
        list = left;
        selection.push_back(rows);
      }
      return Selection::per_head(selection);
    };
    for (std::size_t layer = 0; layer < 5; ++layer) {
      for (std::size_t earlier = 0; earlier < layer; ++earlier) {
        if (random.coin()) {
          kept.keep(earlier, keep_some(expected[earlier]));
        }
      }
      kept.settle();
      Lists lists(heads);
      std::vector<float> values;
      std::vector<std::size_t> ends;
      for (auto& list : lists) {
        list.resize(random.below(30));
        for (float& score : list) {
          score = random.gaussian();
          values.push_back(score);
        }
        ends.push_back(values.size());
      }
      const std::vector<std::size_t> windows(heads, window);
      const Scores<Granularity::kv_head> scores{values, ends, windows};
      kept.append(scores, keep_some(lists));
      expected.push_back(lists);
      for (std::size_t l = 0; l <= layer; ++l) {
        const auto held = kept.of<Granularity::kv_head>(l);
        ASSERT_EQ(held.rows(), heads);
        for (std::size_t head = 0; head < heads; ++head) {
          const auto row = held.row(head);
          ASSERT_EQ(std::vector<float>(row.begin(), row.end()), expected[l][head]) << l << ' ' << head;
          ASSERT_EQ(held.window(head), window);
        }
      }
    }
  }
}

}  // namespace
}  // namespace compresskv::sequence
