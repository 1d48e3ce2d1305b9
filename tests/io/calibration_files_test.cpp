#include "compresskv/io/calibration_files.hpp"

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <numeric>
#include <random>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "message_of.hpp"

namespace {

namespace fs = std::filesystem;
using compresskv::FileError;
using compresskv::HeadRanking;
using compresskv::HeadScores;
using compresskv::LayerErrors;
using compresskv::ModelShape;
using compresskv::test::message_of;
using namespace compresskv::io;

std::vector<double> copy(std::span<const double> values) { return {values.begin(), values.end()}; }

std::string read(const fs::path& file) {
  std::ifstream stream(file, std::ios::binary);
  return {std::istreambuf_iterator<char>(stream), {}};
}

/// A folder of its own for each test, removed afterwards.
class CalibrationFiles : public testing::Test {
 protected:
  CalibrationFiles()
      : folder_(fs::path(testing::TempDir()) / ("ckv-io-" + std::to_string(std::random_device{}()))) {
    fs::create_directories(folder_);
  }
  ~CalibrationFiles() override { fs::remove_all(folder_); }
  CalibrationFiles(const CalibrationFiles&) = delete;
  CalibrationFiles& operator=(const CalibrationFiles&) = delete;

  fs::path path(const std::string& name = "file.json") const { return folder_ / name; }

  fs::path write(const std::string& text) const {
    std::ofstream(path(), std::ios::binary) << text;
    return path();
  }

  /// The message of the FileError, without the file's name in front.
  template <class Load>
  std::string rejection(const Load& load, const std::string& text) const {
    const fs::path file = write(text);
    const std::string message = message_of<FileError>([&] { load(file); });
    const std::string name = file.string() + ": ";
    return message.starts_with(name) ? message.substr(name.size()) : "(not named) " + message;
  }
  std::string ranking_rejection(const std::string& text) const {
    return rejection([](const fs::path& file) { load_head_ranking(file); }, text);
  }
  std::string scores_rejection(const std::string& text) const {
    return rejection([](const fs::path& file) { load_head_scores(file); }, text);
  }
  std::string errors_rejection(const std::string& text) const {
    return rejection([](const fs::path& file) { load_layer_errors(file); }, text);
  }

  std::size_t files_in_folder() const {
    return static_cast<std::size_t>(std::distance(fs::directory_iterator(folder_), fs::directory_iterator()));
  }

 private:
  fs::path folder_;
};

// ---- what every loader rejects
// -------------------------------------------------------------------------------------

TEST_F(CalibrationFiles, RejectsWhatIsNoFile) {
  const fs::path absent = path("absent.json");
  EXPECT_EQ(message_of<FileError>([&] { load_head_ranking(absent); }),
            absent.string() + ": no such file: check the path");
  EXPECT_EQ(message_of<FileError>([&] { load_head_scores(absent); }),
            absent.string() + ": no such file: check the path");
  EXPECT_EQ(message_of<FileError>([&] { load_layer_errors(absent); }),
            absent.string() + ": no such file: check the path");
  const fs::path folder = absent.parent_path();
  EXPECT_EQ(message_of<FileError>([&] { load_head_ranking(folder); }),
            folder.string() + ": is a folder: give the path of the file in it");
}

TEST_F(CalibrationFiles, RejectsWhatIsOfAnotherModel) {
  const ModelShape shape{.layers = 2, .query_heads = 4, .kv_heads = 2, .head_dim = 8};
  const auto ranking = [&](const fs::path& file) { load_head_ranking(file, shape); };
  const auto scores = [&](const fs::path& file) { load_head_scores(file, shape); };
  const auto errors = [&](const fs::path& file) { load_layer_errors(file, shape); };
  EXPECT_EQ(
      rejection(ranking, R"({"0": [1, 0], "1": [3, 4]})"),
      "head ranking of layer 1 names head 4, the model has heads 0 to 3: use the ranking calibrated for this "
      "model");
  EXPECT_EQ(rejection(ranking, R"({"0": [1, 0]})"),
            "head ranking has 1 layers, the model has 2: use the ranking calibrated for this model");
  EXPECT_EQ(rejection(scores, R"({"0-0": [1.0], "0-1": [2.0], "1-0": [1.0], "1-1": [2.0]})"),
            "head scores are of 2 layers of 2 heads, the model has 2 layers of 4: use the scores calibrated "
            "for this "
            "model");
  EXPECT_EQ(rejection(errors, R"({"avg_score": [0.5, 0.25, 0.25]})"),
            "layer errors have 3 layers, the model has 2: use the errors calibrated for this model");
  EXPECT_EQ(load_head_ranking(write(R"({"0": [1, 0], "1": [3, 2]})"), shape).heads(1)[0], 3U);
  EXPECT_EQ(load_layer_errors(write(R"({"avg_score": [0.5, 0.5]})"), shape).layers(), 2U);
}

TEST_F(CalibrationFiles, RejectsWhatIsNoCalibration) {
  for (const auto load : {+[](const fs::path& file) { load_head_ranking(file); },
                          +[](const fs::path& file) { load_head_scores(file); },
                          +[](const fs::path& file) { load_layer_errors(file); }}) {
    for (const char* text : {"", "  \n\t\r\n"}) {
      EXPECT_EQ(rejection(load, text),
                "is empty: a calibration that was stopped may have left it, make it again");
    }
    EXPECT_EQ(rejection(load, "{}"), "holds an empty object: make the calibration again");
    EXPECT_EQ(rejection(load, "[[1, 2]]"), "holds an array, not an object: give a file made by calibration");
    EXPECT_EQ(rejection(load, "17"), "holds 17, not an object: give a file made by calibration");
    EXPECT_EQ(rejection(load, R"({"0": [1], "0": [1]})"), "key \"0\" stands twice: remove one of the two");
  }
}

TEST_F(CalibrationFiles, RejectsWhatIsNoJson) {
  const std::string remedy =
      ": numbers must be finite (no NaN, no Infinity) and the text whole; make the file again";
  for (const char* text : {"layer 0", R"({"0": [1, 2)", R"({"0": [1, NaN]})", R"({"0": [1e999]})",
                           R"({"0": [1]} x)", "{\"\xFF\": [1]}"}) {
    for (const std::string& message :
         {ranking_rejection(text), scores_rejection(text), errors_rejection(text)}) {
#if defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__
      if (std::string_view(text).find("1e999") != std::string_view::npos) {
        // The JSON library does not see infinity in such a build; what is made from it refuses it.
        EXPECT_FALSE(message.starts_with("(")) << message;
        continue;
      }
#endif
      EXPECT_TRUE(message.starts_with("not valid JSON, ")) << message;
      EXPECT_TRUE(message.ends_with(remedy)) << message;
    }
  }
  EXPECT_NE(ranking_rejection(R"({"0": [1, NaN]})").find("at line 1, column 11"), std::string::npos);
}

TEST_F(CalibrationFiles, DeepNestingIsAnErrorLikeAnyOther) {
  const std::string remedy =
      "nests lists and objects deeper than 16: no calibration does; make the file again";
  for (const auto& [open, close] : {std::pair{"[", "]"}, {R"({"a": )", "}"}}) {
    std::string deep = R"({"0": )";
    for (int i = 0; i < 200000; ++i) {
      deep += open;
    }
    deep += "1";
    for (int i = 0; i < 200000; ++i) {
      deep += close;
    }
    for (const std::string& message :
         {ranking_rejection(deep + "}"), scores_rejection(deep + "}"), errors_rejection(deep + "}")}) {
      EXPECT_EQ(message.substr(0, 44), remedy.substr(0, 44)) << message;
    }
  }
  EXPECT_EQ(
      ranking_rejection(R"({"0": [[1]]})"),
      "layer 0 lists head an array at place 0: heads are whole numbers from 0 to the model's last head");
}

TEST_F(CalibrationFiles, RejectsWhatIsNoRegularFile) {
  const fs::path pipe = path("pipe");
  ASSERT_EQ(mkfifo(pipe.c_str(), 0600), 0);
  for (const auto& [no_file, kind] : {std::pair<fs::path, std::string>{"/dev/zero", "a device"},
                                      {"/dev/null", "a device"},
                                      {pipe, "a pipe"}}) {
    const fs::path& file = no_file;  // clang 14 captures no structured binding
    const std::string remedy = file.string() + ": is " + kind + ": give the path of a regular file";
    EXPECT_EQ(message_of<FileError>([&] { load_head_ranking(file); }), remedy);
    EXPECT_EQ(message_of<FileError>([&] { load_head_scores(file); }), remedy);
    EXPECT_EQ(message_of<FileError>([&] { load_layer_errors(file); }), remedy);
  }
  const fs::path below = write("{}") / "file.json";
  EXPECT_TRUE(message_of<FileError>([&] { load_head_ranking(below); }).starts_with(below.string() + ": "));
  const fs::path name = path(std::string(5000, 'x'));
  EXPECT_NE(message_of<FileError>([&] { load_head_ranking(name); }).find(": cannot be looked at, "),
            std::string::npos);
}

TEST_F(CalibrationFiles, WhatTheSystemRefusesHasItsReason) {
  // What a regular file is that cannot be read; as root, too.
  const fs::path unmapped = "/proc/self/mem";
  if (fs::is_regular_file(unmapped)) {
    EXPECT_EQ(message_of<FileError>([&] { load_head_ranking(unmapped); }),
              unmapped.string() + ": cannot be read to its end, Input/output error: check the disk");
  }
  const fs::path file = write(R"({"0": [1, 0]})");
  rlimit old_limit{};
  ASSERT_EQ(getrlimit(RLIMIT_NOFILE, &old_limit), 0);
  rlimit limit = old_limit;
  limit.rlim_cur = 0;
  ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &limit), 0);
  const std::string read = message_of<FileError>([&] { load_head_ranking(file); });
  const std::string written = message_of<FileError>([&] { save_head_ranking(file, HeadRanking({{0, 1}})); });
  ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &old_limit), 0);
  EXPECT_EQ(read, file.string() + ": cannot be opened, Too many open files: check the permissions");
  EXPECT_TRUE(written.starts_with(file.string() + ": cannot be written, Too many open files: check "))
      << written;
  EXPECT_EQ(load_head_ranking(file), HeadRanking({{1, 0}}));
}

TEST_F(CalibrationFiles, RejectsWhatIsTooLargeToBeOne) {
  const fs::path file = write("{}");
  fs::resize_file(file, (std::uintmax_t{1} << 40U));  // a hole, which takes no space
  EXPECT_EQ(message_of<FileError>([&] { load_head_ranking(file); }),
            file.string() + ": is larger than 256 MiB, as no calibration is: check the path");
}

TEST_F(CalibrationFiles, NothingBehindANulByteIsPassedOver) {
  using namespace std::string_literals;
  const std::string remedy = ": JSON is UTF-8 text without them; make the file again";
  EXPECT_EQ(ranking_rejection("{\"0\": [1, 0]}\0{\"0\": [0, 1]}"s), "holds a NUL byte at place 13" + remedy);
  EXPECT_EQ(scores_rejection("{\"0-0\": [1]}\0"s), "holds a NUL byte at place 12" + remedy);
  EXPECT_EQ(errors_rejection("{\"a\": [1]}\n{\"b\": [1]}\0{\"c\": [1]}\n"s),
            "holds a NUL byte at place 10 in line 2 of the file" + remedy);
  EXPECT_EQ(errors_rejection("{\0\"\0a\0"s), "holds a NUL byte at place 1" + remedy);  // UTF-16
}

TEST_F(CalibrationFiles, AByteOrderMarkIsNoKey) {
  EXPECT_EQ(load_head_ranking(write("\xEF\xBB\xBF{\"0\": [1, 0]}")), HeadRanking({{1, 0}}));
  EXPECT_EQ(load_layer_errors(write("\xEF\xBB\xBF{\"a\": [1]}\n{\"b\": [1]}")).data_sets().size(), 2U);
}

TEST_F(CalibrationFiles, MessagesShowKeysCutAndEscaped) {
  EXPECT_EQ(ranking_rejection("{\"\\u001b[2J\\r\\u009b\": [0]}").substr(0, 45),
            R"(key "\u001b[2J\r\u009b" is not a layer number)");
  const std::string key(1 << 20, 'k');
  const std::string shown = "\"" + key.substr(0, 60) + "\"... (1048576 bytes)";
  const auto all = [&](const std::string& text) {
    return std::vector<std::string>{ranking_rejection(text), scores_rejection(text), errors_rejection(text)};
  };
  for (const std::string& message : all("{\"" + key + "\": [0], \"" + key + "\": [0]}")) {
    EXPECT_EQ(message, "key " + shown + " stands twice: remove one of the two");
  }
  EXPECT_EQ(all("{\"" + key + "\": [0]}")[2],
            "the name of data set " + shown + " is too long: at most 256 bytes");
  // What is not JSON is read to its end by the parser, which says all of it.
  for (const std::string& text : {"{\"" + key, "{\"a\": " + key + "}", "{\"a\": \"" + key + "\xFF\"}",
                                  "{\"a\": 1" + std::string(1 << 20, '0') + "}", "\x1b" + key}) {
    for (const std::string& message : all(text)) {
      EXPECT_LT(message.size(), 500U);
      EXPECT_TRUE(std::all_of(message.begin(), message.end(), [](char c) { return c >= ' ' && c <= '~'; }))
          << message;
    }
  }
  EXPECT_EQ(errors_rejection("{\"a\\u001b\": [0]}"),
            R"(layer errors of 'a\u001b' sum to 0: at least one layer must have an error above 0)");
}

TEST_F(CalibrationFiles, LongListsTakeNoMoreTimeThanTheyAreLong) {
  std::string list = "0";
  for (int head = 1; head < 300000; ++head) {
    list += ',';
    list += std::to_string(head);
  }
  EXPECT_EQ(load_head_ranking(write("{\"0\": [" + list + "]}")).heads(0).size(), 300000U);
}

// ---- head rankings
// -------------------------------------------------------------------------------------------------

TEST_F(CalibrationFiles, RankingLoadsInAnyOrderOfLayers) {
  EXPECT_EQ(load_head_ranking(write(R"({"1": [0, 1], "0": [1, 0], "2": [0, 1]})")),
            HeadRanking({{1, 0}, {0, 1}, {0, 1}}));
}

TEST_F(CalibrationFiles, RankingMayListTheBestHeadsAlone) {
  EXPECT_EQ(load_head_ranking(write(R"({"0": [31, 4], "1": [7]})")), HeadRanking({{31, 4}, {7}}));
}

TEST_F(CalibrationFiles, RankingIsDerivedFromScores) {
  EXPECT_EQ(load_head_ranking(write(R"({"0-0": [1, 2], "0-1": [2, 2], "1-0": [3, 0], "1-1": [1, 2]})")),
            HeadRanking({{1, 0}, {0, 1}}));
}

TEST_F(CalibrationFiles, RankingRejectsLayers) {
  EXPECT_EQ(ranking_rejection(R"({"0": [0], "2": [0]})"),
            "layer \"1\" is absent, though the file has 2 layers: they must be numbered from 0 without gaps");
  EXPECT_EQ(ranking_rejection(R"({"1": [0], "2": [0]})"),
            "layer \"0\" is absent, though the file has 2 layers: they must be numbered from 0 without gaps");
  for (const char* key : {"-1", "+1", "01", " 1", "1.0", "1e0", "", "one", "4294967296", "0-x"}) {
    EXPECT_EQ(ranking_rejection(R"({"0": [0], ")" + std::string(key) + R"(": [0]})"),
              "key \"" + std::string(key) +
                  "\" is not a layer number: a head ranking is {\"<layer>\": [heads], ...}, layers from 0");
  }
  EXPECT_EQ(ranking_rejection(R"({"qasper": [0.5], "avg_score": [1]})"),
            "key \"qasper\" is not a layer number; these are layer errors: give the head ranking");
  EXPECT_EQ(ranking_rejection(R"({"0": [0], "1": []})"),
            "layer 1 has an empty list: give at least one of its heads");
  EXPECT_EQ(ranking_rejection(R"({"0": 3})"), "layer 0 holds 3, not a list of heads: make the file again");
  EXPECT_EQ(ranking_rejection(R"({"0": {"1": 2}})"),
            "layer 0 holds an object, not a list of heads: make the file again");
}

TEST_F(CalibrationFiles, RankingRejectsHeads) {
  for (const char* head :
       {"-1", "1.5", "3.0", "null", "true", "4294967296", "1.8446744073709552e+19", "\"3\""}) {
    EXPECT_EQ(ranking_rejection(R"({"0": [0, 1], "1": [0, )" + std::string(head) + "]}"),
              "layer 1 lists head " + std::string(head) +
                  " at place 1: heads are whole numbers from 0 to the model's last head");
  }
  EXPECT_EQ(ranking_rejection(R"({"0": [5, 1, 0, 1]})"),
            "layer 0 lists head 1 twice, at places 1 and 3: each head may stand once");
}

// ---- head scores
// ---------------------------------------------------------------------------------------------------

TEST_F(CalibrationFiles, ScoresLoadInAnyOrderOfHeads) {
  EXPECT_EQ(load_head_scores(write(R"({"1-1": [4], "0-0": [0.5], "1-0": [3], "0-1": [2e-1]})")),
            HeadScores(2, 2, {{0.5}, {0.2}, {3.0}, {4.0}}));
}

TEST_F(CalibrationFiles, ScoresOfARankingAreNotThere) {
  EXPECT_EQ(scores_rejection(R"({"0": [1, 0], "1": [0, 1]})"),
            "is a head ranking, which has no scores: give the file of raw scores it was made from, or "
            "calibrate the "
            "model again");
}

TEST_F(CalibrationFiles, ScoresRejectKeys) {
  for (const char* key : {"1", "0--1", "-1-0", "0-01", "0-1-0", "0-", "-", "avg_score", "0-4294967296"}) {
    EXPECT_EQ(
        scores_rejection(R"({"0-0": [1], ")" + std::string(key) + R"(": [1]})"),
        "key \"" + std::string(key) +
            "\" is not of the form \"<layer>-<head>\": head scores are {\"<layer>-<head>\": [scores], ...}, "
            "both numbered from 0");
  }
  EXPECT_EQ(scores_rejection(R"({"0-0": [1], "0-1": [1], "1-1": [1]})"),
            "scores of layer 1 head 0 are absent, though the file goes up to layer 1 and head 1: every head "
            "of every "
            "layer must have its scores");
  // A wild number costs no memory.
  EXPECT_EQ(
      scores_rejection(R"({"0-0": [1], "4294967295-4294967295": [1]})"),
      "scores of layer 0 head 1 are absent, though the file goes up to layer 4294967295 and head 4294967295: "
      "every head of every layer must have its scores");
}

TEST_F(CalibrationFiles, ScoresRejectValues) {
  for (const char* value : {"null", "\"1\"", "true"}) {
    EXPECT_EQ(scores_rejection(R"({"0-0": [1, 2], "0-1": [1, )" + std::string(value) + "]}"),
              "layer 0 head 1 has " + std::string(value) +
                  " at place 1 of its scores: every one must be a finite number");
  }
  // As rankings, too: their order would be that of the infinities.
  for (const std::string& message : {scores_rejection(R"({"0-0": [1e308, 1e308], "0-1": [1, 1]})"),
                                     ranking_rejection(R"({"0-0": [1e308, 1e308], "0-1": [1, 1]})")}) {
    EXPECT_TRUE(message.starts_with("head scores of layer 0 head 0 add up to inf: their mean is beyond"))
        << message;
  }
  EXPECT_EQ(scores_rejection(R"({"0-0": [1, 2], "0-1": [1]})"),
            "layer 0 head 1 has 1 scores, layer 0 head 0 has 2: every head has one score per counted run");
  EXPECT_EQ(scores_rejection(R"({"0-0": []})"),
            "layer 0 head 0 has an empty list: give at least one of its scores");
  EXPECT_EQ(scores_rejection(R"({"0-0": 1.5})"),
            "layer 0 head 0 holds 1.5, not a list of scores: make the file again");
}

// ---- layer errors
// --------------------------------------------------------------------------------------------------

TEST_F(CalibrationFiles, ErrorsInOneObject) {
  const LayerErrors expected({0.25, 0.75},
                             {{.name = "b", .errors = {1.0, 3.0}}, {.name = "a", .errors = {1.0, 1.0}}});
  // The average is the file's, whatever the data sets say, and is normalised.
  EXPECT_EQ(load_layer_errors(write(R"({"b": [1, 3], "a": [1, 1], "avg_score": [1, 3]})")), expected);
  EXPECT_EQ(
      load_layer_errors(write("{\n \"b\": [\n 1,\n 3], \"a\":\n [1, 1],\n\"avg_score\": [1, 3]\n}\n\n")),
      expected);
  EXPECT_EQ(load_layer_errors(write(R"({"avg_score": [1, 3]})")), LayerErrors({0.25, 0.75}, {}));
}

TEST_F(CalibrationFiles, ErrorsWithoutAnAverageGetTheirMean) {
  const LayerErrors expected({{.name = "b", .errors = {0.25, 0.75}}, {.name = "a", .errors = {0.5, 0.5}}});
  EXPECT_EQ(load_layer_errors(write(R"({"b": [1, 3], "a": [1, 1]})")), expected);
  EXPECT_EQ(load_layer_errors(write("{\"b\": [1, 3]}\n{\"a\": [1, 1]}\n")), expected);
  EXPECT_EQ(load_layer_errors(write("\n{\"b\": [1, 3]}\r\n \r\n{\"a\": [1, 1]}")), expected);
  EXPECT_EQ(copy(expected.average()), (std::vector<double>{0.375, 0.625}));
}

TEST_F(CalibrationFiles, ErrorsRejectOtherFiles) {
  EXPECT_EQ(
      errors_rejection(R"({"0": [1, 0], "1": [0, 1]})"),
      "key \"0\" is a layer's or a head's, so this is a head ranking or head scores: give the layer errors");
  EXPECT_EQ(errors_rejection(R"({"0-0": [1, 0], "0-1": [0, 1]})"),
            "key \"0-0\" is a layer's or a head's, so this is a head ranking or head scores: give the layer "
            "errors");
}

TEST_F(CalibrationFiles, ErrorsRejectLines) {
  EXPECT_EQ(errors_rejection("{\"a\": [1]}\n{\"a\": [2]}\n"),
            "data set \"a\" stands on two lines: remove one of the two");
  const std::string broken = errors_rejection("{\"a\": [1]}\n\n{\"b\": [1\n");
  EXPECT_TRUE(broken.starts_with("not valid JSON in line 3 of the file, ")) << broken;
  EXPECT_EQ(errors_rejection("{\"a\": [1]}\n[1]\n"),
            "holds an array in line 2 of the file, not an object: give a file made by calibration");
  EXPECT_EQ(errors_rejection("{\"a\": [1]}\n{\"b\": [1], \"b\": [1]}\n"),
            "key \"b\" stands twice in line 2 of the file: remove one of the two");
}

TEST_F(CalibrationFiles, ErrorsRejectValues) {
  for (const char* value : {"null", "\"nan\"", "[1]"}) {
    const std::string shown = std::string(value) == "[1]" ? "an array" : value;
    EXPECT_EQ(
        errors_rejection(R"({"a": [1, )" + std::string(value) + R"(], "avg_score": [1, 1]})"),
        "data set \"a\" has " + shown + " at place 1 of its layer errors: every one must be a finite number");
  }
  EXPECT_EQ(errors_rejection(R"({"a": 1})"),
            "data set \"a\" holds 1, not a list of layer errors: make the file again");
  EXPECT_EQ(errors_rejection(R"({"a": []})"),
            "data set \"a\" has an empty list: give at least one of its layer errors");
  EXPECT_EQ(errors_rejection(R"({"a": [1, -0.5]})"),
            "layer error of 'a' layer 1 is -0.5: errors are finite and not negative");
  EXPECT_EQ(errors_rejection(R"({"avg_score": [0, 0]})"),
            "layer errors of 'avg_score' sum to 0: at least one layer must have an error above 0");
  EXPECT_EQ(errors_rejection(R"({"a": [1, 2], "b": [1, 2, 3]})"),
            "layer errors of data set 'b' have 3 layers, those of 'a' have 2: all must be of one model");
  EXPECT_EQ(errors_rejection(R"({"a": [1, 2], "avg_score": [1]})"),
            "layer errors of data set 'a' have 2 layers, avg_score has 1: all must be of one model");
}

// ---- writing
// -------------------------------------------------------------------------------------------------------

double any_finite_double(std::mt19937_64& random) {
  for (;;) {
    const double value = std::bit_cast<double>(random());
    if (compresskv::detail::is_finite(value)) {
      return value;
    }
  }
}

TEST_F(CalibrationFiles, RankingsComeBackEqual) {
  std::mt19937_64 random(1);
  for (int trial = 0; trial < 50; ++trial) {
    std::vector<std::vector<std::uint32_t>> layers(1 + random() % 40);
    for (auto& heads : layers) {
      heads.resize(1 + random() % 40);
      std::iota(heads.begin(), heads.end(), 0U);
      std::shuffle(heads.begin(), heads.end(), random);
    }
    const HeadRanking ranking(layers);
    save_head_ranking(path(), ranking);
    EXPECT_EQ(load_head_ranking(path()), ranking) << "trial " << trial;
  }
}

TEST_F(CalibrationFiles, ScoresComeBackEqualBitForBit) {
  std::mt19937_64 random(2);
  for (int trial = 0; trial < 50; ++trial) {
    const std::size_t layers = 1 + random() % 12;
    const std::size_t heads = 1 + random() % 12;
    std::vector<std::vector<double>> runs(layers * heads, std::vector<double>(1 + random() % 5));
    for (auto& scores : runs) {
      for (double& score : scores) {
        score = random() % 8 == 0 ? 0.0 : any_finite_double(random);
      }
    }
    const HeadScores scores(layers, heads, runs);
    save_head_scores(path(), scores);
    EXPECT_EQ(load_head_scores(path()), scores) << "trial " << trial;
    EXPECT_EQ(load_head_ranking(path()), scores.ranking()) << "trial " << trial;
  }
}

TEST_F(CalibrationFiles, LayerErrorsComeBackEqualBitForBit) {
  std::mt19937_64 random(3);
  for (int trial = 0; trial < 200; ++trial) {
    const std::size_t layers = 1 + random() % 80;
    const auto errors_of = [&] {
      std::vector<double> errors(layers);
      for (double& error : errors) {
        error = std::ldexp(static_cast<double>(random() >> 11U), -static_cast<int>(random() % 70));
      }
      errors[random() % layers] = 1.0;
      return errors;
    };
    std::vector<LayerErrors::DataSet> sets(random() % 5);
    for (std::size_t i = 0; i < sets.size(); ++i) {
      sets[i] = {.name = std::to_string(i) + " \"\\\n\xC3\xA9", .errors = errors_of()};
    }
    const LayerErrors errors =
        sets.empty() || trial % 2 == 0 ? LayerErrors(errors_of(), sets) : LayerErrors(sets);
    save_layer_errors(path(), errors);
    EXPECT_EQ(load_layer_errors(path()), errors) << "trial " << trial;
  }
}

TEST_F(CalibrationFiles, FormsAreThePublishedOnes) {
  save_head_ranking(path(), HeadRanking({{2, 0, 1}, {1, 2, 0}}));
  EXPECT_EQ(read(path()), "{\n\"0\": [2,0,1],\n\"1\": [1,2,0]\n}\n");
  // The released reader takes one line of scores.
  save_head_scores(path(), HeadScores(1, 2, {{0.1, 2.0}, {0.0, 1e-30}}));
  EXPECT_EQ(read(path()), "{\"0-0\": [0.1,2.0], \"0-1\": [0.0,1e-30]}\n");
  save_layer_errors(path(),
                    LayerErrors({{.name = "b", .errors = {1.0, 3.0}}, {.name = "a", .errors = {3.0, 1.0}}}));
  EXPECT_EQ(read(path()), "{\n\"b\": [0.25,0.75],\n\"a\": [0.75,0.25],\n\"avg_score\": [0.5,0.5]\n}\n");
}

TEST_F(CalibrationFiles, SavingReplacesAndLeavesNothingElse) {
  save_head_ranking(path(), HeadRanking({{0, 1}}));
  save_head_ranking(path(), HeadRanking({{1, 0}}));
  EXPECT_EQ(load_head_ranking(path()), HeadRanking({{1, 0}}));
  EXPECT_EQ(files_in_folder(), 1U);
}

TEST_F(CalibrationFiles, SavingRejectsPaths) {
  const fs::path nowhere = path("no") / "file.json";
  EXPECT_EQ(message_of<FileError>([&] {
              save_head_ranking(nowhere, HeadRanking({{0, 1}}));
            }),
            nowhere.string() + ": cannot be written, there is no folder " + nowhere.parent_path().string() +
                ": create it first");
  fs::create_directory(path("folder"));
  EXPECT_EQ(message_of<FileError>([&] {
              save_head_ranking(path("folder"), HeadRanking({{0, 1}}));
            }),
            path("folder").string() + ": cannot be written, it is a folder: give the path of a file");
}

TEST_F(CalibrationFiles, SavingReplacesNoDeviceAndNoPipe) {
  const fs::path pipe = path("pipe");
  ASSERT_EQ(mkfifo(pipe.c_str(), 0600), 0);
  const fs::path device = path("device");
  fs::create_symlink("/dev/full", device);
  for (const auto& [file, kind] :
       {std::pair<fs::path, std::string>{pipe, "a pipe"}, {device, "a device"}, {"/dev/full", "a device"}}) {
    const auto type = fs::status(file).type();
    const std::string remedy =
        file.string() + ": cannot be written, it is " + kind + ": give the path of a regular file or of none";
    EXPECT_EQ(message_of<FileError>([&] { save_head_ranking(file, HeadRanking({{0, 1}})); }), remedy);
    EXPECT_EQ(message_of<FileError>([&] { save_head_scores(file, HeadScores(1, 1, {{1.0}})); }), remedy);
    EXPECT_EQ(message_of<FileError>([&] { save_layer_errors(file, LayerErrors({1.0}, {})); }), remedy);
    EXPECT_EQ(fs::status(file).type(), type);
  }
}

TEST_F(CalibrationFiles, SavingThroughALinkReplacesWhatItLeadsTo) {
  save_head_ranking(path("target"), HeadRanking({{0, 1}}));
  fs::create_symlink("target", path("link"));
  save_head_ranking(path("link"), HeadRanking({{1, 0}}));
  EXPECT_TRUE(fs::is_symlink(path("link")));
  EXPECT_EQ(load_head_ranking(path("target")), HeadRanking({{1, 0}}));
}

TEST_F(CalibrationFiles, SavingThroughALinkMakesWhatItLeadsTo) {
  const HeadRanking ranking({{1, 0}});
  fs::create_directory(path("folder"));
  fs::create_symlink("folder/target", path("second"));
  fs::create_symlink("second", path("first"));
  save_head_ranking(path("first"), ranking);
  EXPECT_TRUE(fs::is_symlink(path("first")));
  EXPECT_TRUE(fs::is_symlink(path("second")));
  EXPECT_EQ(load_head_ranking(path("folder") / "target"), ranking);
  EXPECT_EQ(files_in_folder(), 3U);

  fs::create_symlink("none/target", path("nowhere"));
  EXPECT_EQ(message_of<FileError>([&] { save_head_ranking(path("nowhere"), ranking); }),
            path("nowhere").string() + ": cannot be written, there is no folder " + path("none").string() +
                ": create it first");
  fs::create_symlink("round", path("round"));
  EXPECT_EQ(message_of<FileError>([&] { save_head_ranking(path("round"), ranking); }),
            path("round").string() +
                ": cannot be written, Too many levels of symbolic links: check the path "
                "and its permissions");
  EXPECT_TRUE(fs::is_symlink(path("round")));
}

TEST_F(CalibrationFiles, SavingRejectsWhatCouldNotBeReadBack) {
  const auto of = [&](auto save) {
    return message_of<FileError>([&] { save(path()); }).substr(path().string().size());
  };
  EXPECT_EQ(of([](const fs::path& file) {
              save_layer_errors(
                  file, LayerErrors({1.0}, {{.name = "a", .errors = {1.0}}, {.name = "a", .errors = {1.0}}}));
            }),
            ": cannot be written, data set name \"a\" is taken: each name may stand once, and avg_score is "
            "the mean's");
  EXPECT_EQ(of([](const fs::path& file) {
              save_layer_errors(file, LayerErrors({{.name = "avg_score", .errors = {1.0}}}));
            }),
            ": cannot be written, data set name \"avg_score\" is taken: each name may stand once, and "
            "avg_score is the "
            "mean's");
  EXPECT_EQ(of([](const fs::path& file) {
              save_layer_errors(
                  file, LayerErrors({{.name = "a", .errors = {1.0}}, {.name = "\xFF", .errors = {1.0}}}));
            }),
            ": cannot be written, the name of data set 1 is not valid UTF-8: rename it");
  EXPECT_EQ(
      of([](const fs::path& file) {
        save_head_scores(file, HeadScores(1, 2, {{1.0, 2.0}, {1.0}}));
      }),
      ": cannot be written, layer 0 head 1 has 1 scores, layer 0 head 0 has 2: every head has one score per "
      "counted run");
  EXPECT_EQ(of([](const fs::path& file) {
              save_layer_errors(file, LayerErrors({1.0}, {{.name = std::string(257, 'n'), .errors = {1.0}}}));
            }),
            ": the name of data set \"" + std::string(60, 'n') +
                "\"... (257 bytes) is too long: at most 256 bytes");
  EXPECT_EQ(files_in_folder(), 0U);
}

// A limit on the size of files stands in for a full disk.
TEST_F(CalibrationFiles, AWriteThatStopsShortKeepsTheOldFile) {
  save_head_ranking(path(), HeadRanking({{0, 1}}));
  rlimit old_limit{};
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &old_limit), 0);
  const auto old_handler = std::signal(SIGXFSZ, SIG_IGN);
  rlimit limit = old_limit;
  limit.rlim_cur = 4;
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &limit), 0);
  const std::string message = message_of<FileError>([&] {
    save_head_ranking(path(), HeadRanking({{1, 0}, {0, 1}}));
  });
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &old_limit), 0);
  std::signal(SIGXFSZ, old_handler);
  EXPECT_EQ(message, path().string() +
                         ": cannot be written, File too large: check the space on the disk and the "
                         "permissions; what was there is unchanged");
  EXPECT_EQ(load_head_ranking(path()), HeadRanking({{0, 1}}));
  EXPECT_EQ(files_in_folder(), 1U);
}

// ---- the published files
// -------------------------------------------------------------------------------------------

class PublishedFiles : public CalibrationFiles, public testing::WithParamInterface<const char*> {
 protected:
  void SetUp() override {
    if (!fs::is_directory(COMPRESSKV_SHARED_DIR)) {
      GTEST_SKIP() << "no folder " << COMPRESSKV_SHARED_DIR << " with the published calibration files";
    }
  }
  static fs::path published(const std::string& ending) {
    return fs::path(COMPRESSKV_SHARED_DIR) / (std::string(GetParam()) + ending);
  }
};

TEST_P(PublishedFiles, RankingHasAllHeadsOfAllLayers) {
  const HeadRanking ranking = load_head_ranking(published("_head_idx.json"));
  ASSERT_EQ(ranking.layers(), 32U);
  EXPECT_NO_THROW(ranking.validate(32, 32));
  for (std::size_t layer = 0; layer < 32; ++layer) {
    const auto heads = ranking.heads(layer);
    EXPECT_EQ(std::set<std::uint32_t>(heads.begin(), heads.end()).size(), 32U) << "layer " << layer;
    EXPECT_EQ(heads.size(), 32U) << "layer " << layer;
  }
  save_head_ranking(path(), ranking);
  EXPECT_EQ(load_head_ranking(path()), ranking);
}

TEST_P(PublishedFiles, LayerErrorsAreNormalisedMeans) {
  const LayerErrors errors = load_layer_errors(published("_layer_score.jsonl"));
  ASSERT_EQ(errors.layers(), 32U);
  EXPECT_EQ(errors.data_sets().size(), 16U);
  EXPECT_NEAR(std::accumulate(errors.average().begin(), errors.average().end(), 0.0), 1.0, 1e-12);

  save_layer_errors(path(), errors);
  EXPECT_EQ(load_layer_errors(path()), errors);

  // The same data sets, one a line and without the mean, give the published mean.
  const auto object = nlohmann::ordered_json::parse(read(published("_layer_score.jsonl")));
  std::string lines;
  for (const auto& [name, values] : object.items()) {
    if (name != "avg_score") {
      lines += nlohmann::ordered_json{{name, values}}.dump() + "\n";
    }
  }
  const LayerErrors computed = load_layer_errors(write(lines));
  ASSERT_EQ(computed.layers(), 32U);
  EXPECT_TRUE(std::equal(computed.data_sets().begin(), computed.data_sets().end(), errors.data_sets().begin(),
                         errors.data_sets().end()));
  for (std::size_t layer = 0; layer < 32; ++layer) {
    EXPECT_NEAR(computed.average()[layer], errors.average()[layer], 1e-12) << "layer " << layer;
  }
}

INSTANTIATE_TEST_SUITE_P(Models, PublishedFiles,
                         testing::Values("Llama-3.1-8B-Instruct", "Mistral-7B-Instruct-v0.3"),
                         [](const testing::TestParamInfo<const char*>& model) {
                           return std::string(model.param).substr(0, std::string(model.param).find('-'));
                         });

}  // namespace
