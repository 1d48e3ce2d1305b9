// ckv evaluate as its users meet it, on short prompts.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <span>
#include <sstream>
#include <string>
#include <vector>

#include "ckv/tasks.hpp"
#include "engine/error.hpp"
#include "model_fixture.hpp"
#include "runs.hpp"
#include "tool.hpp"

namespace ckv_test {
namespace {

Arguments evaluate(const std::string& out, const Arguments& more = {}) {
  Arguments all = {"evaluate", "--model", model_path(), "--out", out, "--lengths", "200", "--seed", "1"};
  all.insert(all.end(), more.begin(), more.end());
  return all;
}

std::vector<Json> lines_of(const std::filesystem::path& path) {
  std::vector<Json> lines;
  std::istringstream text{read(path)};
  for (std::string line; std::getline(text, line);) {
    lines.push_back(Json::parse(line));
  }
  return lines;
}

/// What does not depend on how fast the machine is.
std::vector<Json> timeless(std::vector<Json> lines) {
  for (Json& line : lines) {
    line.erase("compress_ms");
    line.erase("prefill_ms");
  }
  return lines;
}

/// [layer][stretch of a 64th of the prompt], rows kept of all KV heads.
std::vector<std::vector<std::size_t>> stretches_of(
    const std::vector<std::vector<std::vector<std::uint32_t>>>& kept, std::size_t tokens,
    std::size_t kv_heads) {
  std::vector<std::vector<std::size_t>> counts;
  for (const auto& lists : kept) {
    counts.emplace_back(64);
    for (const auto& positions : lists) {
      for (const std::uint32_t position : positions) {
        counts.back()[position * 64 / tokens] += kv_heads / lists.size();  // one list may stand for all heads
      }
    }
  }
  return counts;
}

TEST(Evaluate, WrongUsageIsExitCode2) {
  const Arguments start = {"evaluate", "--model", "m.gguf", "--out", "/tmp/none.jsonl"};
  const auto with = [&](const Arguments& more) {
    Arguments all = start;
    all.insert(all.end(), more.begin(), more.end());
    return all;
  };
  expect_usage_error({"evaluate", "--model", "m.gguf", "--ratios", "0.1"}, "--out");
  expect_usage_error(start, "no budget: give --ratios, --tokens or both");
  expect_usage_error(with({"--ratios", "0.1", "--tasks", "sums"}), "sums");
  expect_usage_error(with({"--ratios", "0.1", "--prompts", "0"}), "--prompts");
  expect_usage_error(with({"--tokens", "0"}), "--tokens");
}

// ---- tools/report.py
// ------------------------------------------------------------------------------------------------

/// What it says of a file that it refuses, which is before it draws: without the packages that draw.
Outcome report(const Folder& folder, const std::string& text) {
  std::filesystem::create_directories(folder.path("stubs") / "matplotlib");
  folder.write("stubs/matplotlib/__init__.py", "def use(_): pass\n");
  folder.write("stubs/matplotlib/pyplot.py", "");
  folder.write("stubs/numpy.py", "");
  const std::string records = folder.write("records.jsonl", text).string();
  const std::string command = "PYTHONPATH=" + quoted(folder.path("stubs").string()) + " python3 " +
                              quoted(COMPRESSKV_SOURCE_DIR "/tools/report.py") + " " + quoted(records) + " " +
                              quoted(folder.path("report").string()) + " 2>" +
                              quoted(folder.path("err").string());
  const int status = std::system(command.c_str());
  return {.code = WIFEXITED(status) ? WEXITSTATUS(status) : -1, .out = "", .err = read(folder.path("err"))};
}

TEST(Report, RefusesRecordsThatCountTwiceOrAreNone) {
  const Folder folder;
  const std::string head = "{\"file\": \"ckv evaluate\"}\n";
  const std::string full =
      R"({"task": "needle", "length": 9, "prompt": 4, "method": "full", "budget": null, "right": true})"
      "\n";
  std::string snap = full;
  snap.replace(snap.find("full"), 4, "snap");
  snap.replace(snap.find("null"), 4, R"({"ratio": 0.1})");
  const auto expect_refusal = [&](const std::string& text, const std::string& message) {
    const Outcome outcome = report(folder, text);
    EXPECT_EQ(outcome.code, 1);
    EXPECT_NE(outcome.err.find(message), std::string::npos) << outcome.err;
    EXPECT_EQ(outcome.err.find("Traceback"), std::string::npos) << outcome.err;
  };
  expect_refusal(
      head + full + snap + full,
      "records.jsonl: lines 2 and 4 are both the record needle, 9 tokens, prompt 4, full, budget null");
  expect_refusal(
      head + full + snap + snap,
      "lines 3 and 4 are both the record needle, 9 tokens, prompt 4, snap, budget {\"ratio\": 0.1}");
  expect_refusal(head + full + "{\"task\": \"needle\"}\n",
                 "records.jsonl: line 3 is no record: KeyError('length')");
  expect_refusal(head + full + "sheep\n", "records.jsonl: line 3 is no record: ");
  expect_refusal(head + "{\"task\": 1, \"task\": 2}\n",
                 "line 2 is no record: ValueError('a key stands twice')");
  expect_refusal(head + "[NaN]\n", "line 2 is no record: ValueError('NaN is no number of JSON')");
  expect_refusal(head + "{\"a\": " + std::string(100000, '[') + "\n", "line 2 is no record: RecursionError");
  expect_refusal(full, "is not what `ckv evaluate` wrote");
  expect_refusal("", "is not what `ckv evaluate` wrote");
  // A line that is still being written is not read, and these are each there once.
  expect_refusal(head + "{\"task\": \"nee", "the file holds no prompt that the full cache answers");
  EXPECT_NE(report(folder, head + full + snap + "{\"task\": \"nee").err.find("plt"), std::string::npos)
      << "it should go on to drawing";
}

class EvaluateWithModel : public Needles {};

TEST_F(EvaluateWithModel, NothingMeasuredIsAFailure) {
  const Folder folder;
  const auto out = folder.path("out.jsonl");
  const Arguments grid = {"--methods", "streaming", "--ratios", "0.1", "--prompts", "1", "--depths", "1"};
  Arguments too_short = grid;
  too_short.insert(too_short.end(), {"--max-new-tokens", "1"});
  for (int run = 0; run < 2; ++run) {  // and gone on with
    expect_failure(evaluate(out.string(), too_short),
                   "nothing was measured: the full cache answers none of the prompts");
  }
  EXPECT_GT(lines_of(out).size(), 1U);
}

TEST_F(EvaluateWithModel, TheFullCacheAloneIsComparedWithNothing) {
  const Folder folder;
  const Outcome outcome = run_tool(evaluate(
      folder.path("out.jsonl").string(),
      {"--methods", "full", "--ratios", "0.5", "--tasks", "perplexity", "--prompts", "1", "--depths", "1"}));
  EXPECT_EQ(outcome.code, 0) << outcome.err;
  EXPECT_EQ(outcome.out.find("checked"), std::string::npos) << outcome.out;
}

TEST_F(EvaluateWithModel, TheSummaryKeepsToTheWidthOfTheTerminal) {
  const Folder folder;
  // Also a name wider than its column.
  expect_narrow_output(evaluate(folder.path("out.jsonl").string(),
                                {"--methods", "streaming,compresskv:heads=2:window=4:pool=max", "--ratios",
                                 "0.5", "--tasks", "perplexity", "--prompts", "1", "--depths", "1"}),
                       "task");
}

TEST_F(EvaluateWithModel, FilesThatAreNoneEndItSoon) {
  const Folder folder;
  const std::string out = folder.path("out.jsonl").string();
  const Arguments grid = {"--methods", "snapkv", "--ratios", "0.1", "--prompts", "1"};
  const auto with = [&](const Arguments& more) {
    Arguments all = grid;
    all.insert(all.end(), more.begin(), more.end());
    return all;
  };
  const std::string folder_name = folder.path("").string();
  const auto with_model = [&](const std::string& model) {
    return Arguments{"evaluate", "--model", model, "--out", out, "--ratios", "0.1"};
  };
  expect_refused(with_model("/dev/zero"), {"/dev/zero", "is a device: give "});
  expect_refused(with_model(folder_name), {folder_name, "is a folder: give "});
  expect_refused(with_model("/none/x"), {"/none/x", "o such file"});
  for (const char* option : {"--heads", "--errors", "--haystack"}) {
    expect_refused(evaluate(out, with({option, "/dev/zero"})), {"/dev/zero", "is a device: give "});
    expect_refused(evaluate(out, with({option, folder_name})), {folder_name, "is a folder: give "});
    expect_refused(evaluate(out, with({option, "/none/x"})), {"/none/x", "o such file"});
  }
  expect_failure(evaluate("/dev/full", grid), "cannot write records to '/dev/full', it is a device");
  expect_failure(evaluate(folder_name, grid), "it is a folder: give the path of a regular file");
  expect_failure(evaluate("/none/x.jsonl", grid), "cannot write '/none/x.jsonl', No such file or directory");
  const std::string heads = folder.write("heads.json", R"({"0-0": [1e308, 1e308]})").string();
  expect_failure(evaluate(out, with({"--methods", "compresskv", "--heads", heads})),
                 heads + ": head scores of layer 0 head 0 add up to inf");
}

TEST_F(EvaluateWithModel, DoubledRecordsAndBrokenOnesAreRefused) {
  const Folder folder;
  const Arguments grid = {"--methods", "streaming", "--ratios", "0.5",     "--prompts",
                          "1",         "--depths",  "1",        "--tasks", "perplexity"};
  const auto out = folder.path("out.jsonl");
  ASSERT_EQ(run_tool(evaluate(out.string(), grid)).code, 0);
  const std::string text = read(out);
  const std::string last = text.substr(text.rfind('\n', text.size() - 2) + 1);
  expect_failure(
      evaluate(folder.write("twice.jsonl", text + last).string(), grid),
      "twice.jsonl' lines 3 and 4 are both the record perplexity, 200 tokens, prompt 0, streaming, budget "
      "{\"ratio\":0.5}");
  Json broken = Json::parse(last);
  broken["prompt"] = 1;
  broken.erase("kv_bytes");
  expect_failure(evaluate(folder.write("broken.jsonl", text + broken.dump() + "\n").string(), grid),
                 "broken.jsonl' line 4 is no record");
  for (const auto& [option, value] :
       std::vector<std::pair<std::string, std::string>>{{"--ratios", "0.5,0.50"},
                                                        {"--tokens", "40,40"},
                                                        {"--lengths", "200,200"},
                                                        {"--tasks", "needle,needle"}}) {
    Arguments all = {"evaluate", "--model", model_path(), "--out", out.string(), "--tokens", "60"};
    all.insert(all.end(), {option, value});
    expect_usage_error(all, option + " has ");
  }
  EXPECT_EQ(read(out), text);
}

TEST_F(EvaluateWithModel, OptionsThatMakeNoSenseAreNamed) {
  const Folder folder;
  const std::string out = folder.path("out.jsonl").string();
  expect_usage_error(evaluate(out, {"--ratios", "1.5"}), "--ratios has 1.5: each is a share kept, in (0, 1]");
  expect_usage_error(evaluate(out, {"--ratios", "0.1", "--methods", "snap"}), "method is 'snap'");
  expect_usage_error(evaluate(out, {"--ratios", "0.1", "--methods", "snapkv:size=3"}),
                     "--methods snapkv:size=3: 'size=3' is not known; options are uniform, errors, equal, "
                     "pool=avg, pool=max, pool=trailing, threshold=SCORE, min=ROWS, window=N");
  expect_usage_error(evaluate(out, {"--ratios", "0.1", "--methods", "compresskv", "--models-dir",
                                    folder.path("none").string()}),
                     "--methods compresskv needs --heads: no calibration of this model in ");
  expect_usage_error(evaluate(out, {"--ratios", "0.1", "--methods", "kvzip-heads", "--models-dir",
                                    folder.path("none").string()}),
                     "--methods kvzip-heads needs --kv-heads: no scores of KV heads of this model in ");
  expect_usage_error(evaluate(out, {"--tokens", "5", "--methods", "snapkv"}),
                     "--methods snapkv: budget is 5 rows a layer, the window alone is 8");
  EXPECT_TRUE(lines_of(folder.path("out.jsonl")).size() <= 1U);
}

TEST_F(EvaluateWithModel, EveryMethodKeepsTheSameBytesAndWhatGenerateKeeps) {
  const Folder folder;
  const Outcome outcome =
      run_tool(evaluate(folder.path("out.jsonl").string(),
                        {"--methods", "all", "--tokens", "40", "--prompts", "1", "--max-new-tokens", "14"}));
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  EXPECT_NE(outcome.out.find("Every method held the same bytes at each budget: checked."), std::string::npos);
  const auto& config = model().model.config();
  std::map<std::string, Json> by_method;
  for (const Json& line : lines_of(folder.path("out.jsonl"))) {
    if (line.contains("method") && (line.at("method") != "full" || line.at("right") == true)) {
      by_method[line.at("method")] = line;
    }
  }
  // `all` leaves out what the calibration in the repository does not hold.
  const std::filesystem::path kv_heads = calibration("_kv_head_scores.json");
  const std::filesystem::path surrogate = calibration("_surrogate.bin");
  const auto left_out = [&](const compresskv::MethodInfo& row) {
    return (row.needs_kv_scores && !std::filesystem::exists(kv_heads)) ||
           (row.needs_surrogate && !std::filesystem::exists(surrogate));
  };
  ASSERT_EQ(by_method.size() + static_cast<std::size_t>(std::ranges::count_if(compresskv::methods, left_out)),
            compresskv::methods.size());

  const Json& full = by_method.at("full");
  const ckv::TaskPrompt prompt =
      ckv::task_prompt("needle", model(), *haystack_,
                       {.seed = 1, .length = 200, .index = full.at("prompt"), .depth = full.at("depth")});
  for (const compresskv::MethodInfo& row : compresskv::methods) {
    if (left_out(row)) {
      continue;
    }
    const Json& record = by_method.at(std::string(row.name));
    EXPECT_EQ(record.at("prompt_tokens"), prompt.tokens.size());
    ckv::Compression how = compresskv_at(1.0);
    how.method = row.method;
    how.budget = compresskv::Budget::tokens_per_layer(40);
    if (!row.needs_heads) {
      how.errors.reset();
    }
    if (row.needs_statistics) {
      how.statistics = compresskv::io::load_query_statistics(calibration("_query_statistics.bin"));
    }
    model().show_outputs(how);
    if (row.needs_surrogate) {
      how.surrogate = compresskv::io::load_surrogate(surrogate);
    }
    if (row.needs_kv_scores) {
      how.kv_scores = compresskv::io::load_head_scores(kv_heads);
    }
    if (row.needs_scores) {
      how.scores = compresskv::io::load_head_scores(calibration("_head_scores.json"));
    }
    const ckv::RunResult alone = ckv::run(model(), prompt.tokens, how, {.max_new_tokens = 14});
    // What is right already is not gone on with.
    const std::string answer = record.at("answer");
    EXPECT_EQ(answer, record.at("right") == true ? alone.answer.substr(0, answer.size()) : alone.answer)
        << row.name;
    EXPECT_EQ(record.at("right"), ckv::holds(alone.answer, prompt.expect.at(0))) << row.name;
    EXPECT_EQ(record.at("kv_bytes"), alone.kv_bytes_kept) << row.name;
    if (row.method != compresskv::Method::full) {
      EXPECT_EQ(record.at("rows"), 40 * config.layers * config.kv_heads) << row.name;
      EXPECT_EQ(record.at("kept"),
                stretches_of(alone.kept, prompt.tokens.size(), static_cast<std::size_t>(config.kv_heads)))
          << row.name;
    }
  }
}

TEST_F(EvaluateWithModel, ResumedOnOtherThreadsIsTheSameRun) {
  const Folder folder;
  const Arguments grid = {"--threads", "1",   "--methods",        "compresskv,cake",
                          "--ratios",  "0.2", "--prompts",        "2",
                          "--depths",  "2",   "--max-new-tokens", "16"};
  const auto whole = folder.path("whole.jsonl");
  ASSERT_EQ(run_tool(evaluate(whole.string(), grid)).code, 0);
  const std::string text = read(whole);
  std::size_t answered = 0;
  for (const Json& line : lines_of(whole)) {
    answered += line.value("method", "") == "cake" ? 1U : 0U;
  }
  EXPECT_EQ(answered, 2U);

  // Killed in the middle of a line, and gone on with.
  const std::filesystem::path torn = folder.write("torn.jsonl", text.substr(0, text.size() * 2 / 3));
  Arguments other = grid;
  other[1] = "2";
  const Outcome resumed = run_tool(evaluate(torn.string(), other));
  ASSERT_EQ(resumed.code, 0) << resumed.err;
  EXPECT_EQ(timeless(lines_of(torn)), timeless(lines_of(whole)));

  // Nothing is left to do.
  const std::string before = read(torn);
  ASSERT_EQ(run_tool(evaluate(torn.string(), other)).code, 0);
  EXPECT_EQ(read(torn), before);

  // Each cell stands there once.
  std::set<std::string> cells;
  for (const Json& line : lines_of(torn)) {
    EXPECT_TRUE(cells
                    .insert(line.value("method", "") + line.value("budget", Json()).dump() +
                            line.value("prompt", Json()).dump())
                    .second)
        << line;
  }
}

TEST_F(EvaluateWithModel, RecordsOfOtherRunsAreRefused) {
  const Folder folder;
  const std::string out = folder.path("out.jsonl").string();
  const Arguments grid = {"--methods", "streaming", "--ratios", "0.1", "--prompts", "1"};
  ASSERT_EQ(run_tool(evaluate(out, grid)).code, 0);
  const std::string text = read(out);

  Arguments shorter = grid;
  shorter.insert(shorter.end(), {"--max-new-tokens", "7"});
  expect_failure(evaluate(out, shorter),
                 "holds records of other runs: settings.max_new_tokens is 32 there and 7 here");
  EXPECT_EQ(read(out), text);

  std::string other_model = text;
  const std::string digest = lines_of(out)[0].at("model_sha256");
  other_model.replace(other_model.find(digest), 4, "0000");
  expect_failure(evaluate(folder.write("model.jsonl", other_model).string(), grid),
                 "holds records of other runs: model_sha256 is \"0000");
  std::string other_path = text;
  other_path.replace(other_path.find("\"code_path\":\"") + 13, 4, "none");
  expect_failure(evaluate(folder.write("path.jsonl", other_path).string(), grid), "code_path is \"none");
  expect_failure(evaluate(folder.write("text.jsonl", "some text\n").string(), grid), "line 1 is no record");
}

TEST_F(EvaluateWithModel, WholeCachesAnswerAllTasksAsTheFullOne) {
  const Folder folder;
  const Outcome outcome =
      run_tool(evaluate(folder.path("out.jsonl").string(),
                        {"--methods", "compresskv,cake,h2o", "--ratios", "1", "--prompts", "1", "--tasks",
                         "turns,perplexity,error", "--max-new-tokens", "16"}));
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  std::map<std::string, Json> full;
  std::size_t compared = 0;
  for (const Json& line : lines_of(folder.path("out.jsonl"))) {
    if (!line.contains("method")) {
      continue;
    }
    const std::string task = line.at("task");
    if (line.at("method") == "full") {
      full[task] = line;
      continue;
    }
    for (const char* key : {"prompt", "right", "answer", "perplexity", "error", "rows", "prompt_tokens"}) {
      EXPECT_EQ(line.value(key, Json()), full.at(task).value(key, Json())) << task << " " << key;
    }
    ++compared;
  }
  EXPECT_GE(compared, 6U);  // the two that measure at the least
  ASSERT_TRUE(full.contains("perplexity"));
  EXPECT_GT(full.at("perplexity").at("perplexity"), 1.0);
  EXPECT_LT(full.at("perplexity").at("perplexity"), 100.0);
}

TEST_F(EvaluateWithModel, RulesAreJudgedByWhatTheRecordSays) {
  const Folder folder;
  const Outcome outcome = run_tool(evaluate(folder.path("out.jsonl").string(),
                                            {"--methods", "streaming", "--ratios", "0.2", "--prompts", "2",
                                             "--depths", "1", "--tasks", "rules", "--max-new-tokens", "16"}));
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  std::size_t followed = 0;
  for (const Json& line : lines_of(folder.path("out.jsonl"))) {
    if (line.contains("method")) {
      const Json& rule = line.at("rule");
      const std::string answer = line.at("answer");
      const bool right = answer.find(rule.at("says").get<std::string>()) != std::string::npos &&
                         (rule.at("never") == "" || !ckv::holds(answer, rule.at("never").get<std::string>()));
      EXPECT_EQ(line.at("right"), right) << line;
      followed += right && line.at("method") == "full" ? 1U : 0U;
    }
  }
  EXPECT_EQ(followed, 2U);
}

TEST_F(EvaluateWithModel, EvictionsCostPerplexityAndAttention) {
  const Folder folder;
  const Outcome outcome = run_tool(evaluate(
      folder.path("out.jsonl").string(),
      {"--methods", "cake,random", "--ratios", "0.05,0.5", "--prompts", "1", "--tasks", "perplexity,error"}));
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  std::map<std::pair<std::string, std::string>, Json> records;
  for (const Json& line : lines_of(folder.path("out.jsonl"))) {
    if (line.contains("method")) {
      records[{std::string(line.at("task")) + std::string(line.at("method")), line.at("budget").dump()}] =
          line;
    }
  }
  for (const char* method : {"cake", "random"}) {
    const auto at = [&](const std::string& task, const char* budget) {
      return records.at({task + method, budget}).at(task).get<double>();
    };
    EXPECT_GT(at("error", R"({"ratio":0.05})"), at("error", R"({"ratio":0.5})")) << method;
    EXPECT_GT(at("error", R"({"ratio":0.5})"), 0.0) << method;
    EXPECT_EQ(records.at({std::string("error") + method, R"({"ratio":0.5})"}).at("layer_errors").size(), 30U);
    EXPECT_GT(at("perplexity", R"({"ratio":0.05})"),
              records.at({"perplexityfull", "null"}).at("perplexity").get<double>())
        << method;
  }
}

TEST_F(EvaluateWithModel, PromptsDifferByEveryPartOfTheirPlace) {
  const ckv::PromptPlace place{.seed = 3, .length = 400, .index = 2, .depth = 0.5};
  const auto tokens = [&](const ckv::PromptPlace& at) {
    return ckv::task_prompt("needle", model(), *haystack_, at).tokens;
  };
  const auto here = tokens(place);
  EXPECT_EQ(tokens(place), here);
  EXPECT_LE(here.size(), 400U);
  ckv::PromptPlace other = place;
  other.seed = 4;
  EXPECT_NE(tokens(other), here);
  other = place;
  other.index = 3;
  EXPECT_NE(tokens(other), here);
  other = place;
  other.depth = 0.9;
  EXPECT_NE(tokens(other), here);
}

TEST_F(EvaluateWithModel, RightAnswersStandInThePromptAndNotInTheQuestion) {
  for (const std::string& task : ckv::task_names()) {
    for (std::size_t index = 0; index < 20; ++index) {
      const ckv::TaskPrompt prompt = ckv::task_prompt(
          task, model(), *haystack_, {.seed = 1, .length = 500, .index = index, .depth = 0.3});
      EXPECT_LE(prompt.tokens.size(), 500U) << task;
      const std::string text = model().tokenizer.decode(prompt.tokens);
      const bool asks_later = !prompt.later.empty() && !prompt.later[0].expect.empty();
      ASSERT_EQ(!prompt.expect.empty() || !prompt.rule.kind.empty() || asks_later,
                prompt.continuation.empty())
          << task;
      EXPECT_EQ(prompt.fact.size() > 0, task == "needle");
      const auto fact = std::span(prompt.tokens).subspan(prompt.fact.first, prompt.fact.size());
      EXPECT_TRUE(task != "needle" || ckv::holds(model().tokenizer.decode(fact), prompt.expect.at(0)));
      EXPECT_EQ(prompt.continuation.empty(), ckv::measure_of(task) == ckv::Measure::none);
      for (const std::string& expect : prompt.expect) {
        EXPECT_TRUE(ckv::holds(text, expect)) << task << ": " << expect;
      }
    }
  }
  EXPECT_THROW(ckv::task_prompt("sums", model(), *haystack_, {}), engine::Error);
}

}  // namespace
}  // namespace ckv_test
