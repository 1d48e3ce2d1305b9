#include "engine/sampler.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <map>
#include <vector>

#include "engine/error.hpp"
#include "recorded_cases.hpp"

namespace engine {
namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr float not_a_number = std::numeric_limits<float>::quiet_NaN();

std::vector<TokenId> draw(SamplerOptions options, const std::vector<float>& logits, int count) {
  Sampler sampler(options);
  std::vector<TokenId> tokens;
  for (int i = 0; i < count; ++i) tokens.push_back(sampler.next(logits));
  return tokens;
}

std::map<TokenId, double> shares(const std::vector<TokenId>& tokens) {
  std::map<TokenId, double> out;
  for (const TokenId token : tokens) out[token] += 1.0 / static_cast<double>(tokens.size());
  return out;
}

TEST(Greedy, TakesTheHighestLogitAndTheLowestIdOfEquals) {
  EXPECT_EQ(greedy(std::vector<float>{1.0F, 3.0F, 2.0F}), 1);
  EXPECT_EQ(greedy(std::vector<float>{1.0F, 3.0F, 3.0F, 3.0F}), 1);
  EXPECT_EQ(greedy(std::vector<float>{-5.0F}), 0);
  EXPECT_EQ(greedy(std::vector<float>{0.0F, -0.0F}), 0);
  EXPECT_EQ(greedy(std::vector<float>{-infinity, -1e38F, -infinity}), 1);
}

TEST(Greedy, RefusesWhatHasNoOrder) {
  expect_error([] { greedy(std::vector<float>{}); }, "no logits");
  expect_error([] { greedy(std::vector<float>{0.0F, 9.0F, not_a_number}); }, "token 2 is NaN");
  expect_error([] { greedy(std::vector<float>{0.0F, infinity}); }, "token 1 is +inf");
  expect_error([] { greedy(std::vector<float>(7, -infinity)); }, "all 7 logits are -inf");
}

TEST(Sampler, TemperatureZeroIsGreedyWhateverTheSeed) {
  const std::vector<float> logits{0.5F, 2.0F, 2.0F, -1.0F};
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    EXPECT_EQ(draw({.temperature = 0.0F, .seed = seed}, logits, 5), std::vector<TokenId>(5, 1));
  }
}

TEST(Sampler, ASeedGivesTheSameTokensAndAnotherSeedOthers) {
  const std::vector<float> logits(50, 0.0F);
  const SamplerOptions first{.temperature = 1.0F, .seed = 7};
  const SamplerOptions second{.temperature = 1.0F, .seed = 8};
  EXPECT_EQ(draw(first, logits, 100), draw(first, logits, 100));
  EXPECT_NE(draw(first, logits, 100), draw(second, logits, 100));
}

// mt19937_64's bits are fixed by the standard: its first outputs for seed 5489 begin 14514284786278117030,
// 4620546740167642908, 13109570281517897720; as fractions of 2^64: 0.7868, 0.2505, 0.7107.
TEST(Sampler, DrawsComeFromTheBitsThatTheStandardFixes) {
  const std::vector<float> logits(100, 0.0F);
  EXPECT_EQ(draw({.temperature = 1.0F, .seed = 5489}, logits, 3), (std::vector<TokenId>{78, 25, 71}));
}

TEST(Sampler, FrequenciesFollowTheSoftmaxAtTheTemperature) {
  const std::vector<float> logits{0.0F, 1.0F, 2.0F, -infinity, 0.5F};
  for (const float temperature : {0.5F, 1.0F, 3.0F}) {
    double total = 0.0;
    for (const float logit : logits) total += std::exp(static_cast<double>(logit) / temperature);
    const auto drawn = shares(draw({.temperature = temperature, .seed = 3}, logits, 40000));
    EXPECT_FALSE(drawn.contains(3)) << "a masked token was drawn";
    for (const TokenId token : {0, 1, 2, 4}) {
      const double expected =
          std::exp(static_cast<double>(logits[static_cast<std::size_t>(token)]) / temperature) / total;
      // Four standard deviations of a share over 40,000 draws are at most 0.01.
      EXPECT_NEAR(drawn.at(token), expected, 0.01) << "token " << token << " at temperature " << temperature;
    }
  }
}

TEST(Sampler, TopPKeepsTheLikeliestTokensWhoseSharesReachIt) {
  // Shares 0.1, 0.4, 0.3, 0.2.
  const std::vector<float> logits{std::log(0.1F), std::log(0.4F), std::log(0.3F), std::log(0.2F)};
  const auto kept = [&](float top_p) {
    std::vector<TokenId> tokens;
    for (const auto& [token, share] :
         shares(draw({.temperature = 1.0F, .top_p = top_p, .seed = 1}, logits, 4000))) {
      tokens.push_back(token);
    }
    return tokens;
  };
  EXPECT_EQ(kept(0.05F), (std::vector<TokenId>{1}));
  EXPECT_EQ(kept(0.39F), (std::vector<TokenId>{1}));
  EXPECT_EQ(kept(0.6F), (std::vector<TokenId>{1, 2}));
  EXPECT_EQ(kept(0.85F), (std::vector<TokenId>{1, 2, 3}));
  EXPECT_EQ(kept(0.95F), (std::vector<TokenId>{0, 1, 2, 3}));
  EXPECT_EQ(kept(1.0F), (std::vector<TokenId>{0, 1, 2, 3}));
}

TEST(Sampler, TopPTakesTheLowerIdOfEqualShares) {
  const std::vector<float> logits(10, 1.0F);
  for (const auto& [token, share] :
       shares(draw({.temperature = 1.0F, .top_p = 0.29F, .seed = 1}, logits, 500))) {
    EXPECT_LT(token, 3);
  }
}

TEST(Sampler, ExtremeLogitsNeitherOverflowNorVanish) {
  EXPECT_EQ(draw({.temperature = 1e-6F, .seed = 1}, {3e38F, -3e38F}, 3), std::vector<TokenId>(3, 0));
  EXPECT_EQ(draw({.temperature = 1.0F, .top_p = 1e-9F, .seed = 1}, {-3e38F, -2e38F}, 3),
            std::vector<TokenId>(3, 1));
}

TEST(Sampler, RefusesOptionsOutOfBounds) {
  expect_error([] { Sampler({.temperature = -0.5F}); }, "temperature is -0.5");
  expect_error([] { Sampler({.temperature = not_a_number}); }, "temperature is");
  expect_error([] { Sampler({.temperature = infinity}); }, "temperature is inf");
  expect_error([] { Sampler({.top_p = 0.0F}); }, "top_p is 0");
  expect_error([] { Sampler({.top_p = 1.5F}); }, "top_p is 1.5");
  expect_error([] { Sampler({.top_p = not_a_number}); }, "top_p is");
}

TEST(Sampler, RefusesNanLogitsWhenSamplingToo) {
  Sampler sampler({.temperature = 1.0F, .top_p = 0.9F, .seed = 1});
  expect_error([&] { sampler.next(std::vector<float>{not_a_number, 1.0F}); }, "token 0 is NaN");
}

}  // namespace
}  // namespace engine
