#include "compresskv/calibrate/answer_span.hpp"

#include <gtest/gtest.h>

#include <optional>
#include <random>
#include <set>
#include <vector>

#include "message_of.hpp"

namespace {

using compresskv::ArgumentError;
using compresskv::calibrate::find_answer_span;
using compresskv::calibrate::TokenId;
using compresskv::calibrate::TokenSpan;
using compresskv::test::message_of;

// Every window's set of tokens, built from nothing each time.
std::optional<TokenSpan> search_by_sets(const std::vector<TokenId>& prompt,
                                        const std::vector<TokenId>& needle, double least_share) {
  const std::set<TokenId> wanted(needle.begin(), needle.end());
  for (std::size_t first = 0; first + needle.size() <= prompt.size(); ++first) {
    std::set<TokenId> shared;
    for (std::size_t i = first; i < first + needle.size(); ++i) {
      if (wanted.count(prompt[i]) > 0) {
        shared.insert(prompt[i]);
      }
    }
    if (static_cast<double>(shared.size()) / static_cast<double>(wanted.size()) > least_share) {
      return TokenSpan{.first = first, .last = first + needle.size()};
    }
  }
  return std::nullopt;
}

TEST(FindAnswerSpan, FindsAnExactNeedle) {
  const std::vector<TokenId> prompt{1, 2, 3, 10, 11, 12, 4, 5};
  EXPECT_EQ(find_answer_span(prompt, std::vector<TokenId>{10, 11, 12}), (TokenSpan{.first = 3, .last = 6}));
  EXPECT_EQ(find_answer_span(prompt, std::vector<TokenId>{4, 5}), (TokenSpan{.first = 6, .last = 8}));
  EXPECT_EQ(find_answer_span(prompt, prompt), (TokenSpan{.first = 0, .last = 8}));
}

TEST(FindAnswerSpan, ForgivesABorderTokenOfALongNeedle) {
  std::vector<TokenId> prompt(40, 0);
  std::vector<TokenId> needle;
  for (TokenId i = 0; i < 20; ++i) {
    needle.push_back(100 + i);
    prompt[static_cast<std::size_t>(10 + i)] = 100 + i;
  }
  prompt[10] = 7;  // merged with what stands before
  // 19 of 20 distinct tokens are enough.
  EXPECT_EQ(find_answer_span(prompt, needle), (TokenSpan{.first = 10, .last = 30}));
  prompt[11] = 7;  // 18 of 20 are not more than 0.9
  EXPECT_EQ(find_answer_span(prompt, needle), std::nullopt);
  // With 17 of 20 enough, the window one token early comes first.
  EXPECT_EQ(find_answer_span(prompt, needle, 0.8), (TokenSpan{.first = 9, .last = 29}));
}

TEST(FindAnswerSpan, NothingWhereTheNeedleIsNot) {
  EXPECT_EQ(find_answer_span(std::vector<TokenId>{1, 2, 3}, std::vector<TokenId>{4, 5}), std::nullopt);
  EXPECT_EQ(find_answer_span(std::vector<TokenId>{1, 2}, std::vector<TokenId>{1, 2, 3}), std::nullopt);
  EXPECT_EQ(find_answer_span({}, std::vector<TokenId>{1}), std::nullopt);
}

TEST(FindAnswerSpan, VsSearchBySets) {
  std::mt19937_64 random(31);
  int found = 0;
  for (int trial = 0; trial < 2000; ++trial) {
    const auto vocabulary = static_cast<TokenId>(2 + random() % 12);
    const auto tokens = [&](std::size_t count) {
      std::vector<TokenId> ids(count);
      for (TokenId& id : ids) {
        id = static_cast<TokenId>(random() % static_cast<std::uint64_t>(vocabulary));
      }
      return ids;
    };
    const auto prompt = tokens(random() % 60);
    const auto needle = tokens(1 + random() % 8);
    const double least_share = trial % 2 == 0 ? 0.9 : 0.5;
    const auto expected = search_by_sets(prompt, needle, least_share);
    EXPECT_EQ(find_answer_span(prompt, needle, least_share), expected) << "trial " << trial;
    found += expected ? 1 : 0;
  }
  EXPECT_GT(found, 200);
  EXPECT_LT(found, 1800);
}

TEST(FindAnswerSpan, RejectsNoNeedleAndNoShare) {
  EXPECT_EQ(message_of<ArgumentError>([] { find_answer_span(std::vector<TokenId>{1}, {}); }),
            "needle has no token: give the answer's tokens");
  EXPECT_EQ(message_of<ArgumentError>(
                [] { find_answer_span(std::vector<TokenId>{1}, std::vector<TokenId>{1}, 1.0); }),
            "least_share is 1, must be in [0, 1): a window counts when it holds more than that");
}

}  // namespace
