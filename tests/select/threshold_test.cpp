#include <gtest/gtest.h>

#include <compresskv/compresskv.hpp>
#include <cstdint>
#include <limits>
#include <vector>

#include "reference/errors.hpp"
#include "reference/layer_case.hpp"
#include "reference/random.hpp"
#include "reference/scores.hpp"

namespace compresskv::select {
namespace {

using reference::expect_error;
using Lists = std::vector<std::vector<std::uint32_t>>;

static_assert(Selector<Threshold> && judges_rows_alone<Threshold>);
static_assert(!judges_rows_alone<GroupedTopK> && !judges_rows_alone<Adaptive>);
static_assert(Threshold::accepts(Granularity::kv_head) && !Threshold::accepts(Granularity::layer));

Lists kept_of(const std::vector<std::vector<float>>& heads, std::size_t window, std::size_t capacity,
              float threshold) {
  std::vector<float> values;
  std::vector<std::size_t> ends;
  std::vector<std::size_t> windows(heads.size(), window);
  for (const auto& head : heads) {
    values.insert(values.end(), head.begin(), head.end());
    ends.push_back(values.size());
  }
  Workspace workspace;
  Selection selection;
  Threshold(threshold).select(Scores<Granularity::kv_head>(values, ends, windows), capacity, workspace,
                              selection);
  Lists lists;
  for (std::size_t head = 0; head < heads.size(); ++head) {
    lists.emplace_back(selection.rows(head).begin(), selection.rows(head).end());
  }
  return lists;
}

TEST(Threshold, KeepsWhatReachesItAndTheWindow) {
  EXPECT_EQ(kept_of({{-1.0F, -4.0F, -3.9F, -9.0F}, {-5.0F, -5.0F, -5.0F, -5.0F}, {0.0F, 0.0F, 0.0F, 0.0F}}, 2,
                    6, -4.0F),
            (Lists{{0, 1, 2, 4, 5}, {4, 5}, {0, 1, 2, 3, 4, 5}}));
}

TEST(Threshold, ACapacityBoundsItByTheHighestScores) {
  EXPECT_EQ(kept_of({{-1.0F, -3.0F, -2.0F, -3.0F, -9.0F}}, 1, 4, -4.0F), (Lists{{0, 1, 2, 5}}))
      << "lower position";
  EXPECT_EQ(kept_of({{-1.0F, -3.0F, -2.0F, -3.0F, -9.0F}}, 1, 1, -4.0F), (Lists{{5}}));
}

TEST(Threshold, IsTheRuleOverRandomScores) {
  reference::Random random(11);
  for (std::size_t i = 0; i < 200; ++i) {
    const std::size_t window = random.between(1, 5);
    const std::size_t capacity = random.between(window, 40);
    std::vector<std::vector<float>> heads(random.between(1, 4));
    for (auto& head : heads) {
      head.resize(random.below(40));
      for (float& score : head) {
        score = static_cast<float>(random.below(9));
      }
    }
    const auto threshold = static_cast<float>(random.below(9));
    Lists expected;
    for (const auto& head : heads) {
      std::size_t reached = 0;
      for (const float score : head) {
        reached += score >= threshold ? 1U : 0U;
      }
      expected.push_back(reference::top_k(head, std::min(reached, capacity - window)));
      for (std::size_t row = 0; row < window; ++row) {
        expected.back().push_back(static_cast<std::uint32_t>(head.size() + row));
      }
    }
    EXPECT_EQ(kept_of(heads, window, capacity, threshold), expected);
  }
}

TEST(Threshold, RefusesWhatIsNoScore) {
  expect_error<ArgumentError>([] { Threshold{std::numeric_limits<float>::quiet_NaN()}; },
                              {"threshold is nan"});
  expect_error<ArgumentError>([] { Threshold{-std::numeric_limits<float>::infinity()}; },
                              {"threshold is -inf", "must be finite"});
}

TEST(Threshold, EvictsWhereABudgetWouldHoldAll) {
  // Of any scorer: keys of length 1 but for two.
  reference::Layer<float> layer({.kv_heads = 2, .head_dim = 4, .rows = 30, .window = 3, .capacity = 3});
  for (std::size_t t = 0; t < 30; ++t) {
    for (std::size_t e = 0; e < 4; ++e) {
      layer.cache.keys[layer.cache.at(0, t, e)] = e == 0 ? (t == 7 || t == 9 ? 9.0F : 1.0F) : 0.0F;
      layer.cache.keys[layer.cache.at(1, t, e)] = e == 0 ? 1.0F : 0.0F;
    }
  }
  const Plan plan{layer.shape, score::Knorm{{.window = 3}}, Threshold{-2.0F},
                  budget::Uniform{Budget::kept_ratio(1.0)}};
  Compressor compressor{plan};
  compressor.begin(30);
  const Retained& kept = compressor.compress(0, layer.cache.view());
  EXPECT_EQ(compressor.capacities()[0], 30U) << "what it may keep at most";
  EXPECT_EQ(kept.rows(0), 28U);
  EXPECT_EQ(kept.rows(1), 30U);
  EXPECT_FALSE(kept.row(7, 0).has_value());

  compressor.begin(3);
  layer.cache.set_rows({3, 3});
  EXPECT_EQ(compressor.compress(0, layer.cache.view()).rows(), 3U) << "the window alone: nothing is scored";
}

}  // namespace
}  // namespace compresskv::select
