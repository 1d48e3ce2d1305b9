#include <gtest/gtest.h>

#include <compresskv/select/shared_top_k.hpp>
#include <cstdint>
#include <memory>
#include <vector>

#include "reference/random.hpp"
#include "reference/scores.hpp"

namespace compresskv::select {
namespace {

using Rows = std::vector<std::uint32_t>;

Rows selected(std::vector<float> scores, std::size_t window, std::size_t capacity) {
  Workspace workspace;
  Selection selection;
  const std::vector<std::size_t> ends{scores.size()};
  SharedTopK{}.select(Scores<Granularity::layer>(scores, ends, std::span(&window, 1)), capacity, workspace,
                      selection);
  EXPECT_TRUE(selection.shared());
  return {selection.rows().begin(), selection.rows().end()};
}

TEST(SharedTopK, KeepsTheBestAndTheWindow) {
  EXPECT_EQ(selected({1, 5, 2, 4, 3}, 2, 4), (Rows{1, 3, 5, 6}));
  EXPECT_EQ(selected({1, 5, 2, 4, 3}, 2, 2), (Rows{5, 6})) << "capacity = window";
  EXPECT_EQ(selected({1, 5, 2, 4, 3}, 2, 7), (Rows{0, 1, 2, 3, 4, 5, 6}));
  EXPECT_EQ(selected({}, 3, 3), (Rows{0, 1, 2})) << "nothing to evict";
}

TEST(SharedTopK, TiesGoToTheLowerPosition) {
  EXPECT_EQ(selected({2, 2, 2, 2}, 1, 3), (Rows{0, 1, 4}));
  EXPECT_EQ(selected({1, 2, 1, 2, 1}, 1, 4), (Rows{0, 1, 3, 5}));
}

TEST(SharedTopK, IsTheFullSorts) {
  reference::Random random(81);
  for (int round = 0; round < 500; ++round) {
    std::vector<float> scores(random.between(1, 60));
    for (float& score : scores) {
      score = static_cast<float>(random.below(6));
    }
    const std::size_t window = random.between(1, 9);
    const std::size_t capacity = window + random.between(0, scores.size());
    ASSERT_EQ(selected(scores, window, capacity), reference::rows_to_keep(scores, window, capacity));
  }
}

// | Selector | accepts(granularity), reach, copyable |
static_assert(Selector<SharedTopK>);
static_assert(SharedTopK::accepts(Granularity::layer) && !SharedTopK::accepts(Granularity::kv_head));

struct Own {
  static constexpr Reach reach = Reach::own_layer;
  static constexpr bool accepts(Granularity) { return true; }
};
static_assert(Selector<Own>);
struct NoReach : Own {
  void reach() const;
};
struct NoAccepts : Own {
  void accepts() const;
};
struct NotCopyable : Own {
  std::unique_ptr<int> owner;
};
static_assert(!Selector<NoReach> && !Selector<NoAccepts> && !Selector<NotCopyable>);

}  // namespace
}  // namespace compresskv::select
