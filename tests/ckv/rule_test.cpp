// Rules: which answers follow them, where an answer may end, and what prompts of the task `rules` hold.

#include "ckv/rule.hpp"

#include <gtest/gtest.h>

#include <map>
#include <set>
#include <string>

#include "ckv/evaluation.hpp"
#include "ckv/tasks.hpp"
#include "model_fixture.hpp"
#include "runs.hpp"

namespace ckv_test {
namespace {

TEST(Rule, NoneIsAlwaysFollowed) {
  for (const char* answer : {"", "Hazel", "HAZEL 7"}) {
    EXPECT_TRUE(ckv::obeys({}, answer));
    EXPECT_FALSE(ckv::has_broken({}, answer));
  }
}

TEST(Rule, WhatIsSaidStandsThereLetterByLetter) {
  const ckv::Rule rule{.kind = "capitals", .says = "WALRUS"};
  EXPECT_TRUE(ckv::obeys(rule, "WALRUS"));
  EXPECT_TRUE(ckv::obeys(rule, "I am called \"WALRUS\"."));
  for (const char* answer : {"", "Walrus", "I am walrus.", "WALRU", "THE LORD"}) {
    EXPECT_FALSE(ckv::obeys(rule, answer)) << answer;
    EXPECT_FALSE(ckv::has_broken(rule, answer)) << answer << ": it may still be said";
  }
}

TEST(Rule, WhatIsForbiddenBreaksItForGood) {
  const ckv::Rule rule{.kind = "never", .says = "Pickle", .never = "Hazel"};
  EXPECT_TRUE(ckv::obeys(rule, "I am Pickle."));
  for (const char* answer : {"I am Hazel.", "I am Pickle, not Hazel.", "I AM HAZEL. Pickle"}) {
    EXPECT_FALSE(ckv::obeys(rule, answer)) << answer;
    EXPECT_TRUE(ckv::has_broken(rule, answer)) << answer;
  }
  // An answer that says nothing of it is no merit.
  EXPECT_FALSE(ckv::obeys(rule, ""));
  EXPECT_FALSE(ckv::obeys(rule, "The LORD is my shepherd."));
}

TEST(Rule, AnAnswerEndsWhereNothingCanChangeIt) {
  ckv::TaskPrompt prompt;
  prompt.rule = {.kind = "name", .says = "Pickle"};
  EXPECT_FALSE(ckv::is_settled(prompt, "I am"));
  EXPECT_TRUE(ckv::is_settled(prompt, "I am Pickle"));
  EXPECT_TRUE(ckv::is_right(prompt, "I am Pickle"));

  prompt.rule.never = "Hazel";
  EXPECT_FALSE(ckv::is_settled(prompt, "I am Pickle")) << "the forbidden name may follow";
  EXPECT_TRUE(ckv::is_right(prompt, "I am Pickle"));
  EXPECT_TRUE(ckv::is_settled(prompt, "I am Hazel"));
  EXPECT_FALSE(ckv::is_right(prompt, "I am Hazel, or Pickle"));

  // What is expected counts beside the rule.
  prompt.expect = {"plum cake"};
  EXPECT_FALSE(ckv::is_right(prompt, "I am Pickle."));
  EXPECT_TRUE(ckv::is_right(prompt, "I am Pickle. Eat a plum cake."));
}

class RuleWithModel : public Needles {};

TEST_F(RuleWithModel, TheRuleStandsInTheSystemMessageAndNowhereElse) {
  std::map<std::string, std::set<std::string>> said;  // by kind
  for (std::size_t index = 0; index < 40; ++index) {
    const ckv::PromptPlace place{.seed = 1, .length = 500, .index = index, .depth = 0.3};
    const ckv::TaskPrompt prompt = ckv::task_prompt("rules", model(), *haystack_, place);
    const std::string text = model().tokenizer.decode(prompt.tokens);
    const std::size_t end = text.find("<|im_end|>");
    ASSERT_TRUE(text.starts_with("<|im_start|>system\n")) << text;
    ASSERT_NE(end, std::string::npos);
    const std::string system = text.substr(0, end);
    const std::string rest = text.substr(end);
    EXPECT_NE(system.find(prompt.rule.says), std::string::npos) << system;
    EXPECT_EQ(rest.find(prompt.rule.says), std::string::npos) << rest;
    EXPECT_NE(system.find(prompt.rule.never), std::string::npos) << system;
    EXPECT_EQ(prompt.rule.never.empty(), prompt.rule.kind != "never");
    EXPECT_FALSE(ckv::holds(prompt.rule.says, prompt.rule.never) && !prompt.rule.never.empty());
    // Far from the request, which comes last.
    EXPECT_GT(prompt.tokens.size(), 300U);
    EXPECT_LE(prompt.tokens.size(), 500U);
    EXPECT_NE(rest.find("robot", rest.size() - 90), std::string::npos) << rest;
    said[prompt.rule.kind].insert(prompt.rule.says);

    const ckv::TaskPrompt again = ckv::task_prompt("rules", model(), *haystack_, place);
    EXPECT_EQ(again.tokens, prompt.tokens);
    EXPECT_EQ(again.rule.says, prompt.rule.says);
  }
  EXPECT_EQ(said.size(), 3U);
  for (const auto& [kind, words] : said) {
    EXPECT_GT(words.size(), 2U) << kind;
  }
}

}  // namespace
}  // namespace ckv_test
