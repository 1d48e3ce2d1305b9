#include "compresskv/core/head_ranking.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "message_of.hpp"

namespace {

using compresskv::ArgumentError;
using compresskv::HeadRanking;
using compresskv::test::message_of;

TEST(HeadRanking, KeepsTheOrderOfEachLayer) {
  const HeadRanking ranking({{2, 0, 1}, {1}});
  ASSERT_EQ(ranking.layers(), 2U);
  EXPECT_EQ(std::vector<std::uint32_t>(ranking.heads(0).begin(), ranking.heads(0).end()),
            (std::vector<std::uint32_t>{2, 0, 1}));
  EXPECT_EQ(std::vector<std::uint32_t>(ranking.heads(1).begin(), ranking.heads(1).end()),
            std::vector<std::uint32_t>{1});
}

TEST(HeadRanking, RejectsWhatIsNoRanking) {
  EXPECT_EQ(message_of<ArgumentError>([] { HeadRanking({}); }),
            "head ranking has no layer: give one list of heads a layer");
  EXPECT_EQ(message_of<ArgumentError>([] {
              HeadRanking({{0}, {}});
            }),
            "head ranking of layer 1 is empty: list at least one head");
  EXPECT_EQ(message_of<ArgumentError>([] {
              HeadRanking({{0}, {3, 4, 3}});
            }),
            "head ranking of layer 1 lists head 3 twice, at places 0 and 2: each head may stand once");
}

TEST(HeadRanking, ValidateSaysWhichModelItDoesNotFit) {
  const HeadRanking ranking({{2, 0, 1}, {1, 3, 0}});
  EXPECT_NO_THROW(ranking.validate(2, 4));
  EXPECT_EQ(message_of<ArgumentError>([&] { ranking.validate(3, 4); }),
            "head ranking has 2 layers, the model has 3: use the ranking calibrated for this model");
  EXPECT_EQ(
      message_of<ArgumentError>([&] { ranking.validate(2, 3); }),
      "head ranking of layer 1 names head 3, the model has heads 0 to 2: use the ranking calibrated for this "
      "model");
}

}  // namespace
