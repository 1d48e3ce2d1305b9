// ckv calibrate as its users meet it, on short prompts, and what it makes of its records.

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <compresskv/io/calibration_files.hpp>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <functional>
#include <map>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "ckv/calibration_jobs.hpp"
#include "ckv/calibration_results.hpp"
#include "ckv/needle.hpp"
#include "engine/error.hpp"
#include "message_of.hpp"
#include "model_fixture.hpp"
#include "tool.hpp"

namespace ckv_test {
namespace {

using compresskv::test::message_of;

// ---- what records say together
// -----------------------------------------------------------------------------------

compresskv::HeadScores scores_of(std::size_t layers, std::size_t heads, const std::vector<double>& means) {
  std::vector<std::vector<double>> runs;
  for (const double mean : means) {
    runs.push_back({mean});
  }
  return {layers, heads, std::move(runs)};
}

TEST(CalibrationResults, TopOverlapIsTheShareThatBothRankingsHave) {
  const compresskv::HeadRanking a{{{0, 1, 2, 3, 4}, {4, 3, 2, 1, 0}}};
  const compresskv::HeadRanking b{{{1, 0, 4, 3, 2}, {3, 4, 1, 2, 0}}};
  EXPECT_EQ(ckv::top_overlap(a, b, 2), 1.0);
  EXPECT_EQ(ckv::top_overlap(a, b, 1), 0.0);
  EXPECT_EQ(ckv::top_overlap(a, b, 3), 0.5 * (2.0 / 3.0 + 2.0 / 3.0));
  EXPECT_EQ(ckv::top_overlap(a, b, 4), 0.5 * (3.0 / 4.0 + 1.0));
  EXPECT_EQ(ckv::top_overlap(a, b, 9), 1.0);
}

TEST(CalibrationResults, RankCorrelationLooksAtTheOrderOfAllHeads) {
  const auto a = scores_of(2, 2, {0.0, 1.0, 2.0, 30.0});
  EXPECT_DOUBLE_EQ(ckv::rank_correlation(a, a), 1.0);
  EXPECT_DOUBLE_EQ(ckv::rank_correlation(a, scores_of(2, 2, {9.0, 8.0, -1.0, -2.0})), -1.0);
  // Ranks 0 1 2 3 and 1 0 2 3: 1 - 6 * 2 / (4 * 15).
  EXPECT_DOUBLE_EQ(ckv::rank_correlation(a, scores_of(2, 2, {2.0, 1.0, 3.0, 4.0})), 0.8);
  // Ties share a rank: 0 1 2 3 and 0.5 0.5 2.5 2.5 have the covariance 4 and the squares 5 and 4.
  EXPECT_DOUBLE_EQ(ckv::rank_correlation(a, scores_of(2, 2, {0.0, 0.0, 1.0, 1.0})), 4.0 / std::sqrt(20.0));
  EXPECT_EQ(ckv::rank_correlation(a, scores_of(2, 2, {1.0, 1.0, 1.0, 1.0})), 0.0);
}

TEST(CalibrationResults, BestHeadsAreThoseOfTheWholeModel) {
  using Heads = std::vector<engine::HeadIndex>;
  EXPECT_EQ(ckv::best_heads(scores_of(2, 2, {0.5, 2.0, 3.0, 0.5})), (Heads{{1, 0}, {0, 1}, {0, 0}, {1, 1}}));
}

TEST(CalibrationResults, StabilityComparesHalvesAndGrowingParts) {
  using compresskv::calibrate::HeadScoreKind;
  compresskv::calibrate::HeadScoreAccumulator scores{1, 6};
  const std::vector<double> up = {0, 1, 2, 3, 4, 5};
  const std::vector<double> down = {5, 4, 3, 2, 1, 0};
  EXPECT_EQ(ckv::stability_json(scores, HeadScoreKind::classic), nullptr);
  for (const std::size_t even : {0U, 2U, 4U}) {
    scores.add_run(
        {.run = even, .counted = true, .once_per_occurrence = up, .once_per_step = up, .classic = up});
  }
  EXPECT_EQ(ckv::stability_json(scores, HeadScoreKind::classic), nullptr);
  scores.add_run(
      {.run = 3, .counted = true, .once_per_occurrence = up, .once_per_step = up, .classic = down});
  scores.add_run({.run = 5});
  const auto same = ckv::stability_json(scores, HeadScoreKind::once_per_occurrence);
  EXPECT_EQ(same.at("halves").at("prompts"), (std::vector<int>{3, 1}));
  EXPECT_EQ(same.at("halves").at("top4_overlap"), 1.0);
  EXPECT_EQ(same.at("halves").at("rank_correlation"), 1.0);
  const auto other = ckv::stability_json(scores, HeadScoreKind::classic);
  EXPECT_EQ(other.at("halves").at("top4_overlap"), 0.5);
  EXPECT_EQ(other.at("halves").at("rank_correlation"), -1.0);
  ASSERT_EQ(other.at("by_prompts").size(), 2U);
  EXPECT_EQ(other.at("by_prompts").at(1).at("prompts"), 2);
}

TEST(CalibrationResults, MasksHoldTheBestHeadsAndRandomOnes) {
  const auto srh = scores_of(2, 10, {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19});
  const auto classic = scores_of(2, 10, {9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0});
  const std::vector<std::size_t> counts = {1, 3};
  const auto masks = ckv::head_masks(srh, classic, counts, 2);
  ASSERT_EQ(masks.size(), 1U + 2U * 4U);
  EXPECT_TRUE(masks[0].masked.empty());
  EXPECT_EQ(masks[5].masked, (std::vector<engine::HeadIndex>{{1, 9}, {1, 8}, {1, 7}}));
  EXPECT_EQ(masks[6].masked, (std::vector<engine::HeadIndex>{{0, 0}, {0, 1}, {0, 2}}));
  for (const std::size_t draw : {0U, 1U}) {
    const auto& one = masks[3 + draw];
    const auto& three = masks[7 + draw];
    EXPECT_EQ(three.draw, draw);
    EXPECT_EQ(three.heads, "random");
    EXPECT_EQ(one.masked.at(0), three.masked.at(0));
    EXPECT_EQ(std::set(three.masked.begin(), three.masked.end()).size(), 3U);
  }
  EXPECT_NE(masks[7].masked, masks[8].masked);
}

// ---- processes
// -----------------------------------------------------------------------------------------------------

TEST(CalibrationJobs, RecordsComeInTheOrderOfTheTasks) {
  for (const std::size_t jobs : {1U, 3U, 20U}) {
    std::vector<std::string> seen;
    ckv::share_out(
        8, jobs,
        [] {
          return [](std::size_t task, const ckv::Take& hand_on) {
            std::this_thread::sleep_for(std::chrono::milliseconds(task % 3 * 10));
            for (std::size_t part = 0; part < task % 3; ++part) {
              // More than a pipe holds.
              hand_on({{"task", task}, {"part", part}, {"long", std::string(100'000, 'x')}});
            }
          };
        },
        [&](const ckv::Json& record) {
          EXPECT_EQ(record.at("long").get<std::string>().size(), 100'000U);
          seen.push_back(record.at("task").dump() + "." + record.at("part").dump());
        },
        [&](std::size_t task) { seen.push_back(std::to_string(task)); });
    EXPECT_EQ(seen, (std::vector<std::string>{"0", "1.0", "1", "2.0", "2.1", "2", "3", "4.0", "4", "5.0",
                                              "5.1", "5", "6", "7.0", "7"}));
  }
}

TEST(CalibrationJobs, WhatFailsThereIsSaidHere) {
  const auto message = [](const std::function<void(std::size_t)>& fails) {
    std::size_t taken = 0;
    const std::string said = message_of<engine::Error>([&] {
      ckv::share_out(
          4, 2,
          [&] {
            return [&](std::size_t task, const ckv::Take& hand_on) {
              if (task == 3) {
                fails(task);
              }
              hand_on({{"task", task}});
            };
          },
          [&](const ckv::Json&) { ++taken; }, [](std::size_t) {});
    });
    EXPECT_EQ(taken, 3U);
    return said;
  };
  EXPECT_EQ(message([](std::size_t task) { throw std::runtime_error("no task " + std::to_string(task)); }),
            "no task 3");
  EXPECT_NE(message([](std::size_t) { raise(SIGKILL); }).find("ended before its work was done"),
            std::string::npos);
}

// ---- own needles
// ---------------------------------------------------------------------------------------------------

TEST(OwnNeedles, AreReadLineByLine) {
  const Folder folder;
  const auto path = folder.write("needles.jsonl",
                                 "{\"fact\": \"A cat.\", \"question\": \"What?\"}\n\n"
                                 "{\"question\": \"Who?\", \"fact\": \"Number 7.\", \"by\": \"me\"}");
  const auto needles = ckv::read_needles(path);
  ASSERT_EQ(needles.size(), 2U);
  EXPECT_EQ(needles[0].fact, "A cat.");
  EXPECT_EQ(needles[1].fact, "Number 7.");
  EXPECT_EQ(needles[1].question, "Who?");
}

TEST(OwnNeedles, ABadLineIsNamed) {
  const Folder folder;
  const std::string good = "{\"fact\": \"A cat.\", \"question\": \"What?\"}\n";
  const auto message = [&](const std::string& text) {
    const auto path = folder.write("needles.jsonl", text);
    return message_of<engine::Error>([&] { ckv::read_needles(path); });
  };
  const std::map<std::string, std::string> bad = {
      {"a cat", "not valid JSON, "},
      {R"({"fact": "A cat.", "question": "What?"} x)", "not valid JSON, "},
      {R"({"fact": "A cat.", "fact": "A dog.", "question": "What?"})", "key \"fact\" stands twice"},
      {std::string(R"({"fact": "A cat.", "question": "What?"})") + std::string(1, char{}) + "{}",
       "holds a NUL byte"},
      {"[1]", "no JSON object"},
      {R"({"fact": "A cat."})", "\"question\" is absent"},
      {R"({"fact": 7, "question": "What?"})", "\"fact\" is no text"},
      {R"({"fact": "...", "question": "What?"})", "\"fact\" has no word"},
      {R"({"fact": "A cat.", "question": " "})", "\"question\" is empty"}};
  for (const auto& [line, what] : bad) {
    const std::string said = message(good + "\n" + line + "\n" + good);
    EXPECT_NE(said.find("needles.jsonl' line 3: " + what), std::string::npos) << said;
  }
  EXPECT_NE(message("\n").find("holds no needle"), std::string::npos) << message("\n");
  EXPECT_NE(message_of<compresskv::FileError>([&] {
              ckv::read_needles(folder.path("none.jsonl"));
            }).find("none.jsonl"),
            std::string::npos);
}

// ---- with the real model
// --------------------------------------------------------------------------------------------

TEST(Calibrate, WrongUsageIsExitCode2) {
  const auto with = [](const Arguments& more) {
    Arguments all = {"calibrate", "--model", "m.gguf", "--out", "/tmp/none"};
    all.insert(all.end(), more.begin(), more.end());
    return all;
  };
  expect_usage_error({"calibrate", "--model", "m.gguf"}, "--out");
  expect_usage_error(with({"--needles", "7"}), "--needles is 7, there are 6");
  expect_usage_error(with({"--jobs", "0"}), "--jobs");
  expect_usage_error(with({"--ablate", "0"}), "--ablate");
  expect_usage_error(with({"--ablate-prompts", "3"}), "--ablate-prompts requires --ablate");
  expect_usage_error(with({"--counting", "twice"}), "twice");
}

class CalibrateWithModel : public RealModel {
 protected:
  void SetUp() override {
    RealModel::SetUp();
    std::string haystack;
    for (int i = 0; i < 300; ++i) {
      haystack += "The farmer counted " + std::to_string(i) + " sheep on the hill and went home for supper. ";
    }
    haystack_ = folder_.write("hay.txt", haystack).string();
  }

  std::filesystem::path path(const char* name) const { return folder_.path(name); }

  /// `more` comes on top of a small grid, or in place of its options.
  Arguments calibrate(const char* out, const std::map<std::string, std::string>& more = {}) const {
    std::map<std::string, std::string> options = {{"--model", model_path()}, {"--out", path(out).string()},
                                                  {"--name", "tiny"},        {"--lengths", "120"},
                                                  {"--depths", "1"},         {"--needles", "2"},
                                                  {"--haystack", haystack_}, {"--texts", "1"},
                                                  {"--max-new-tokens", "20"}};
    for (const auto& [option, value] : more) {
      options[option] = value;
    }
    Arguments all = {"calibrate"};
    for (const auto& [option, value] : options) {
      all.push_back(option);
      if (!value.empty()) {
        all.push_back(value);
      }
    }
    return all;
  }

  static Outcome run_well(const Arguments& arguments) {
    Outcome outcome = run_tool(arguments);
    EXPECT_EQ(outcome.code, 0) << outcome.err;
    return outcome;
  }

  Folder folder_;
  std::string haystack_;
};

const std::set<std::string> all_files = {"tiny_head_idx.json",       "tiny_head_scores.json",
                                         "tiny_classic_scores.json", "tiny_layer_score.jsonl",
                                         "calibration.json",         "records.jsonl"};

std::map<std::string, std::string> files_of(const std::filesystem::path& folder) {
  std::map<std::string, std::string> files;
  for (const auto& entry : std::filesystem::directory_iterator{folder}) {
    files[entry.path().filename().string()] = read(entry.path());
  }
  return files;
}

/// Everything at once, in one process; cut and gone on with; in two.
TEST_F(CalibrateWithModel, ResumedAndSharedRunsAreTheSameToTheByte) {
  const std::map<std::string, std::string> everything = {
      {"--curves", ""}, {"--ablate", "2"}, {"--ablate-length", "120"}, {"--ablate-prompts", "1"}};
  const Outcome whole = run_well(calibrate("whole", everything));
  EXPECT_EQ(whole.err, "");
  const auto expected = files_of(path("whole"));
  std::set<std::string> names;
  for (const auto& [name, text] : expected) {
    names.insert(name);
  }
  EXPECT_EQ(names, all_files);
  expect_narrow_output(calibrate("whole", everything), "tokens");  // all is measured: it is said again

  const auto ranking = compresskv::io::load_head_ranking(path("whole") / "tiny_head_idx.json");
  EXPECT_NO_THROW(ranking.validate(30, 9));
  const auto classic = compresskv::io::load_head_scores(path("whole") / "tiny_classic_scores.json");
  EXPECT_EQ(classic.layers(), 30U);
  const auto errors = compresskv::io::load_layer_errors(path("whole") / "tiny_layer_score.jsonl");
  ASSERT_EQ(errors.data_sets().size(), 2U);
  EXPECT_EQ(errors.data_sets()[0].name, "needle_120");
  EXPECT_EQ(errors.data_sets()[1].name, "text_120");

  const Json told = Json::parse(expected.at("calibration.json"));
  EXPECT_EQ(told.at("model_sha256").get<std::string>().size(), 64U);
  ASSERT_EQ(told.at("runs").size(), 2U);
  EXPECT_EQ(told.at("runs").at(1).at("counted"), true) << told.at("runs");
  EXPECT_EQ(told.at("stability").at("halves").at("prompts"), (std::vector<int>{1, 1}));
  const Json& curves = told.at("curves");
  EXPECT_EQ(curves.at("rows"), (std::vector<int>{16, 32, 64, 120}));
  for (std::size_t layer = 0; layer < 30; ++layer) {
    EXPECT_GT(curves.at("errors").at(0).at(layer), curves.at("errors").at(2).at(layer)) << layer;
    EXPECT_EQ(curves.at("errors").at(3).at(layer), 0.0) << layer;  // all is kept
  }
  std::map<std::string, double> right;
  for (const Json& row : told.at("ablation")) {
    EXPECT_EQ(row.at("prompts"), 1);
    if (row.at("masked") == 0) {
      EXPECT_EQ(row.at("right"), 1.0);
    } else {
      EXPECT_EQ(row.at("masked"), 2);
      right[row.at("heads")] = row.at("right");
    }
  }
  EXPECT_EQ(right.size(), 3U);

  const Outcome shared = run_well(calibrate("shared", [&] {
    auto all = everything;
    all["--jobs"] = "2";
    all["--threads"] = "2";
    return all;
  }()));
  EXPECT_EQ(files_of(path("shared")), expected);
  EXPECT_EQ(shared.out.substr(0, shared.out.find("written to")),
            whole.out.substr(0, whole.out.find("written to")));

  // Killed while a line of the layer errors was written.
  std::filesystem::create_directory(path("torn"));
  const std::string& records = expected.at("records.jsonl");
  folder_.write("torn/records.jsonl", records.substr(0, records.find("text_120") + 30));
  const Outcome resumed = run_well(calibrate("torn", everything));
  EXPECT_EQ(resumed.err,
            "ckv: going on: 2 of 2 prompts are done for the heads, 2 of 3 for the layer errors, 0 of 1 for "
            "the masks\n");
  EXPECT_EQ(files_of(path("torn")), expected);

  // Nothing is left to do.
  const Outcome again = run_well(calibrate("torn", everything));
  EXPECT_EQ(again.err, "");
  EXPECT_EQ(files_of(path("torn")), expected);
}

TEST_F(CalibrateWithModel, OtherRecordsAreRefused) {
  const auto write_run = [](Json record) { return record.dump() + "\n"; };
  std::filesystem::create_directory(path("out"));
  const std::map<std::string, std::string> same = {{"--needles", "1"}, {"--max-new-tokens", "1"}};
  run_tool(calibrate("out", same));  // too short to answer: what is measured is no more than the heads
  const std::string text = read(path("out") / "records.jsonl");
  const std::string header = text.substr(0, text.find('\n') + 1);
  const auto refused = [&](const std::string& records, const std::map<std::string, std::string>& more,
                           const std::string& message) {
    folder_.write("out/records.jsonl", records);
    expect_failure(calibrate("out", more), message);
    EXPECT_EQ(read(path("out") / "records.jsonl"), records);
  };
  refused(text, {{"--max-new-tokens", "1"}},
          "records.jsonl' holds records of other runs: settings.needles is 1 there and 2 here");
  std::string other = text;
  other.replace(other.find("\"model_sha256\":\"") + 16, 4, "0000");
  refused(other, same, "holds records of other runs: model_sha256 is \"0000");
  refused("some text\n", same, "line 1 is no record: it is not from `ckv calibrate`");
  refused(header + write_run({{"kind", "sums"}, {"run", 0}}), same,
          "line 2 is no record: it is not from `ckv calibrate`; give another file (its kind is \"sums\")");
  const std::vector<double> scores(269);
  refused(header + write_run({{"kind", "heads"},
                              {"run", 0},
                              {"counted", true},
                              {"once_per_occurrence", scores},
                              {"once_per_step", scores},
                              {"classic", scores}}),
          same, "run 0 has 269 scores, must have 270");
}

// Stopped in the middle, by Ctrl-C, SIGTERM and without a chance to tidy up: no result and no process, whole
// records; the next run goes on at once. While a run has the folder, another is refused.
TEST_F(CalibrateWithModel, StoppedRunsEndAllProcessesAndTheNextGoesOn) {
  const Arguments arguments = calibrate("out", {{"--depths", "3"}, {"--texts", "0"}, {"--jobs", "2"}});
  const std::string err = path("err").string();
  const auto records = [&] {
    const std::string text = read(path("out") / "records.jsonl");
    EXPECT_TRUE(text.empty() || text.back() == '\n');
    return std::count(text.begin(), text.end(), '\n');
  };
  const auto stopped_by = [&](int signal, std::ptrdiff_t after) {
    const pid_t child = fork();
    if (child == 0) {
      setpgid(0, 0);
      std::vector<char*> words = {const_cast<char*>("ckv")};
      for (const std::string& argument : arguments) {
        words.push_back(const_cast<char*>(argument.c_str()));
      }
      words.push_back(nullptr);
      if (std::freopen(err.c_str(), "w", stderr) != nullptr) {
        execv(COMPRESSKV_CKV_BINARY, words.data());
      }
      _exit(99);
    }
    for (int i = 0; i < 1200 && records() < after; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
    }
    if (signal == SIGINT) {
      expect_failure(arguments,
                     "another run is writing to '" + (path("out") / "records.jsonl").string() + "'");
    }
    kill(child, signal);
    int status = 0;
    waitpid(child, &status, 0);
    if (signal != SIGKILL) {  // else the system buries them, and the next run finds that they are gone
      EXPECT_EQ(kill(-child, 0), -1);
      EXPECT_EQ(errno, ESRCH);
    }
    EXPECT_EQ(files_of(path("out")).size(), 1U);
    EXPECT_GE(records(), after);
    return status;
  };
  const int interrupted = stopped_by(SIGINT, 2);
  EXPECT_TRUE(WIFEXITED(interrupted));
  EXPECT_EQ(WEXITSTATUS(interrupted), 130);
  EXPECT_NE(read(err).find("interrupted"), std::string::npos) << read(err);
  const int terminated = stopped_by(SIGTERM, records() + 1);
  EXPECT_TRUE(WIFEXITED(terminated));
  EXPECT_EQ(WEXITSTATUS(terminated), 143);
  EXPECT_TRUE(WIFSIGNALED(stopped_by(SIGKILL, records() + 1)));

  const Outcome resumed = run_well(arguments);
  EXPECT_NE(resumed.err.find("going on: "), std::string::npos) << resumed.err;
  EXPECT_NE(resumed.err.find(" of 6 prompts are done for the heads"), std::string::npos) << resumed.err;
  EXPECT_EQ(records(), 1 + 6 + 6);
}

TEST_F(CalibrateWithModel, FilesThatAreNoneEndItSoon) {
  for (const char* option : {"--haystack", "--needle-file"}) {
    expect_refused(calibrate("out", {{option, "/dev/zero"}}), {"/dev/zero", "is a device: give "});
    expect_refused(calibrate("out", {{option, path("none").string()}}),
                   {path("none").string(), "o such file"});
  }
  expect_failure(calibrate("out", {{"--out", "/dev/full"}}), "cannot make the folder '/dev/full'");
  expect_usage_error(calibrate("out", {{"--name", "no/name"}}), "--name is 'no/name'");
  std::filesystem::create_directory(path("out"));
  std::filesystem::create_symlink("/dev/full", path("out") / "records.jsonl");
  expect_failure(calibrate("out"), "records.jsonl', it is a device, a pipe or a socket");
}

TEST_F(CalibrateWithModel, DoubledRecordsAreRefused) {
  std::filesystem::create_directory(path("out"));
  run_tool(calibrate("out", {{"--needles", "1"}, {"--max-new-tokens", "1"}}));
  const std::string text = read(path("out") / "records.jsonl");
  const std::string last = text.substr(text.rfind('\n', text.size() - 2) + 1);
  folder_.write("out/records.jsonl", text + last);
  expect_failure(calibrate("out", {{"--needles", "1"}, {"--max-new-tokens", "1"}}),
                 " are both the record {\"kind\":\"");
}

/// Statistics are added to a folder that was made without them; generate and evaluate find them there.
TEST_F(CalibrateWithModel, StatisticsOfQueriesAreAddedLaterAndFound) {
  const std::filesystem::path folder = path("models") / "tiny";
  const auto with = [&](std::map<std::string, std::string> more) {
    more["--texts"] = "0";
    return calibrate("models/tiny", more);
  };
  run_well(with({}));
  const auto before = files_of(folder);
  EXPECT_FALSE(before.contains("tiny_query_statistics.bin"));
  const Outcome outcome = run_well(with({{"--statistics", ""}, {"--jobs", "2"}}));
  EXPECT_NE(outcome.out.find("_query_statistics.bin"), std::string::npos) << outcome.out;
  auto after = files_of(folder);
  for (const char* same : {"tiny_head_idx.json", "tiny_layer_score.jsonl", "records.jsonl"}) {
    EXPECT_EQ(after.at(same), before.at(same)) << same;
  }
  const compresskv::ModelShape shape = ckv::shape_of_file(ckv::small_engine, model_path());
  const compresskv::QueryStatistics statistics =
      compresskv::io::load_query_statistics(folder / "tiny_query_statistics.bin", shape);
  EXPECT_EQ(statistics.rotary().pairing, compresskv::RotaryPairing::interleaved);
  EXPECT_EQ(statistics.rotary().base, model().model.config().rope_base);
  const Json told = Json::parse(after.at("calibration.json")).at("query_statistics");
  EXPECT_EQ(told.at("queries"), statistics.head(3, 5).count);
  EXPECT_GT(statistics.head(3, 5).count, 4U * 100U);
  EXPECT_LT(told.at("rotary_contradiction").get<double>(), 1e-3);
  EXPECT_GT(told.at("rotary_contradiction").get<double>(), 0.0) << "equal tokens were held beside each other";

  const auto generate = [&](const Arguments& more) {
    Arguments all = {"generate", "--model",     model_path(),
                     "--json",   "--positions", "--max-new-tokens",
                     "4",        "--prompt",    read(haystack_).substr(0, 900),
                     "--rows",   "40"};
    all.insert(all.end(), more.begin(), more.end());
    return run_well(all).json();
  };
  const std::string file = (folder / "tiny_query_statistics.bin").string();
  for (const std::string method :
       {"expected-attention", "expected-attention-adaptive", "q-filter", "triattention"}) {
    const Json found = generate({"--method", method, "--models-dir", path("models").string()});
    EXPECT_EQ(found.at("settings").at("statistics"), file) << method;
    EXPECT_EQ(found.at("kept_positions"),
              generate({"--method", method, "--statistics", file}).at("kept_positions"))
        << method;
  }
}

/// So are scores of KV heads, which the best keep all rows by.
TEST_F(CalibrateWithModel, ScoresOfKvHeadsAreAddedLaterAndFound) {
  const std::filesystem::path folder = path("models") / "tiny";
  const Outcome outcome = run_well(calibrate("models/tiny", {{"--texts", "0"}, {"--kv-heads", ""}}));
  EXPECT_NE(outcome.out.find("_kv_head_scores.json"), std::string::npos) << outcome.out;
  const compresskv::ModelShape shape = ckv::shape_of_file(ckv::small_engine, model_path());
  const std::string file = (folder / "tiny_kv_head_scores.json").string();
  const compresskv::HeadScores scores = compresskv::io::load_head_scores(file);
  EXPECT_EQ(scores.layers(), shape.layers);
  ASSERT_EQ(scores.heads(), shape.kv_heads);
  double best = 0.0;
  for (std::size_t layer = 0; layer < shape.layers; ++layer) {
    for (std::size_t head = 0; head < shape.kv_heads; ++head) {
      EXPECT_EQ(scores.runs(layer, head).size(), 4U);
      EXPECT_GT(scores.mean(layer, head), 0.0);
      best = std::max(best, scores.mean(layer, head));
    }
  }
  EXPECT_GT(best, 0.5) << "some head copies";
  EXPECT_LE(best, 1.0);
  const auto told = Json::parse(read(folder / "calibration.json")).at("kv_heads");
  EXPECT_EQ(told.at("texts"), 4);

  const auto generate = [&](const Arguments& more) {
    Arguments all = {"generate",   "--model",     model_path(),
                     "--json",     "--positions", "--max-new-tokens",
                     "4",          "--prompt",    read(haystack_).substr(0, 900),
                     "--rows",     "60",          "--method",
                     "kvzip-heads"};
    all.insert(all.end(), more.begin(), more.end());
    return run_well(all).json();
  };
  const Json found = generate({"--models-dir", path("models").string()});
  EXPECT_EQ(found.at("settings").at("kv_heads"), file);
  EXPECT_EQ(found.at("kept_positions"), generate({"--kv-heads", file}).at("kept_positions"));
}

/// A surrogate is added to a folder that was made without it; generate finds it there.
TEST_F(CalibrateWithModel, ASurrogateIsAddedLaterAndFound) {
  const std::filesystem::path folder = path("models") / "tiny";
  const Outcome outcome = run_well(calibrate("models/tiny", {{"--texts", "0"}, {"--surrogate", ""}}));
  EXPECT_NE(outcome.out.find("_surrogate.bin"), std::string::npos) << outcome.out;
  EXPECT_NE(outcome.out.find("surrogate from "), std::string::npos) << outcome.out;
  const compresskv::ModelShape shape = ckv::shape_of_file(ckv::small_engine, model_path());
  const std::string file = (folder / "tiny_surrogate.bin").string();
  const compresskv::Surrogate surrogate = compresskv::io::load_surrogate(file, shape);
  EXPECT_EQ(surrogate.hidden_size(), static_cast<std::size_t>(model().model.config().embedding));
  const Json told = Json::parse(files_of(folder).at("calibration.json")).at("surrogate");
  EXPECT_EQ(told.at("explained").size(), shape.layers);
  EXPECT_GT(told.at("tokens").get<std::size_t>(), told.at("held_out").get<std::size_t>());

  const auto generate = [&](const Arguments& more) {
    Arguments all = {"generate",
                     "--model",
                     model_path(),
                     "--json",
                     "--positions",
                     "--max-new-tokens",
                     "4",
                     "--prompt",
                     read(haystack_).substr(0, 900),
                     "--method",
                     "kvzap",
                     "--models-dir",
                     path("models").string()};
    all.insert(all.end(), more.begin(), more.end());
    return run_well(all).json();
  };
  const Json budget = generate({"--rows", "40"});
  EXPECT_EQ(budget.at("settings").at("surrogate"), file);
  EXPECT_EQ(budget.at("settings").at("window"), 8);
  EXPECT_TRUE(budget.at("settings").at("threshold").is_null());
  EXPECT_EQ(budget.at("kept_positions"),
            generate({"--rows", "40", "--surrogate", file}).at("kept_positions"));
  EXPECT_EQ(budget.at("kept_positions"),
            generate({"--rows", "40", "--prefill-chunk", "50"}).at("kept_positions"));
  // All above a threshold that is below any score; of one above any the window and the first tokens.
  const Json all = generate({"--threshold", "-1000000"});
  EXPECT_EQ(all.at("kv_bytes_kept"), all.at("kv_bytes_full"));
  const Json window = generate({"--threshold", "1000000", "--window", "20"});
  EXPECT_EQ(window.at("kept_positions").at(0).at(0).size(), 24U) << "and the sinks";
  EXPECT_EQ(window.at("settings").at("threshold"), 1e6);
  EXPECT_EQ(generate({"--threshold", "1000000"}).at("settings").at("window"), 128);
  // A token is judged once: read in chunks, of which each is compressed, the same stays of the first layer,
  // whose hidden states do not know of other tokens.
  double middle = 0.0;  // a threshold between the scores
  for (std::size_t head = 0; head < shape.kv_heads; ++head) {
    middle += static_cast<double>(surrogate.bias(0, head)) / static_cast<double>(shape.kv_heads);
  }
  const std::string threshold = std::to_string(middle);
  EXPECT_EQ(generate({"--threshold", threshold, "--window", "20"}).at("kept_positions").at(0),
            generate({"--threshold", threshold, "--window", "20", "--prefill-chunk", "30", "--working-rows",
                      "1000"})
                .at("kept_positions")
                .at(0));
  expect_usage_error({"generate", "--model", model_path(), "--prompt", "x", "--method", "kvzap",
                      "--models-dir", path("models").string()},
                     "needs a budget: give one of --rows, --ratio and --bytes, or --threshold");
}

// Its files are those that generate takes, and another model's are refused by layer and head.
TEST_F(CalibrateWithModel, OwnNeedlesMakeFilesThatGenerateReads) {
  const std::string needles =
      folder_
          .write("needles.jsonl", R"({"fact": "The best cheese of Orlen is made from oat milk.", )"
                                  R"("question": "From what is the best cheese of Orlen made?"})"
                                  "\n")
          .string();
  const Outcome outcome =
      run_well(calibrate("out", {{"--needle-file", needles}, {"--needles", "1"}, {"--counting", "step"}}));
  EXPECT_NE(outcome.out.find("too few prompts counted"), std::string::npos) << outcome.out;
  const Json told = Json::parse(read(path("out") / "calibration.json"));
  EXPECT_EQ(told.at("needles").size(), 1U);
  EXPECT_EQ(told.at("stability"), Json());
  EXPECT_FALSE(told.contains("curves"));
  EXPECT_FALSE(told.contains("ablation"));

  const auto generate = [&](const std::filesystem::path& heads) {
    return run_tool({"generate", "--model", model_path(), "--json", "--max-new-tokens", "4", "--prompt",
                     read(haystack_).substr(0, 900), "--rows", "40", "--method", "compresskv", "--heads",
                     heads.string(), "--errors", (path("out") / "tiny_layer_score.jsonl").string()});
  };
  const Outcome answer = generate(path("out") / "tiny_head_idx.json");
  EXPECT_EQ(answer.code, 0) << answer.err;
  Json other = Json::parse(read(path("out") / "tiny_head_idx.json"));
  other.at("3").at(0) = 9;
  const Outcome refused = generate(folder_.write("other.json", other.dump()));
  EXPECT_EQ(refused.code, 1);
  EXPECT_NE(refused.err.find("other.json: head ranking of layer 3 names head 9, the model has heads 0 to 8"),
            std::string::npos)
      << refused.err;
}

}  // namespace
}  // namespace ckv_test
