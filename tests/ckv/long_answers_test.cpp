// Stories that are decoded on a budget: what they say, what counts as said, and the real model over them.

#include <gtest/gtest.h>

#include <algorithm>
#include <compresskv/core/budget.hpp>
#include <compresskv/io/calibration_files.hpp>
#include <cstddef>
#include <cstdio>
#include <span>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include "ckv/evaluation.hpp"
#include "ckv/method.hpp"
#include "ckv/story.hpp"
#include "ckv/tasks.hpp"
#include "engine/error.hpp"
#include "model_fixture.hpp"
#include "runs.hpp"
#include "tool.hpp"

namespace ckv_test {
namespace {

class LongAnswers : public RealModel {
 protected:
  static std::string text_of(std::span<const engine::TokenId> tokens) {
    return model().tokenizer.decode(tokens, {.skip_special = false});
  }

  static std::string text_of(const ckv::TaskPrompt& prompt, std::size_t first, std::size_t last) {
    return text_of(std::span(prompt.continuation).subspan(first, last - first));
  }

  static ckv::TaskPrompt task(const std::string& name, std::size_t tokens, std::size_t index = 0) {
    static const ckv::Haystack unused{"None."};
    return ckv::task_prompt(name, model(), unused, {.seed = 100, .length = tokens, .index = index});
  }

  static std::vector<ckv::Outcome> outcomes(const ckv::TaskPrompt& prompt,
                                            const std::vector<ckv::Compression>& ways, bool alone = false) {
    std::vector<const ckv::Compression*> pointers;
    for (const ckv::Compression& way : ways) {
      pointers.push_back(&way);
    }
    return model().hold(prompt, {.alone = alone})->outcomes(pointers, [](double, const auto&) {});
  }

  static ckv::Compression at(ckv::Method method, std::size_t rows) {
    return {.method = method, .budget = compresskv::Budget::tokens_per_layer(rows)};
  }

  static std::size_t right(const ckv::TaskPrompt& prompt, const ckv::Outcome& outcome) {
    std::size_t count = 0;
    for (std::size_t i = 0; i < prompt.recalls.size(); ++i) {
      count += ckv::is_right(prompt.recalls[i], outcome.long_answer->said[i]) ? 1U : 0U;
    }
    return count;
  }
};

TEST_F(LongAnswers, StoriesFillTheirLengthAndRecallWhatWasTold) {
  for (const char* const name : {"long-names", "long-tally"}) {
    for (const std::size_t tokens : {400U, 1000U, 4000U}) {
      SCOPED_TRACE(std::string(name) + ", " + std::to_string(tokens));
      const ckv::TaskPrompt prompt = task(name, tokens);
      EXPECT_EQ(prompt.measure, ckv::Measure::recalls);
      EXPECT_LE(prompt.continuation.size(), tokens);
      EXPECT_GT(prompt.continuation.size() + 40, tokens);
      EXPECT_GE(prompt.recalls.size(), tokens / 200);
      EXPECT_TRUE(std::ranges::is_sorted(prompt.recalls, {}, &ckv::Recall::first));
      std::size_t far = 0;
      for (const ckv::Recall& recall : prompt.recalls) {
        const std::string said = text_of(prompt, recall.first, recall.last);
        EXPECT_TRUE(ckv::is_right(recall, said)) << said;
        EXPECT_LT(recall.told, recall.first);
        far += recall.first - recall.told > 100 ? 1U : 0U;
        // What is told there ends with it.
        const std::string told = text_of(prompt, 0, recall.told);
        EXPECT_TRUE(told.ends_with(recall.expect) || told.ends_with(recall.expect + "."))
            << recall.expect << ": " << told.substr(told.size() - std::min<std::size_t>(told.size(), 60));
      }
      EXPECT_GE(2 * far, prompt.recalls.size());
    }
  }
}

TEST_F(LongAnswers, StoriesAreTheirSeeds) {
  const ckv::TaskPrompt one = task("long-names", 400);
  EXPECT_EQ(task("long-names", 400).continuation, one.continuation);
  EXPECT_NE(task("long-names", 400, 1).continuation, one.continuation);
}

TEST_F(LongAnswers, NoFillerTellsWhatARecallAsksFor) {
  const ckv::TaskPrompt prompt = task("long-names", 1000);
  const std::string text = text_of(prompt.continuation);
  for (const ckv::Recall& recall : prompt.recalls) {
    const std::string before = text_of(prompt, 0, recall.first);
    EXPECT_NE(before.find(recall.expect), std::string::npos);
    EXPECT_EQ(text_of(prompt, recall.told, recall.first).find(recall.expect + "."), std::string::npos)
        << recall.expect << " in " << text;
  }
}

TEST_F(LongAnswers, ATooShortStoryIsRefused) {
  const std::vector<ckv::StorySentence> sentences = {
      {.text = "The house of Miss Barlow was painted pink.", .place = 0.1},
      {.text = "As everybody knew, the house of Miss Barlow was painted", .place = 0.9, .recalled = "pink"}};
  const auto filler = [] { return std::string("It rained."); };
  const ckv::Story story = ckv::tell(model(), sentences, filler, 40);
  EXPECT_LE(story.tokens.size(), 40U);
  ASSERT_EQ(story.recalls.size(), 1U);
  EXPECT_EQ(text_of(std::span(story.tokens).subspan(story.recalls[0].first)).substr(0, 5), " pink");
  EXPECT_THROW(
      {
        try {
          ckv::tell(model(), sentences, filler, 10);
        } catch (const engine::Error& error) {
          EXPECT_NE(
              std::string(error.what()).find("a story of 10 tokens was asked for, what it must say has"),
              std::string::npos)
              << error.what();
          throw;
        }
      },
      engine::Error);
}

TEST_F(LongAnswers, IsRightByTheWholeWord) {
  const ckv::Recall recall{.expect = "38"};
  EXPECT_TRUE(ckv::is_right(recall, "38"));
  EXPECT_TRUE(ckv::is_right(recall, " 38"));
  EXPECT_FALSE(ckv::is_right(recall, "138"));
  EXPECT_FALSE(ckv::is_right(recall, "3"));
  EXPECT_FALSE(ckv::is_right(recall, ""));
}

TEST_F(LongAnswers, TheFullCacheRecallsAndStreamingForgets) {
  const ckv::TaskPrompt prompt = task("long-names", 300);
  const std::vector<ckv::Compression> ways = {at(ckv::Method::full, 1), at(ckv::Method::rkv, 10000),
                                              at(ckv::Method::streaming, 96)};
  const auto found = outcomes(prompt, ways);
  EXPECT_GE(2 * right(prompt, found[0]), prompt.recalls.size());
  EXPECT_EQ(found[1].long_answer->said, found[0].long_answer->said) << "all rows fit";
  EXPECT_EQ(found[1].long_answer->loss, found[0].long_answer->loss);
  EXPECT_LT(right(prompt, found[2]), right(prompt, found[0]));
  EXPECT_GT(found[2].long_answer->loss, found[0].long_answer->loss);
  const std::size_t heads = 30 * 3;
  const std::size_t fed = prompt.continuation.size() - 1;
  EXPECT_EQ(found[0].long_answer->rows, heads * (prompt.tokens.size() + fed));
  EXPECT_EQ(found[2].long_answer->rows, heads * (96 + fed % ckv::decode_step));
  EXPECT_FALSE(found[2].long_answer->decode_ms.has_value());
  EXPECT_GT(found[2].long_answer->cut_ms, 0.0);

  const auto alone = outcomes(prompt, ways, true);
  for (std::size_t i = 0; i < ways.size(); ++i) {
    EXPECT_EQ(alone[i].long_answer->said, found[i].long_answer->said);
    EXPECT_EQ(alone[i].long_answer->loss, found[i].long_answer->loss) << "bit for bit";
    EXPECT_GT(alone[i].long_answer->decode_ms.value(), 0.0);
  }
  EXPECT_EQ(alone[0].long_answer->cut_ms, 0.0);
}

TEST_F(LongAnswers, RecordsCountWhatTheFullCacheSays) {
  const std::string file = "long_answers.jsonl";
  std::remove(file.c_str());
  const auto evaluate = [&](const std::string& methods, std::vector<std::string> more = {}) {
    Arguments all = {"evaluate",  "--model",   model_path(), "--out",  file,       "--tasks", "long-names",
                     "--lengths", "300",       "--prompts",  "2",      "--depths", "1",       "--tokens",
                     "96",        "--methods", methods,      "--seed", "100"};
    all.insert(all.end(), more.begin(), more.end());
    return run_tool(all);
  };
  const Outcome first = evaluate("streaming");
  ASSERT_EQ(first.code, 0) << first.err;
  EXPECT_NE(first.out.find("ms/token"), std::string::npos) << first.out;
  const Outcome more = evaluate("streaming,rkv:lambda=0.5:cosine=0.25");
  ASSERT_EQ(more.code, 0) << more.err;

  std::vector<Json> records;
  std::istringstream lines{read(file)};
  for (std::string line; std::getline(lines, line);) {
    records.push_back(Json::parse(line));
  }
  std::size_t timed = 0;
  for (std::size_t i = 1; i < records.size(); ++i) {
    const Json& record = records[i];
    const auto full = std::ranges::find_if(records, [&](const Json& other) {
      return other.contains("method") && other["method"] == "full" && other["prompt"] == record["prompt"];
    });
    ASSERT_NE(full, records.end());
    ASSERT_EQ(record["questions"].size(), (*full)["questions"].size());
    for (std::size_t q = 0; q < record["questions"].size(); ++q) {
      EXPECT_EQ(record["questions"][q]["asked"], (*full)["questions"][q]["asked"]);
      EXPECT_TRUE((*full)["questions"][q]["right"]);
    }
    EXPECT_LE((*full)["questions"].size(), record["recalls"].get<std::size_t>());
    EXPECT_EQ(record.contains("token_ms"), record["prompt"] == 0) << "one text of a length is timed";
    timed += record.contains("token_ms") ? 1U : 0U;
    EXPECT_EQ(record.contains("full_token_ms"), record.contains("token_ms"));
  }
  EXPECT_EQ(timed, 3U);
  std::remove(file.c_str());
}

TEST_F(LongAnswers, AreRefusedWhereTheyMakeNoSense) {
  const auto refused = [](const Arguments& more, const std::string& why) {
    Arguments all = {"evaluate", "--model", model_path(), "--out", "refused.jsonl", "--tasks", "long-names"};
    all.insert(all.end(), more.begin(), more.end());
    const Outcome outcome = run_tool(all);
    EXPECT_EQ(outcome.code, 2);
    EXPECT_NE(outcome.err.find(why), std::string::npos) << outcome.err;
  };
  refused({"--ratios", "0.1", "--methods", "snapkv"}, "a share would grow with the text; give --tokens");
  refused({"--tokens", "64", "--methods", "h2o"},
          "--methods h2o does not, as it wants the queries of all tokens");
  refused({"--tokens", "256,900", "--lengths", "1000", "--methods", "rkv"},
          "--tasks long-names at --lengths 1000 has 896 tokens when its cache is cut for the last time, and "
          "--tokens 900 holds them all: give fewer rows or a greater length");
  refused({"--tokens", "64", "--methods", "rkv:lambda=much"},
          "--methods rkv:lambda=much: lambda is 'much', must be a number such as 0.1");
  refused({"--tokens", "64", "--methods", "rkv:lambda=1.5"}, "lambda is 1.5, must be from 0");
  refused({"--tokens", "64", "--methods", "rkv:cosine=1"}, "threshold is 1, must be a cosine");
}

TEST_F(LongAnswers, GenerateTakesWhatRkvWeighs) {
  const auto with = [](const Arguments& more) {
    Arguments all = {"generate", "--model", model_path(), "--json", "--prompt", "Count to one hundred.",
                     "--rows",   "16"};
    all.insert(all.end(), more.begin(), more.end());
    return run_tool(all);
  };
  const Outcome outcome = with({"--method", "rkv", "--lambda", "0.5", "--cosine", "0.25", "--decode-every",
                                "4", "--max-new-tokens", "12"});
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  EXPECT_EQ(outcome.json().at("settings").at("lambda"), 0.5);
  EXPECT_EQ(outcome.json().at("settings").at("cosine"), 0.25);
  const auto refused = [&](const Arguments& more, const std::string& why) {
    const Outcome wrong = with(more);
    EXPECT_EQ(wrong.code, 2);
    EXPECT_NE(wrong.err.find(why), std::string::npos) << wrong.err;
  };
  refused({"--method", "snapkv", "--lambda", "0.5"},
          "--lambda is an option of --method rkv and has no use with --method snapkv: drop one");
  refused({"--method", "rkv", "--lambda", "1.5"}, "lambda is 1.5, must be from 0");
  refused({"--method", "rkv", "--cosine", "1"}, "threshold is 1, must be a cosine");
  refused({"--method", "rkv", "--decode-every", "128"},
          "--decode-every 128 would compress again after 128 generated tokens, --max-new-tokens 128 ends the "
          "answer before: give fewer, or a longer answer");
}

}  // namespace
}  // namespace ckv_test
