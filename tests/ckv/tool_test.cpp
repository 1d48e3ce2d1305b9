// The tool as its users meet it: the program is run, and its output and exit code are looked at.

#include "tool.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <numeric>
#include <string>
#include <vector>

#include "model_fixture.hpp"

namespace ckv_test {
namespace {

// ---- without a model
// ----------------------------------------------------------------------------------------------

TEST(Tool, HelpOfEverySubcommandSaysWhatItTakes) {
  const std::array<std::pair<const char*, const char*>, 4> words = {{{"generate", "--heads-per-layer"},
                                                                     {"calibrate", "--depths"},
                                                                     {"demo", "--ratios"},
                                                                     {"inspect", "--length"}}};
  for (const auto& [command, word] : words) {
    const Outcome outcome = run_tool({command, "--help"});
    EXPECT_EQ(outcome.code, 0);
    EXPECT_NE(outcome.out.find(word), std::string::npos) << outcome.out;
    EXPECT_EQ(outcome.err, "");
  }
}

TEST(Tool, VersionIsPrinted) {
  const Outcome outcome = run_tool({"--version"});
  EXPECT_EQ(outcome.code, 0);
  EXPECT_NE(outcome.out.find('.'), std::string::npos) << outcome.out;
}

TEST(Tool, WrongUsageIsExitCode2) {
  const Arguments start = {"generate", "--model", "m.gguf"};
  const auto with = [&](const Arguments& more) {
    Arguments all = start;
    all.insert(all.end(), more.begin(), more.end());
    return all;
  };
  expect_usage_error(with({"--prompt", "x", "--method", "magic", "--rows", "9"}), "magic");
  expect_usage_error(with({"--prompt", "x", "--method", "streaming"}), "--rows, --ratio and --bytes");
  expect_usage_error(with({"--prompt", "x", "--method", "streaming", "--rows", "9", "--ratio", "0.5"}),
                     "at most 1");
  expect_usage_error(with({"--prompt", "x", "--method", "streaming", "--ratio", "1.5"}),
                     "budget ratio is 1.5");
  expect_usage_error(with({"--prompt", "x", "--method", "streaming", "--ratio", "0"}), "budget ratio is 0");
  expect_usage_error(with({"--prompt", "x", "--method", "streaming", "--ratio", "nan"}), "ratio");
  expect_usage_error(with({"--prompt", "x", "--method", "streaming", "--rows", "-3"}), "--rows");
  expect_usage_error(with({"--prompt", "x", "--prompt-file", "y", "--method", "full"}),
                     "[--prompt,--prompt-file,--load-cache]");
  expect_usage_error(with({"--method", "full"}), "[--prompt,--prompt-file,--load-cache]");
  expect_usage_error(with({"--prompt", "x", "--method", "full", "--raw", "--question", "y"}), "excludes");
  expect_usage_error(with({"--prompt", "x", "--method", "full", "--positions"}), "--json");
  expect_usage_error(with({"--prompt", "x", "--method", "full", "--kv-type", "int3"}), "int3");
  expect_usage_error(with({"--prompt", "x", "--method", "full", "--window", "0"}), "--window");
  expect_usage_error(with({"--prompt", "x", "--method", "full", "--prefill-chunk", "0"}), "--prefill-chunk");
  expect_usage_error(with({"--prompt", "x", "--method", "streaming", "--rows", "9", "--working-rows", "20"}),
                     "--working-rows requires --prefill-chunk");
  expect_usage_error(
      with({"--prompt", "x", "--method", "full", "--prefill-chunk", "9", "--working-rows", "20"}),
      "--method full has none");
  expect_usage_error(with({"--prompt", "x", "--method", "streaming", "--rows", "9", "--prefill-chunk", "9",
                           "--working-rows", "7"}),
                     "--working-rows is 7, the window alone is 8: give at least the window");
  expect_usage_error({"generate", "--prompt", "x", "--method", "full"}, "--model");
  expect_usage_error({"inspect"}, "model");
}

TEST(Tool, CompressKvWithoutHeadsNamesCalibrate) {
  const Folder folder;
  const std::string unknown = folder.write("unknown.gguf", "GGUF but no more").string();
  expect_usage_error({"generate", "--model", unknown, "--prompt", "x", "--ratio", "0.5"}, "ckv calibrate");
}

TEST(Tool, WhatFailsIsExitCode1AndNamed) {
  const Folder folder;
  const std::string broken = folder.write("broken.gguf", "GGUF but no more").string();
  const std::string text = folder.write("ranking.json", "{\"0\": [1, 1]}").string();
  expect_failure({"inspect", broken}, "broken.gguf");
  expect_failure({"generate", "--model", broken, "--prompt", "x", "--method", "full"}, "broken.gguf");
  expect_failure({"generate", "--model", broken, "--prompt", "x", "--ratio", "0.5", "--heads", text},
                 "ranking.json");
}

// ---- with the real model
// --------------------------------------------------------------------------------------------

class ToolWithModel : public RealModel {
 protected:
  static Arguments generate(const Arguments& more) {
    Arguments all = {"generate", "--model", model_path(), "--json", "--max-new-tokens", "12"};
    all.insert(all.end(), more.begin(), more.end());
    return all;
  }
  static std::string long_text() {
    std::string text;
    for (int i = 0; i < 25; ++i) {
      text += "On day " + std::to_string(i) + " the keeper of the lamp wrote " + std::to_string(i * 7) +
              " lines into the book of the tower.\n";
    }
    return text;
  }
};

TEST_F(ToolWithModel, AnswersFromTheFullCache) {
  const Outcome outcome = run_tool(generate({"--prompt", "Here is a question about a country.", "--question",
                                             "What is the capital of France?", "--method", "full"}));
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  EXPECT_EQ(outcome.err, "");  // no progress where stderr is no terminal
  const Json out = outcome.json();
  EXPECT_NE(out.at("answer").get<std::string>().find("Paris"), std::string::npos) << out.at("answer");
  for (const char* key :
       {"answer", "prompt_tokens", "rows", "kv_bytes_full", "kv_bytes_kept", "kv_bytes_peak", "prefill_ms",
        "compress_ms", "decode_tokens_per_second", "model_sha256", "settings"}) {
    EXPECT_TRUE(out.contains(key)) << key;
  }
  EXPECT_FALSE(out.contains("prompt_token_ids"));
  EXPECT_FALSE(out.contains("kept_positions"));
  for (const char* key : {"method", "budget", "heads", "errors", "window", "heads_per_layer", "pool",
                          "kv_type", "threads", "code_path", "temperature", "top_p", "seed", "raw"}) {
    EXPECT_TRUE(out.at("settings").contains(key)) << key;
  }
  EXPECT_EQ(out.at("kv_bytes_kept"), out.at("kv_bytes_full"));
  EXPECT_EQ(out.at("model_sha256").get<std::string>().size(), 64U);
  EXPECT_EQ(out.at("compress_ms"), 0.0);
}

TEST_F(ToolWithModel, StreamingKeepsItsFirstAndLastPositions) {
  const Outcome outcome = run_tool(generate({"--prompt", long_text(), "--method", "streaming", "--rows", "30",
                                             "--positions", "--kv-type", "bf16"}));
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  const Json out = outcome.json();
  const auto tokens = out.at("prompt_tokens").get<std::size_t>();
  EXPECT_EQ(out.at("prompt_token_ids").size(), tokens);
  std::vector<std::size_t> expected(30);
  std::iota(expected.begin(), expected.begin() + 4, std::size_t{0});
  std::iota(expected.begin() + 4, expected.end(), tokens - 26);
  ASSERT_EQ(out.at("kept_positions").size(), 30U);
  for (const Json& layer : out.at("kept_positions")) {
    EXPECT_EQ(layer.get<std::vector<std::size_t>>(), expected);
  }
  EXPECT_EQ(out.at("rows"), Json(std::vector<std::size_t>(30, 30)));
  EXPECT_EQ(out.at("settings").at("kv_type"), "bf16");
  // 30 layers, 3 KV heads, K and V of 64 elements of 2 bytes
  EXPECT_EQ(out.at("kv_bytes_full"), tokens * 30 * 3 * 2 * 64 * 2);
  EXPECT_EQ(out.at("kv_bytes_kept"), 30 * 30 * 3 * 2 * 64 * 2);
}

TEST_F(ToolWithModel, CompressKvKeepsTheMeanAndTheWindow) {
  const Arguments common = {"--prompt",   long_text(),
                            "--question", "Who wrote into the book?",
                            "--heads",    calibration("_head_idx.json").string(),
                            "--method",   "compresskv",
                            "--positions"};
  const auto with = [&](const Arguments& more) {
    Arguments all = common;
    all.insert(all.end(), more.begin(), more.end());
    return run_tool(generate(all));
  };
  const Outcome uniform = with({"--ratio", "0.2"});
  ASSERT_EQ(uniform.code, 0) << uniform.err;
  const Json even = uniform.json();
  const auto tokens = even.at("prompt_tokens").get<std::size_t>();
  const auto mean = static_cast<std::size_t>(0.2 * static_cast<double>(tokens));
  EXPECT_EQ(even.at("rows"), Json(std::vector<std::size_t>(30, mean)));
  for (const Json& layer : even.at("kept_positions")) {
    const auto positions = layer.get<std::vector<std::size_t>>();
    for (std::size_t i = 0; i < 8; ++i) {
      EXPECT_EQ(positions[positions.size() - 1 - i], tokens - 1 - i);
    }
    EXPECT_TRUE(std::is_sorted(positions.begin(), positions.end()));
  }

  // The same from raw scores and in bytes: one row of all layers is 46,080 bytes in float32.
  const Outcome bytes =
      run_tool(generate({"--prompt", long_text(), "--question", "Who wrote into the book?", "--heads",
                         calibration("_head_scores.json").string(), "--method", "compresskv", "--positions",
                         "--bytes", std::to_string(mean * 46080 + 100)}));
  ASSERT_EQ(bytes.code, 0) << bytes.err;
  EXPECT_EQ(bytes.json().at("kept_positions"), even.at("kept_positions"));
  EXPECT_EQ(bytes.json().at("answer"), even.at("answer"));

  const Outcome by_error = with({"--ratio", "0.2", "--errors", calibration("_layer_score.jsonl").string()});
  ASSERT_EQ(by_error.code, 0) << by_error.err;
  const auto rows = by_error.json().at("rows").get<std::vector<std::size_t>>();
  EXPECT_EQ(std::accumulate(rows.begin(), rows.end(), std::size_t{0}), 30 * mean);
  EXPECT_NE(*std::max_element(rows.begin(), rows.end()), *std::min_element(rows.begin(), rows.end()));
}

TEST_F(ToolWithModel, BlendIsTheDefaultAndWantsRawScores) {
  const Arguments asked = {"--prompt", long_text(), "--ratio", "0.3"};
  const auto with = [&](const Arguments& more) {
    Arguments all = asked;
    all.insert(all.end(), more.begin(), more.end());
    return run_tool(generate(all));
  };
  const Outcome by_default = with({});
  ASSERT_EQ(by_default.code, 0) << by_default.err;
  EXPECT_EQ(by_default.json().at("settings").at("method"), "blend");
  const Outcome named = with({"--method", "blend", "--heads", calibration("_head_scores.json").string()});
  EXPECT_EQ(named.json().at("answer"), by_default.json().at("answer"));
  EXPECT_EQ(named.json().at("rows"), by_default.json().at("rows"));
  const Outcome ranking = with({"--heads", calibration("_head_idx.json").string()});
  EXPECT_EQ(ranking.code, 1);
  EXPECT_NE(ranking.err.find("is a head ranking, which has no scores: give the file of raw scores"),
            std::string::npos)
      << ranking.err;
}

TEST_F(ToolWithModel, ABudgetBelowTheWindowIsWrongUsage) {
  const Outcome outcome = run_tool(generate({"--prompt", "Hello", "--method", "streaming", "--rows", "5"}));
  EXPECT_EQ(outcome.code, 2);
  EXPECT_NE(outcome.err.find("budget is 5 rows a layer, the window alone is 8"), std::string::npos)
      << outcome.err;
}

TEST_F(ToolWithModel, ReadsThePromptInChunks) {
  const auto with = [&](const Arguments& more) {
    Arguments all = generate({"--prompt", long_text(), "--method", "streaming", "--rows", "40", "--positions",
                              "--kv-type", "f16"});
    all.insert(all.end(), more.begin(), more.end());
    return run_tool(all);
  };
  const Outcome whole = with({});
  ASSERT_EQ(whole.code, 0) << whole.err;
  const Json one_go = whole.json();
  EXPECT_EQ(one_go.at("settings").at("prefill_chunk"), Json());
  const Outcome in_chunks = with({"--prefill-chunk", "100"});
  ASSERT_EQ(in_chunks.code, 0) << in_chunks.err;
  const Json chunked = in_chunks.json();
  EXPECT_EQ(chunked.at("answer_token_ids"), one_go.at("answer_token_ids"));
  EXPECT_EQ(chunked.at("kept_positions"), one_go.at("kept_positions"));
  EXPECT_EQ(chunked.at("settings").at("prefill_chunk"), 100);
  EXPECT_EQ(chunked.at("settings").at("working_rows"), Json());

  const Outcome in_bounds = with({"--prefill-chunk", "100", "--working-rows", "50"});
  ASSERT_EQ(in_bounds.code, 0) << in_bounds.err;
  const Json bounded = in_bounds.json();
  EXPECT_EQ(bounded.at("rows"), Json(std::vector<std::size_t>(30, 40)));
  EXPECT_EQ(bounded.at("kept_positions"),
            one_go.at("kept_positions"));  // its first and last, whatever they say
  EXPECT_EQ(bounded.at("kv_bytes_peak"), (30 * 50 + 100) * 3 * 2 * 64 * 2);
  EXPECT_EQ(bounded.at("settings").at("working_rows"), 50);

  const Outcome too_few = with({"--prefill-chunk", "100", "--working-rows", "39"});
  EXPECT_EQ(too_few.code, 2);
  EXPECT_NE(too_few.err.find("--working-rows is 39, the budget is 40 rows a layer"), std::string::npos)
      << too_few.err;
}

TEST_F(ToolWithModel, HeadsOfAnotherModelAreRefused) {
  const Folder folder;
  const std::string heads =
      folder.write("two_layers.json", R"({"0": [0, 1, 2, 3], "1": [0, 1, 2, 3]})").string();
  const Outcome outcome =
      run_tool(generate({"--prompt", "Hello", "--ratio", "0.5", "--heads", heads, "--method", "compresskv"}));
  EXPECT_EQ(outcome.code, 1);
  EXPECT_NE(outcome.err.find("head ranking has 2 layers, the model has 30"), std::string::npos)
      << outcome.err;
}

TEST_F(ToolWithModel, RawTextIsFedAsItIs) {
  const std::string text = "<|im_start|>user\nSay hi.<|im_end|>\n";
  const Outcome outcome = run_tool(generate({"--prompt", text, "--raw", "--method", "full", "--positions"}));
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  const auto ids = outcome.json().at("prompt_token_ids").get<std::vector<engine::TokenId>>();
  EXPECT_EQ(model().tokenizer.decode(ids), text);
  EXPECT_EQ(ids.front(), model().tokenizer.find("<|im_start|>"));
}

TEST_F(ToolWithModel, SamplingRepeatsWithItsSeed) {
  const Arguments sampled = {"--prompt", "Tell me a story.", "--method", "full", "--temperature", "1.5",
                             "--seed"};
  const auto answer = [&](const char* seed) {
    Arguments all = sampled;
    all.emplace_back(seed);
    return run_tool(generate(all)).json().at("answer").get<std::string>();
  };
  const std::string first = answer("1");
  EXPECT_EQ(answer("1"), first);
  EXPECT_NE(answer("2"), first);
}

TEST_F(ToolWithModel, PromptBeyondTheContextIsAnError) {
  const Folder folder;
  std::string text;
  for (int i = 0; i < 9000; ++i) {
    text += "word ";
  }
  const std::string file = folder.write("long.txt", text).string();
  const Outcome outcome = run_tool(generate({"--prompt-file", file, "--method", "full"}));
  EXPECT_EQ(outcome.code, 1);
  EXPECT_NE(outcome.err.find("the model's context holds 8192"), std::string::npos) << outcome.err;
}

TEST_F(ToolWithModel, InspectShowsShapeAndSavings) {
  const Outcome outcome =
      run_tool({"inspect", model_path(), "--json", "--length", "1000", "--kv-type", "f16"});
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  const Json out = outcome.json();
  EXPECT_EQ(out.at("layers"), 30);
  EXPECT_EQ(out.at("query_heads"), 9);
  EXPECT_EQ(out.at("kv_heads"), 3);
  EXPECT_EQ(out.at("kv_bytes_per_token").at("f32"), 46080);
  EXPECT_EQ(out.at("kv_bytes_per_token").at("bf16"), 23040);
  ASSERT_EQ(out.at("savings").size(), 4U);
  EXPECT_EQ(out.at("savings").at(1).at("kept"), 0.12);
  EXPECT_EQ(out.at("savings").at(1).at("rows"), 120);
  EXPECT_EQ(out.at("savings").at(1).at("kv_bytes_kept"), 120 * 23040);

  const Outcome people = run_tool({"inspect", model_path()});
  EXPECT_EQ(people.code, 0);
  EXPECT_NE(people.out.find("Q4_1"), std::string::npos) << people.out;
  EXPECT_NE(people.out.find("chatml"), std::string::npos) << people.out;
}

TEST_F(ToolWithModel, DemoFindsTheCommittedCalibrationAndWritesItsFile) {
  const Folder folder;
  std::string book = long_text();
  book += "The keeper of the lamp is called Ottilie. ";
  const std::string text = folder.write("book.txt", book + long_text()).string();
  const Outcome outcome = run_tool({"demo", "--model", model_path(), "--prompt-file", text, "--question",
                                    "What is the keeper of the lamp called?", "--expect", "Ottilie",
                                    "--ratios", "0.25", "--json", folder.path("demo.json").string()});
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  const Json demo = Json::parse(read(folder.path("demo.json")));
  ASSERT_EQ(demo.at("runs").size(), 4U);
  EXPECT_EQ(demo.at("runs").at(0).at("method"), "full");
  EXPECT_EQ(demo.at("runs").at(1).at("method"), "blend");
  EXPECT_EQ(demo.at("runs").at(2).at("method"), "compresskv");
  EXPECT_EQ(demo.at("runs").at(3).at("method"), "streaming");
  for (const Json& run : demo.at("runs")) {
    EXPECT_EQ(run.at("kept_positions").size(), 30U);
  }
  EXPECT_EQ(std::count(outcome.out.begin(), outcome.out.end(), '\n'), 10) << outcome.out;
}

TEST_F(ToolWithModel, DemoWithoutCalibrationNamesCalibrate) {
  const Folder folder;
  expect_usage_error({"demo", "--model", model_path(), "--models-dir", folder.path("none").string()},
                     "ckv calibrate");
}

}  // namespace
}  // namespace ckv_test
