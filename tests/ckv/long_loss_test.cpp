// The loss of a long text on a budget, over the real model.

#include <gtest/gtest.h>

#include <compresskv/core/budget.hpp>
#include <cstddef>
#include <string>
#include <vector>

#include "ckv/evaluation.hpp"
#include "ckv/method.hpp"
#include "ckv/tasks.hpp"
#include "model_fixture.hpp"
#include "runs.hpp"
#include "tool.hpp"

namespace ckv_test {
namespace {

class LongLoss : public Needles {
 protected:
  static ckv::Compression at(ckv::Method method, std::size_t rows) {
    return {.method = method, .budget = compresskv::Budget::tokens_per_layer(rows)};
  }

  ckv::TaskPrompt text(std::size_t tokens) const {
    ckv::TaskPrompt prompt =
        ckv::task_prompt("long-loss", model(), *haystack_, {.seed = 2, .length = 200, .index = 0});
    prompt.continuation.resize(tokens);
    return prompt;
  }

  static std::vector<ckv::Outcome> outcomes(const ckv::TaskPrompt& prompt,
                                            const std::vector<ckv::Compression>& ways) {
    std::vector<const ckv::Compression*> pointers;
    for (const ckv::Compression& way : ways) {
      pointers.push_back(&way);
    }
    return model().hold(prompt, {})->outcomes(pointers, [](double, const auto&) {});
  }
};

TEST_F(LongLoss, IsOfATextAndWhatFollowsIt) {
  const ckv::TaskPrompt prompt =
      ckv::task_prompt("long-loss", model(), *haystack_, {.seed = 2, .length = 200, .index = 0});
  EXPECT_EQ(prompt.tokens.size(), 200U);
  EXPECT_EQ(prompt.continuation.size(), 1024U);
  EXPECT_EQ(prompt.measure, ckv::Measure::long_loss);
}

TEST_F(LongLoss, IsTheFullCachesWhereAllRowsFit) {
  const auto found = outcomes(text(140), {at(ckv::Method::full, 1), at(ckv::Method::rkv, 1000)});
  EXPECT_EQ(found[1].perplexity, found[0].perplexity);
}

TEST_F(LongLoss, GrowsAsTheCacheIsCutAgain) {
  ckv::TaskPrompt prompt = text(260);
  const std::vector<ckv::Compression> ways = {at(ckv::Method::full, 1), at(ckv::Method::rkv, 64),
                                              at(ckv::Method::snapkv, 64), at(ckv::Method::random, 64)};
  const auto cut_again = outcomes(prompt, ways);
  prompt.measure = ckv::Measure::perplexity;  // what is kept of the prompt alone, and all that follows
  const auto cut_once = outcomes(prompt, ways);
  EXPECT_EQ(cut_again[0].perplexity, cut_once[0].perplexity);
  for (std::size_t i = 1; i < ways.size(); ++i) {
    EXPECT_NE(cut_again[i].perplexity, cut_once[i].perplexity) << i;
    EXPECT_GT(cut_again[i].perplexity, cut_again[0].perplexity) << i;
  }
  EXPECT_GT(cut_again[3].perplexity, cut_once[3].perplexity);
  EXPECT_LT(cut_again[2].perplexity, cut_again[3].perplexity);
}

TEST_F(LongLoss, IsRefusedWhereItMakesNoSense) {
  const auto refused = [](const Arguments& more, const std::string& why) {
    Arguments all = {"evaluate", "--model", model_path(), "--out", "long_loss.jsonl", "--tasks", "long-loss"};
    all.insert(all.end(), more.begin(), more.end());
    const Outcome outcome = run_tool(all);
    EXPECT_EQ(outcome.code, 2);
    EXPECT_NE(outcome.err.find(why), std::string::npos) << outcome.err;
  };
  refused({"--ratios", "0.1", "--methods", "snapkv"}, "a share would grow with the text; give --tokens");
  refused({"--tokens", "64", "--methods", "snapkv,kvzip"},
          "which --methods kvzip does not, as it feeds the whole context once more");
}

}  // namespace
}  // namespace ckv_test
