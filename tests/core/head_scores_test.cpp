#include "compresskv/core/head_scores.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "message_of.hpp"

namespace {

using compresskv::ArgumentError;
using compresskv::HeadRanking;
using compresskv::HeadScores;
using compresskv::test::message_of;

TEST(HeadScores, MeanIsOverTheRuns) {
  const HeadScores scores(1, 2, {{1.0, 2.0, 6.0}, {0.5, 0.5, 0.25}});
  EXPECT_EQ(scores.mean(0, 0), 3.0);
  EXPECT_EQ(scores.mean(0, 1), 1.25 / 3.0);
}

TEST(HeadScores, EqualMeansGoToTheLowerHead) {
  const HeadScores scores(2, 3, {{1.0, 3.0}, {4.0, 0.0}, {2.0, 2.5}, {0.0, 0.0}, {0.0, 0.0}, {0.0, 0.0}});
  EXPECT_EQ(scores.ranking(), HeadRanking({{2, 0, 1}, {0, 1, 2}}));
}

// Places by counting the heads that go before, with few distinct scores so that ties are common.
TEST(HeadScores, RankingVsCounting) {
  std::mt19937_64 random(20260205);
  for (int trial = 0; trial < 200; ++trial) {
    const std::size_t layers = 1 + random() % 4;
    const std::size_t heads = 1 + random() % 16;
    const std::size_t count = 1 + random() % 3;
    std::vector<std::vector<double>> runs(layers * heads);
    std::vector<double> sums(layers * heads, 0.0);
    for (std::size_t i = 0; i < runs.size(); ++i) {
      for (std::size_t run = 0; run < count; ++run) {
        runs[i].push_back(static_cast<double>(random() % 4));
        sums[i] += runs[i].back();
      }
    }
    std::vector<std::vector<std::uint32_t>> expected(layers, std::vector<std::uint32_t>(heads));
    for (std::size_t layer = 0; layer < layers; ++layer) {
      for (std::size_t head = 0; head < heads; ++head) {
        std::size_t place = 0;
        for (std::size_t other = 0; other < heads; ++other) {
          const double ours = sums[layer * heads + head];
          const double theirs = sums[layer * heads + other];
          place += theirs > ours || (theirs == ours && other < head) ? 1 : 0;
        }
        expected[layer][place] = static_cast<std::uint32_t>(head);
      }
    }
    EXPECT_EQ(HeadScores(layers, heads, runs).ranking(), HeadRanking(expected)) << "trial " << trial;
  }
}

TEST(HeadScores, RejectsWhatIsNoScore) {
  EXPECT_EQ(message_of<ArgumentError>([] { HeadScores(0, 2, {}); }),
            "head scores need at least one layer and one head, got 0 layers of 2 heads");
  EXPECT_EQ(message_of<ArgumentError>([] {
              HeadScores(2, 2, {{1.0}, {1.0}, {1.0}});
            }),
            "head scores have 3 lists, 2 layers of 2 heads need 4");
  EXPECT_EQ(message_of<ArgumentError>([] {
              HeadScores(2, 1, {{1.0}, {}});
            }),
            "head scores of layer 1 head 0 are empty: no calibration run counted");
  EXPECT_EQ(message_of<ArgumentError>([] {
              HeadScores(1, 2, {{1.0}, {std::numeric_limits<double>::quiet_NaN()}});
            }),
            "head scores of layer 0 head 1 hold nan: every score must be finite");
}

TEST(HeadScores, RejectsWhatAddsUpToNoNumber) {
  const double huge = std::numeric_limits<double>::max();
  EXPECT_EQ(
      message_of<ArgumentError>([&] {
        HeadScores(2, 2, {{1.0}, {1.0}, {1.0}, {huge, 1.0, huge}});
      }),
      "head scores of layer 1 head 1 add up to inf: their mean is beyond float64; divide all scores by one "
      "number");
  EXPECT_EQ(
      message_of<ArgumentError>([&] {
        HeadScores(1, 2, {{-huge, -huge}, {1.0}});
      }),
      "head scores of layer 0 head 0 add up to -inf: their mean is beyond float64; divide all scores by one "
      "number");
  EXPECT_EQ(HeadScores(1, 1, {{huge}}).mean(0, 0), huge);
}

}  // namespace
