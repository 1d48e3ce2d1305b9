// Tasks whose questions come once the text was compressed: what is compressed, what is asked of it, and what
// the tool and its report make of the answers.

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <compresskv/calibrate/answer_span.hpp>
#include <cstddef>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <set>
#include <span>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "ckv/evaluation.hpp"
#include "ckv/tasks.hpp"
#include "engine/error.hpp"
#include "engine/sequence.hpp"
#include "message_of.hpp"
#include "model_fixture.hpp"
#include "runs.hpp"
#include "tool.hpp"

namespace ckv_test {
namespace {

using compresskv::test::message_of;
using engine::TokenId;

std::string bytes_of(std::span<const TokenId> tokens) {
  std::string bytes;
  for (const TokenId token : tokens) {
    bytes += model().token_bytes(token);
  }
  return bytes;
}

/// The chat whose question is the `i`-th.
std::vector<TokenId> chat_of(const ckv::TaskPrompt& prompt, std::size_t i) {
  std::vector<TokenId> chat = prompt.tokens;
  chat.insert(chat.end(), prompt.later[i].tokens.begin(), prompt.later[i].tokens.end());
  return chat;
}

std::vector<ckv::Outcome> outcomes_of(const ckv::TaskPrompt& prompt, std::span<const ckv::Compression> ways,
                                      const ckv::HoldOptions& options = {.max_new_tokens = 16}) {
  std::vector<const ckv::Compression*> all;
  for (const ckv::Compression& how : ways) {
    all.push_back(&how);
  }
  return model().hold(prompt, options)->outcomes(all, [](double share, std::string_view) {
    EXPECT_GE(share, 0.0);
    EXPECT_LT(share, 1.0);
  });
}

ckv::Compression snapkv_at(double share) {
  return {.method = ckv::Method::snapkv, .budget = compresskv::Budget::kept_ratio(share)};
}

class LaterPrompts : public Needles {
 protected:
  ckv::TaskPrompt prompt(std::string_view task, std::size_t length, std::size_t index,
                         double depth = 0.4) const {
    return ckv::task_prompt(task, model(), *haystack_,
                            {.seed = 5, .length = length, .index = index, .depth = depth});
  }
};

TEST_F(LaterPrompts, FactsStandInTheTextAndQuestionsBehindIt) {
  const std::string user = "<|im_start|>user\n";
  const std::string end = "<|im_end|>\n<|im_start|>assistant\n";
  for (const std::string task : {"later", "later-many"}) {
    for (std::size_t index = 0; index < 24; ++index) {
      const std::size_t length = 260 + 13 * index;
      const ckv::TaskPrompt made = prompt(task, length, index, 0.25 * static_cast<double>(index % 5));
      ASSERT_EQ(made.later.size(), 3U);
      EXPECT_EQ(made.copies(), 3U);
      EXPECT_TRUE(made.expect.empty() && made.continuation.empty() && made.next_turn.empty());
      const std::string text = bytes_of(made.tokens);
      const std::size_t begin = text.find(user);
      ASSERT_NE(begin, std::string::npos) << text;
      EXPECT_EQ(text.find("<|im_", begin + 1), std::string::npos) << "a turn ends in it";
      EXPECT_NE(std::string(".?!").find(text.back()), std::string::npos) << text;
      std::set<std::string> questions;
      std::size_t longest = 0;
      for (std::size_t i = 0; i < made.later.size(); ++i) {
        const std::string& expect = made.later[i].expect;
        const std::string rest = bytes_of(made.later[i].tokens);
        ASSERT_TRUE(rest.starts_with("\n\n") && rest.ends_with("?" + end)) << rest;
        const std::string question = rest.substr(2, rest.size() - 2 - end.size());
        questions.insert(question);
        EXPECT_EQ(text.find(question), std::string::npos) << question;
        EXPECT_TRUE(ckv::holds(text, expect)) << expect;
        EXPECT_FALSE(ckv::holds(question, expect)) << question;
        for (std::size_t other = 0; other < i; ++other) {
          EXPECT_FALSE(ckv::holds(expect, made.later[other].expect) ||
                       ckv::holds(made.later[other].expect, expect))
              << expect;
        }
        // What is read in two parts is the whole chat, token by token.
        const std::vector<TokenId> chat = chat_of(made, i);
        const std::string message =
            text.substr(begin + user.size()) + rest.substr(0, rest.size() - end.size());
        EXPECT_EQ(ckv::encode_prompt(model(), ckv::chat_prompt(model(), message)), chat) << task << index;
        longest = std::max(longest, chat.size());
      }
      EXPECT_EQ(questions.size(), 3U);
      EXPECT_LE(longest, length);
      EXPECT_GE(longest, length / 2) << "a sentence is missing at the most, and they are long there";
    }
  }
}

TEST_F(LaterPrompts, TheFourAlikeDifferInTownsAndNumbers) {
  const std::string text = bytes_of(prompt("later-many", 400, 1).tokens);
  std::set<std::string> facts;
  const std::string start = "The special magic number of ";
  for (std::size_t at = text.find(start); at != std::string::npos; at = text.find(start, at + 1)) {
    facts.insert(text.substr(at, text.find('.', at) - at));
  }
  EXPECT_EQ(facts.size(), 4U);
}

TEST_F(LaterPrompts, PassagesAreOfTheTextAndLieWhereAsked) {
  for (const double depth : {0.0, 0.5, 1.0}) {
    const ckv::TaskPrompt made = prompt("later-loss", 300, 2, depth);
    EXPECT_EQ(made.measure, ckv::Measure::perplexity);
    ASSERT_EQ(made.later.size(), 1U);
    ASSERT_EQ(made.continuation.size(), 64U);
    EXPECT_LE(made.tokens.size() + made.later[0].tokens.size(), 300U);
    EXPECT_EQ(bytes_of(made.later[0].tokens),
              "\n\nQuote a passage of the text, word for word.<|im_end|>\n<|im_start|>assistant\n");
    const auto found = std::ranges::search(made.tokens, made.continuation);
    ASSERT_FALSE(found.empty());
    const auto first = static_cast<std::size_t>(found.begin() - made.tokens.begin());
    const std::string before = bytes_of(std::span(made.tokens).first(first));
    const std::size_t head = before.find("<|im_start|>user\n") + std::string("<|im_start|>user\n").size();
    if (depth == 0.0) {
      EXPECT_EQ(before.size(), head);
    } else if (depth == 1.0) {
      EXPECT_EQ(first + 64, made.tokens.size());
    } else {
      EXPECT_GT(before.size(), head);
      EXPECT_LT(first + 64, made.tokens.size());
    }
  }
  EXPECT_NE(message_of<engine::Error>([&] {
              prompt("later-loss", 100, 0);
            }).find("a prompt of 100 tokens was asked for, its text has "),
            std::string::npos);
}

TEST_F(LaterPrompts, WholeCachesAnswerAsOneThatReadTheWholeChatBitForBit) {
  std::vector<ckv::Compression> ways = {{.method = ckv::Method::full}, snapkv_at(1.0), compresskv_at(1.0)};
  ways.push_back(ways[1]);
  ways.back().method = ckv::Method::cake;
  for (const std::string task : {"later", "later-many"}) {
    const ckv::TaskPrompt made = prompt(task, 240, 3);
    const std::vector<ckv::Outcome> outcomes = outcomes_of(made, ways);
    ASSERT_EQ(outcomes[0].answers.size(), 3U);
    for (const ckv::Outcome& outcome : outcomes) {
      EXPECT_EQ(outcome.answers, outcomes[0].answers);
      EXPECT_EQ(outcome.rows, outcomes[0].rows);
    }
    for (std::size_t i = 0; i < 3; ++i) {
      const std::string& answer = outcomes[0].answers[i];
      const std::string whole = ckv::run(model(), chat_of(made, i), ways[0], {.max_new_tokens = 16}).answer;
      EXPECT_FALSE(answer.empty());
      // What is right already is not gone on with.
      EXPECT_EQ(answer, ckv::is_right(made, answer, i) ? whole.substr(0, answer.size()) : whole);
      EXPECT_EQ(ckv::is_right(made, answer, i), ckv::holds(whole, made.later[i].expect));
    }
  }

  const ckv::TaskPrompt made = prompt("later-loss", 240, 3);
  engine::Sequence sequence{model().model};
  std::span<const float> logits = sequence.prefill(chat_of(made, 0));
  double sum = 0.0;
  for (const TokenId token : made.continuation) {
    sum += ckv::surprise(logits, token);
    logits = sequence.decode(token, sequence.next_position());
  }
  for (const ckv::Outcome& outcome : outcomes_of(made, ways)) {
    EXPECT_TRUE(outcome.answers.empty());
    EXPECT_EQ(outcome.perplexity, std::exp(sum / 64.0));
  }
}

TEST_F(LaterPrompts, MethodsSeeTheTextAloneAndEveryQuestionHasItsOwnCopy) {
  const std::array<ckv::Compression, 2> ways = {snapkv_at(0.3), compresskv_at(0.3)};
  const ckv::TaskPrompt made = prompt("later", 240, 4);
  const std::vector<ckv::Outcome> outcomes = outcomes_of(made, ways);
  for (std::size_t way = 0; way < ways.size(); ++way) {
    const ckv::RunResult alone = ckv::run(model(), made.tokens, ways[way], {.max_new_tokens = 1});
    ckv::Outcome counted;
    ckv::count_kept(alone.kept, made.tokens.size(), model().shape(engine::KvType::f32), counted);
    EXPECT_EQ(outcomes[way].kept, counted.kept);
    EXPECT_EQ(outcomes[way].rows, counted.rows);
  }
  for (std::size_t i = 0; i < 3; ++i) {
    ckv::TaskPrompt single = made;
    single.later = {made.later[i]};
    const std::vector<ckv::Outcome> one = outcomes_of(single, ways);
    for (std::size_t way = 0; way < ways.size(); ++way) {
      ASSERT_EQ(one[way].answers.size(), 1U);
      EXPECT_EQ(outcomes[way].answers[i], one[way].answers[0]) << i;
    }
  }
}

TEST_F(LaterPrompts, LittleMemoryChangesNothing) {
  const std::array<ckv::Compression, 4> ways = {
      snapkv_at(0.3), {.method = ckv::Method::full}, compresskv_at(0.5), snapkv_at(0.1)};
  const std::size_t row_bytes = 2 * 64 * sizeof(float);
  for (const std::string task : {"later", "later-loss"}) {
    const ckv::TaskPrompt made = prompt(task, 200, 6);
    const std::vector<ckv::Outcome> at_once = outcomes_of(made, ways, {.max_new_tokens = 4});
    // No two fit, or the first two and the last two, each once a question.
    for (const std::size_t bytes :
         {std::size_t{0}, made.copies() * made.tokens.size() * 90 * row_bytes * 7 / 5}) {
      const std::vector<ckv::Outcome> in_parts =
          outcomes_of(made, ways, {.max_new_tokens = 4, .batch_bytes = bytes});
      ASSERT_EQ(in_parts.size(), ways.size());
      for (std::size_t i = 0; i < ways.size(); ++i) {
        EXPECT_EQ(in_parts[i].answers, at_once[i].answers) << task << i;
        EXPECT_EQ(in_parts[i].perplexity, at_once[i].perplexity) << task << i;
        EXPECT_EQ(in_parts[i].rows, at_once[i].rows) << task << i;
      }
    }
    EXPECT_NE(std::pair(at_once[3].answers, at_once[3].perplexity),
              std::pair(at_once[1].answers, at_once[1].perplexity))
        << "they differ, so that a mix-up would show";
  }
}

// ---- the tool ----

std::vector<Json> records_in(const std::filesystem::path& path) {
  std::vector<Json> records;
  std::istringstream text{read(path)};
  std::string line;
  std::getline(text, line);  // the header
  while (std::getline(text, line)) {
    records.push_back(Json::parse(line));
  }
  return records;
}

/// Without what depends on how fast the machine is.
std::vector<Json> lasting(std::vector<Json> records) {
  for (Json& record : records) {
    record.erase("compress_ms");
    record.erase("prefill_ms");
  }
  return records;
}

TEST_F(LaterPrompts, TheToolRecordsEveryQuestionAndGoesOnWhereItWasStopped) {
  const Folder folder;
  const auto evaluate = [&](const std::filesystem::path& out, const char* threads) {
    return run_tool({"evaluate",
                     "--model",
                     model_path(),
                     "--out",
                     out.string(),
                     "--threads",
                     threads,
                     "--lengths",
                     "220",
                     "--seed",
                     "1",
                     "--methods",
                     "streaming,tova",
                     "--ratios",
                     "0.2,1",
                     "--prompts",
                     "1",
                     "--depths",
                     "1",
                     "--max-new-tokens",
                     "16",
                     "--tasks",
                     "later,later-many,later-loss"});
  };
  const auto whole = folder.path("whole.jsonl");
  const Outcome outcome = evaluate(whole, "1");
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  std::map<std::string, Json> full;
  std::map<std::string, std::size_t> compared;
  for (const Json& record : records_in(whole)) {
    const std::string task = record.at("task");
    if (task == "later-loss") {
      EXPECT_GT(record.at("perplexity").get<double>(), 1.0);
      EXPECT_FALSE(record.contains("questions") || record.contains("right"));
    } else {
      EXPECT_FALSE(record.contains("answer"));
      const Json& questions = record.at("questions");
      ASSERT_EQ(questions.size(), 3U);
      bool all = true;
      for (const Json& question : questions) {
        const bool right =
            ckv::holds(question.at("answer").get<std::string>(), question.at("expect").get<std::string>());
        EXPECT_EQ(question.at("right"), right) << question;
        all = all && right;
      }
      EXPECT_EQ(record.at("right"), all);
    }
    if (record.at("method") == "full") {
      full[task] = record;
      continue;
    }
    // Nobody else answers before the full cache has answered all three.
    EXPECT_TRUE(full.at(task).value("right", true)) << task;
    ++compared[task];
    if (record.at("budget").dump() == R"({"ratio":1.0})") {
      for (const char* key : {"questions", "perplexity", "rows", "prompt_tokens", "prompt"}) {
        EXPECT_EQ(record.value(key, Json()), full.at(task).value(key, Json())) << task << key;
      }
    }
  }
  EXPECT_EQ(compared,
            (std::map<std::string, std::size_t>{{"later", 4}, {"later-loss", 4}, {"later-many", 4}}));

  const std::string text = read(whole);
  const std::filesystem::path torn = folder.write("torn.jsonl", text.substr(0, text.size() * 2 / 3));
  const Outcome resumed = evaluate(torn, "2");
  ASSERT_EQ(resumed.code, 0) << resumed.err;
  EXPECT_EQ(lasting(records_in(torn)), lasting(records_in(whole)));
  EXPECT_EQ(resumed.out.substr(0, resumed.out.find("streaming")),
            outcome.out.substr(0, outcome.out.find("streaming")));

  const auto expect_refused_with = [&](const char* path, const Json& questions) {
    Json broken = records_in(whole).at(0);
    broken["questions"] = questions;
    const std::string head = text.substr(0, text.find('\n') + 1);
    const Outcome refused = evaluate(folder.write(path, head + broken.dump() + "\n"), "1");
    EXPECT_EQ(refused.code, 1);
    EXPECT_NE(refused.err.find(std::string(path) + "' line 2 is no record"), std::string::npos)
        << refused.err;
  };
  expect_refused_with("none.jsonl", Json::array());
  expect_refused_with("text.jsonl", "three");
  expect_refused_with("silent.jsonl", Json::array({{{"expect", "x"}, {"answer", "x"}}}));
}

// ---- tools/report.py ----

/// What a script prints that has imported it, without the packages that draw.
std::string say_of_report(const Folder& folder, const std::string& script) {
  std::filesystem::create_directories(folder.path("stubs") / "matplotlib");
  folder.write("stubs/matplotlib/__init__.py", "def use(_): pass\n");
  folder.write("stubs/matplotlib/pyplot.py", "");
  folder.write("stubs/numpy.py",
               "class array(list):\n"
               "    def mean(self): return sum(self) / len(self)\n"
               "def mean(values): return array(values).mean()\n"
               "class random:\n"
               "    def default_rng(seed): return None\n");
  const std::string out = folder.path("out").string();
  const std::string command =
      "PYTHONPATH=" + quoted(folder.path("stubs").string() + ":" + COMPRESSKV_SOURCE_DIR + "/tools") +
      " PYTHONDONTWRITEBYTECODE=1 python3 " + quoted(folder.write("script.py", script).string()) + " >" +
      quoted(out) + " 2>&1";
  EXPECT_EQ(std::system(command.c_str()), 0) << read(out);
  return read(out);
}

TEST(LaterReport, CountsSingleQuestionsAndDrawsWholeTextsForItsIntervals) {
  const Folder folder;
  std::string records = "{\"file\": \"ckv evaluate\"}\n";
  const auto add = [&](int prompt, const std::string& method, const std::vector<bool>& right) {
    Json record = {{"task", "later"},      {"length", 1000},   {"prompt", prompt},
                   {"method", method},     {"budget", Json()}, {"kv_bytes", 1},
                   {"compress_ms", 0.0},   {"right", true},    {"questions", Json::array()},
                   {"prompt_tokens", 970}, {"depth", 0.5}};
    if (method != "full") {
      record["budget"] = {{"ratio", 0.1}};
    }
    for (const bool one : right) {
      record["questions"].push_back({{"expect", "x"}, {"right", one}, {"answer", ""}});
      record["right"] = record["right"].get<bool>() && one;
    }
    records += record.dump() + "\n";
  };
  add(0, "full", {true, true, true});
  add(0, "snapkv", {true, false, false});
  add(1, "full", {true, false, true});  // dropped
  add(2, "full", {true, true, true});
  add(2, "snapkv", {true, true, false});
  const std::string path = folder.write("records.jsonl", records).string();
  // The interval is drawn from one value a text: three from each would pass for more than they are.
  const std::string said = say_of_report(
      folder,
      "import pathlib, report\n"
      "report.interval = lambda values, *_: (min(values), max(values))\n"
      "_, records = report.read(pathlib.Path(" +
          quoted(path) +
          "))\n"
          "for task, length, title, pivot, rows in report.tables(records, 10):\n"
          "    print(title)\n"
          "    for row in rows: print(row)\n"
          "print(report.label('later-many'), '|', report.label('later-loss'), '|', report.label('keys'))\n");
  EXPECT_EQ(said,
            "single questions right, %, 2 prompts (full: 100)\n"
            "['all', 'full', '2', '100 %', '100 to 100', '100 %', '0.00', '0.0']\n"
            "['10 %', 'snapkv', '2', '50 %', '33 to 67', '50 %', '0.00', '0.0']\n"
            "single questions right, % | loss of the passage quoted, nats a token | right, %\n");
}

}  // namespace
}  // namespace ckv_test
