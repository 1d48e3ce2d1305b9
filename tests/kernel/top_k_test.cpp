#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <compresskv/kernel/top_k.hpp>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "reference/random.hpp"
#include "reference/scores.hpp"

namespace compresskv::kernel {
namespace {

std::vector<std::uint32_t> best(const std::vector<float>& scores, std::size_t count) {
  std::vector<float> scratch(scores.size());
  std::vector<std::uint32_t> out(count);
  top_k(scores, scratch, out);
  return out;
}

TEST(TopK, EqualScoresGoToTheLowerIndex) {
  using Indices = std::vector<std::uint32_t>;
  EXPECT_EQ(best({1, 1, 1, 1}, 2), (Indices{0, 1}));
  EXPECT_EQ(best({1, 2, 1, 2, 1}, 3), (Indices{0, 1, 3}));
  EXPECT_EQ(best({3, 2, 2, 2, 3}, 3), (Indices{0, 1, 4}));
  EXPECT_EQ(best({0.0F, -0.0F, 0.0F}, 2), (Indices{0, 1})) << "zeros are equal whatever their sign";
}

TEST(TopK, TakesNothingAndAll) {
  EXPECT_TRUE(best({1, 2, 3}, 0).empty());
  EXPECT_TRUE(best({}, 0).empty());
  EXPECT_EQ(best({3, 1, 2}, 3), (std::vector<std::uint32_t>{0, 1, 2}));
}

TEST(TopK, IsTheFullSorts) {
  reference::Random random(41);
  for (int round = 0; round < 3000; ++round) {
    std::vector<float> scores(random.between(1, 80));
    // Few values, so that most rounds have ties across the threshold.
    const std::size_t values = random.pick(std::vector<std::size_t>{1, 2, 3, 10, 1000000});
    for (float& score : scores) {
      score = static_cast<float>(random.below(values)) - static_cast<float>(values / 2);
    }
    if (random.below(4) == 0) {
      scores[random.below(scores.size())] = -std::numeric_limits<float>::max();
    }
    const std::size_t count = random.between(0, scores.size());
    ASSERT_EQ(best(scores, count), reference::top_k(scores, count)) << count << " of " << scores.size();
  }
}

/// Long rows, of which a small share is chosen, go by a sample: whether it tells the truth or not.
TEST(TopK, IsTheFullSortsWhereASampleIsTaken) {
  reference::Random random(42);
  for (int round = 0; round < 60; ++round) {
    std::vector<float> scores(random.between(4096, 9000));
    const std::size_t values = random.pick(std::vector<std::size_t>{1, 2, 40, 1000000});
    for (float& score : scores) {
      score = static_cast<float>(random.below(values));
    }
    if (round % 3 == 0) {
      // High where the sample looks, or everywhere else.
      const std::size_t step = scores.size() / 512;
      for (std::size_t t = 0; t < scores.size(); ++t) {
        scores[t] += (t % step == 0) == (round % 2 == 0) ? 2e6F : 0.0F;
      }
    }
    const std::size_t count = random.between(1, scores.size() / 3);
    ASSERT_EQ(best(scores, count), reference::top_k(scores, count)) << count << " of " << scores.size();
  }
}

/// Whatever is given: NaN of both signs, infinities, zeros of both signs, all the same.
TEST(TopK, StaysWithinBoundsWhateverTheScores) {
  reference::Random random(43);
  for (int round = 0; round < 400; ++round) {
    std::vector<float> scores(round % 8 == 0 ? random.between(4096, 6000) : random.between(1, 60));
    const auto kinds = random.between(1, 8);
    for (float& score : scores) {
      constexpr std::uint32_t bits[] = {0x7FC00000U, 0xFFC00000U, 0x7F800000U, 0xFF800000U,
                                        0x00000000U, 0x80000000U, 0x3F800000U, 0x00000001U};
      score = std::bit_cast<float>(bits[random.below(kinds)]);
    }
    const std::size_t count = random.between(0, scores.size());
    std::vector<std::uint32_t> expected(scores.size());
    std::iota(expected.begin(), expected.end(), 0U);
    std::stable_sort(expected.begin(), expected.end(), [&](std::uint32_t a, std::uint32_t b) {
      return compresskv::detail::ordered(scores[a]) > compresskv::detail::ordered(scores[b]);
    });
    expected.resize(count);
    std::sort(expected.begin(), expected.end());
    ASSERT_EQ(best(scores, count), expected) << count << " of " << scores.size();
  }
}

}  // namespace
}  // namespace compresskv::kernel
