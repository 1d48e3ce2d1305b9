// What the tool takes on its command line, and how it says no: exit codes, messages, streams that do not take
// what it prints.

#include "ckv/arguments.hpp"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <array>
#include <compresskv/core/error.hpp>
#include <filesystem>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "message_of.hpp"
#include "model_fixture.hpp"
#include "tool.hpp"

namespace ckv_test {
namespace {

using compresskv::test::message_of;
using compresskv::test::says;

std::string tool() { return quoted(COMPRESSKV_CKV_BINARY); }

/// The tool through a shell, which may redirect what it likes.
Outcome run_shell(const std::string& command) {
  const Folder folder;
  const std::string whole = "{ " + command + "; } 2>" + quoted(folder.path("err").string());
  const int status = std::system(whole.c_str());
  return {.code = WIFEXITED(status) ? WEXITSTATUS(status) : -1, .out = "", .err = read(folder.path("err"))};
}

// ---- numbers
// ---------------------------------------------------------------------------------------------------

/// Every option of every subcommand that takes a number.
struct NumberOption {
  std::string command;
  std::string name;
  bool real;
};

const std::vector<NumberOption>& number_options() {
  static const std::vector<NumberOption> options = [] {
    std::vector<NumberOption> all;
    for (const char* command : {"generate", "calibrate", "demo", "evaluate", "inspect"}) {
      std::istringstream help{run_tool({command, "--help"}).out};
      for (std::string line; std::getline(help, line);) {
        std::istringstream words{line};
        std::string name;
        std::string type;
        words >> name >> type;
        const bool whole =
            type.starts_with("UINT") || type.starts_with("INT") || type.find("POSITIVE") != std::string::npos;
        if (name.starts_with("--") && (whole || type.starts_with("FLOAT"))) {
          all.push_back({command, name, !whole});
        }
      }
    }
    return all;
  }();
  return options;
}

TEST(Arguments, TheHelpNamesTheNumberOptions) {
  // Else the tests below would look at nothing.
  EXPECT_GE(number_options().size(), 40U);
  for (const char* name :
       {"--bytes", "--seed", "--rows", "--threads", "--ablate", "--error-rows", "--length"}) {
    EXPECT_TRUE(std::any_of(number_options().begin(), number_options().end(),
                            [&](const NumberOption& option) { return option.name == name; }))
        << name;
  }
}

TEST(Arguments, ANumberThatIsNoneIsWrongUsageInEveryOption) {
  const std::vector<std::string> for_all = {"nan", "inf", "-inf", "1e999", "12abc",
                                            "",    " 5",  "+5",   "0x10",  "five"};
  const std::vector<std::string> for_counts = {
      "-1", "-5", "1.5", "1e3", "18446744073709551616", "99999999999999999999999999"};
  for (const NumberOption& option : number_options()) {
    std::vector<std::string> values = for_all;
    if (!option.real) {
      values.insert(values.end(), for_counts.begin(), for_counts.end());
    }
    for (const std::string& value : values) {
      if (option.name == "--ablate" && (value.empty() || value == "-inf")) {
        continue;  // this one may stand without a value, so that -inf is another option
      }
      // The first option read is the one that is refused: nothing else is wrong with the value of --model.
      const Outcome outcome = run_tool(
          {option.command, option.name, value, option.command == "inspect" ? "m.gguf" : "--model=m.gguf"});
      EXPECT_EQ(outcome.code, 2) << option.command << ' ' << option.name << " '" << value
                                 << "': " << outcome.err;
      EXPECT_TRUE(
          says(outcome.err, {option.name, "'" + value + "'", option.real ? "number" : "whole number from "}));
      EXPECT_EQ(outcome.out, "");
      EXPECT_LT(longest_line(outcome.err), 200U) << outcome.err;
    }
  }
}

TEST(Arguments, ANumberOutOfItsBoundsNamesThem) {
  const auto refuse = [](const Arguments& arguments, std::initializer_list<std::string_view> parts) {
    const Outcome outcome = run_tool(arguments);
    EXPECT_EQ(outcome.code, 2) << outcome.err;
    EXPECT_TRUE(says(outcome.err, parts));
  };
  refuse({"generate", "--rows", "0"}, {"--rows", "'0'", "from 1 to 4294967295"});
  refuse({"generate", "--bytes", "0"}, {"--bytes", "'0'", "from 1 to 18446744073709551615"});
  refuse({"generate", "--bytes", "-1"}, {"--bytes", "'-1'", "from 1 to 18446744073709551615"});
  refuse({"generate", "--bytes", "2XB"}, {"--bytes", "'2XB'", "2MiB, 500kB"});
  refuse({"generate", "--bytes", "1.5MiB"}, {"--bytes", "'1.5MiB'", "whole number"});
  refuse({"generate", "--bytes", "16EiB"}, {"--bytes", "'16EiB'", "18446744073709551615"});
  refuse({"generate", "--seed", "18446744073709551616"}, {"--seed", "from 0 to 18446744073709551615"});
  refuse({"generate", "--threads", "-1"}, {"--threads", "'-1'", "from 0 to 1024"});
  refuse({"generate", "--threads", "100000"}, {"--threads", "from 0 to 1024"});
  refuse({"generate", "--temperature", "-0.5"}, {"--temperature", "'-0.5'", "0 or more"});
  refuse({"generate", "--temperature", "1e39"}, {"--temperature", "'1e39'", "finite"});
  refuse({"generate", "--top-p", "1.5"}, {"--top-p", "'1.5'", "from 0 to 1"});
  refuse({"demo", "--depth", "2"}, {"--depth", "'2'", "from 0 to 1"});
  refuse({"inspect", "m.gguf", "--length", "512,-1"}, {"--length", "'-1'", "from 1 to"});
  refuse({"inspect", "m.gguf", "--length", "18446744073709551615"}, {"--length", "to 4294967295"});
  refuse({"evaluate", "--lengths", "5,0"}, {"--lengths", "'0'", "from 1 to"});
  refuse({"generate", "--model", "m.gguf", "--prompt", "x", "--method", "streaming", "--ratio", "0"},
         {"--ratio", "budget ratio is 0"});
}

TEST(Arguments, AValidatorOfTheOptionsOwnNeverSpeaksFirst) {
  CLI::App app{"numbers"};
  double real = 0.0;
  double amount = 0.0;
  std::size_t count = 0;
  app.add_option("--real", real)->check(CLI::PositiveNumber);
  app.add_option("--amount", amount)->check(CLI::NonNegativeNumber)->type_name("FLOAT of it");
  app.add_option("--count", count)->check(CLI::PositiveNumber);
  ckv::check_values(app);
  const auto message = [&](std::vector<std::string> arguments) {
    return message_of<CLI::ValidationError>([&] { app.parse(std::move(arguments)); });
  };
  for (const char* wrong : {"0", "-0.5", "-0"}) {
    EXPECT_EQ(message({std::string("--real=") + wrong}),
              "--real: '" + std::string(wrong) + "' is not above 0: give more than 0");
  }
  EXPECT_EQ(message({"--amount=-1"}), "--amount: '-1' is below 0: give 0 or more");
  EXPECT_EQ(message({"--count=0"}), "--count: '0' is no whole number from 1 to 4294967295");
  app.parse(std::vector<std::string>{"--real=0.5", "--amount=0", "--count=010"});
  EXPECT_EQ(real, 0.5);
  EXPECT_EQ(amount, 0.0);
  EXPECT_EQ(count, 10U);
}

TEST(Arguments, AnOptionOfAMethodNamesItsValueAndItsBounds) {
  const Folder folder;
  const std::string model = folder.write("broken.gguf", "GGUF but no more").string();
  const std::string out = folder.path("out.jsonl").string();
  const auto evaluate = [&](const std::string& method) {
    return Arguments{"evaluate", "--model", model, "--out", out, "--ratios", "0.5", "--methods", method};
  };
  const std::string count = " is no whole number from 1 to 4294967295";
  for (const auto& [option, wrong] : std::vector<std::pair<std::string, std::string>>{
           {"window=-1", "window '-1'" + count},
           {"window=8x", "window '8x'" + count},
           {"window", "window ''" + count},
           {"min=0", "min '0'" + count},
           {"heads=0", "heads '0'" + count},
           {"width=", "width ''" + count},
           {"model=4294967296", "model '4294967296'" + count},
           {"hold=-1", "hold '-1' is no whole number from 0 to 4"},
           {"decay=101", "decay '101' is no whole number from 0 to 100"},
           {"seed=x", "seed 'x' is no whole number from 0 to 18446"},
           {"pool=sum", "pool 'sum' is none: give avg, max or trailing"},
           {"share=101", "share '101' is no whole number from 0 to 100"},
           {"sinks=-1", "sinks '-1' is no whole number from 0 to 4"},
           {"lag=1", "lag '1' is no whole number from 2 to 4294967295"},
           {"block=0", "block '0'" + count},
           {"chunk=0", "chunk '0'" + count},
           {"errors", "there are no layer errors; name them with --errors"},
           {"size=3", "'size=3' is not known; options are uniform,"}}) {
    expect_usage_error(evaluate("snapkv:" + option), "--methods snapkv:" + option + ": " + wrong);
  }
  for (const char* right : {"seed=0", "hold=0", "decay=0", "decay=100", "window=010"}) {
    expect_failure(evaluate(std::string("snapkv:") + right), "broken.gguf");
  }
}

TEST(Arguments, ABudgetOfTheWholeCacheHasNoUse) {
  const Folder folder;
  const std::string ranking = folder.write("r.json", "{\"0\": [0]}").string();
  const std::array<std::pair<const char*, std::string>, 8> budgets = {{{"--ratio", "0.5"},
                                                                       {"--rows", "9"},
                                                                       {"--bytes", "2MiB"},
                                                                       {"--heads", ranking},
                                                                       {"--errors", ranking},
                                                                       {"--statistics", ranking},
                                                                       {"--kv-heads", ranking},
                                                                       {"--surrogate", ranking}}};
  for (const auto& [option, value] : budgets) {
    expect_usage_error({"generate", "--model", "m.gguf", "--prompt", "x", "--method", "full", option, value},
                       std::string(option) + " has no use with --method full, which keeps the whole cache");
  }
}

// ---- subcommands and files
// -------------------------------------------------------------------------------------

TEST(Arguments, NoSubcommandPrintsTheHelpAndAnUnknownOneIsNamed) {
  const Outcome none = run_tool({});
  EXPECT_EQ(none.code, 2);
  EXPECT_EQ(none.out, "");
  EXPECT_TRUE(says(none.err, {"Usage: ckv", "generate", "calibrate", "demo", "evaluate", "inspect"}));
  expect_usage_error(
      {"fly"}, "there is no subcommand 'fly': give one of generate, calibrate, demo, evaluate, inspect");
  expect_usage_error({"inspekt", "m.gguf"}, "'inspekt'");
  expect_usage_error({""}, "there is no subcommand ''");
  expect_usage_error({"inspect", "m.gguf", "more"}, "more");
  expect_usage_error({"inspect", "m.gguf", "--fast"}, "--fast");
}

TEST(Arguments, AFileThatIsNotThereIsWrongUsage) {
  const Folder folder;
  const std::string model = folder.write("broken.gguf", "GGUF but no more").string();
  const std::string none = folder.path("none").string();
  const std::string out = folder.path("out").string();
  const std::string there = ": no such file: check the path";
  const auto refuse = [&](const Arguments& arguments, const std::string& option) {
    expect_usage_error(arguments, option + " '" + none + "'" + there);
  };
  refuse({"inspect", none}, "model");
  refuse({"generate", "--model", none, "--prompt", "x", "--method", "full"}, "--model");
  refuse({"generate", "--model", none, "--prompt", "x", "--rows", "9"}, "--model");
  refuse({"generate", "--model", model, "--prompt-file", none, "--method", "full"}, "--prompt-file");
  refuse({"generate", "--model", model, "--prompt", "x", "--rows", "9", "--heads", none}, "--heads");
  refuse(
      {"generate", "--model", model, "--prompt", "x", "--method", "snapkv", "--rows", "9", "--errors", none},
      "--errors");
  refuse({"generate", "--model", model, "--prompt", "x", "--method", "q-filter", "--rows", "9",
          "--statistics", none},
         "--statistics");
  refuse({"generate", "--model", model, "--prompt", "x", "--method", "kvzip-heads", "--rows", "9",
          "--kv-heads", none},
         "--kv-heads");
  refuse({"generate", "--model", model, "--prompt", "x", "--method", "kvzap", "--threshold", "-4",
          "--surrogate", none},
         "--surrogate");
  refuse({"demo", "--model", none}, "--model");
  refuse({"evaluate", "--model", none, "--ratios", "0.5", "--out", out}, "--model");
  refuse({"evaluate", "--model", model, "--ratios", "0.5", "--out", out, "--heads", none}, "--heads");
  refuse({"evaluate", "--model", model, "--ratios", "0.5", "--out", out, "--statistics", none},
         "--statistics");
  refuse({"evaluate", "--model", model, "--ratios", "0.5", "--out", out, "--kv-heads", none}, "--kv-heads");
  refuse({"evaluate", "--model", model, "--ratios", "0.5", "--out", out, "--surrogate", none}, "--surrogate");
  refuse({"calibrate", "--model", none, "--out", out}, "--model");
  refuse({"calibrate", "--model", model, "--out", out, "--needle-file", none}, "--needle-file");
}

TEST(Arguments, ATextInPlaceOfACalibrationIsNamedAsSuch) {
  const Folder folder;
  const std::string model = folder.write("broken.gguf", "GGUF but no more").string();
  const std::string text = folder.write("book.txt", "Call me Ishmael.").string();
  const Arguments start = {"generate", "--model", model, "--prompt", "x", "--rows", "9"};
  const auto refuse = [&](const Arguments& more, const std::string& message) {
    Arguments all = start;
    all.insert(all.end(), more.begin(), more.end());
    expect_usage_error(all, message);
  };
  const std::string is_none =
      " '" + text + "': is no JSON: give one of the files that `ckv calibrate` writes, ";
  const std::string wide = folder.write("wide.json", std::string("\xFF\xFE{\0\n\0", 6)).string();
  refuse({"--method", "compresskv", "--heads", wide},
         "--heads '" + wide + "': is UTF-16, by its byte-order mark, and not UTF-8: give one");
  refuse({"--method", "compresskv", "--heads", text},
         "--heads" + is_none + "NAME_head_idx.json or NAME_head_scores.json");
  refuse({"--method", "snapkv", "--errors", text}, "--errors" + is_none + "NAME_layer_score.jsonl");
}

TEST(Arguments, AByteOrderMarkMakesACalibrationNoText) {
  const Folder folder;
  const std::string model = folder.write("broken.gguf", "GGUF but no more").string();
  const std::string heads = folder.write("heads.json", "\xEF\xBB\xBF {\"0\": [0]}").string();
  // What is wrong is the model alone.
  expect_failure({"generate", "--model", model, "--prompt", "x", "--rows", "9", "--method", "compresskv",
                  "--heads", heads},
                 "broken.gguf");
  const std::string marked = folder
                                 .write("text.json",
                                        "\xEF\xBB\xBF"
                                        "Call me")
                                 .string();
  expect_usage_error({"generate", "--model", model, "--prompt", "x", "--rows", "9", "--heads", marked},
                     "'" + marked + "': is no JSON: give");
}

TEST(Arguments, AFileIsWrittenWhereItsLinkLeads) {
  const Folder folder;
  std::filesystem::create_symlink("target", folder.path("link"));
  for (const char* text : {"first", "second"}) {  // made, then replaced
    ckv::check_writable("--json", folder.path("link"));
    ckv::write_text_file(folder.path("link"), text);
    EXPECT_TRUE(std::filesystem::is_symlink(folder.path("link")));
    EXPECT_EQ(read(folder.path("target")), text);
  }
  ckv::check_writable("--json", "/dev/full");
  EXPECT_EQ(message_of<compresskv::FileError>([] { ckv::write_text_file("/dev/full", "text"); }),
            "/dev/full: cannot be written, No space left on device: give the path of a file");
}

TEST(Arguments, CalibrationsThatCannotBeReadAreNamedWhereNoOtherIsTheOne) {
  const Folder folder;
  const auto record = [&](const char* name, const std::string& text) {
    std::filesystem::create_directory(folder.path(name));
    return folder.write((std::string(name) + "/calibration.json").c_str(), text).string();
  };
  const std::string mine = R"({"model": "m", "model_sha256": "abc"})";
  const std::string twice = record("twice", R"({"model": "m", "model_sha256": "abc", "model": "n"})");
  const std::string nul = record("nul", mine + std::string(1, '\0'));
  const auto find = [&](const std::string& sha256) {
    testing::internal::CaptureStderr();
    const auto found = ckv::find_calibration(folder.path(""), sha256);
    return std::pair(found, testing::internal::GetCapturedStderr());
  };
  const auto [none, said] = find("abc");
  EXPECT_FALSE(none);
  EXPECT_TRUE(says(said, {"ckv: passed over: " + twice + ": key \"model\" stands twice"}));
  EXPECT_TRUE(says(said, {"ckv: passed over: " + nul + ": holds a NUL byte"}));
  record("mine", "\xEF\xBB\xBF" + mine);
  const auto [found, silence] = find("abc");
  ASSERT_TRUE(found);
  EXPECT_EQ(found->heads, folder.path("mine") / "m_head_idx.json");
  EXPECT_EQ(silence, "");
}

TEST(Arguments, WhatIsNoFileIsNotReadFrom) {
  const Folder folder;
  const std::string pipe = folder.path("pipe").string();
  ASSERT_EQ(mkfifo(pipe.c_str(), 0600), 0);
  const std::array<std::pair<std::string, std::string>, 4> places = {
      {{folder.path("").string(), "is a folder"},
       {"/dev/zero", "is a device"},
       {pipe, "is a pipe"},
       {"", "is no path"}}};
  for (const auto& [path, what] : places) {
    for (const char* option : {"--model", "--heads", "--errors", "--prompt-file"}) {
      if (path == pipe && option == std::string("--prompt-file")) {
        continue;
      }
      const Outcome outcome = run_tool({"generate", option, path});
      EXPECT_EQ(outcome.code, 2) << option << ' ' << outcome.err;
      EXPECT_TRUE(says(outcome.err, {option, "'" + path + "'", what}));
    }
    expect_usage_error({"inspect", path}, what);
  }
  // A prompt may come through a pipe; then the model is what is wrong.
  const std::string model = folder.write("broken.gguf", "GGUF but no more").string();
  const Outcome piped = run_shell("echo text | " + tool() + " generate --model " + quoted(model) +
                                  " --method full --prompt-file /dev/stdin");
  EXPECT_EQ(piped.code, 1);
  EXPECT_TRUE(says(piped.err, {"broken.gguf"}));
}

TEST(Arguments, AnOutputThatCannotBeIsRefusedBeforeTheWork) {
  const Folder folder;
  const std::string model = folder.write("broken.gguf", "GGUF but no more").string();
  expect_usage_error({"demo", "--model", model, "--json", folder.path("none/out.json").string()},
                     "--json '" + folder.path("none/out.json").string() +
                         "': cannot be written, there is no folder " + folder.path("none").string());
  expect_usage_error({"demo", "--model", model, "--json", folder.path("").string()},
                     "': cannot be written, it is a folder: give the path of a file");
  std::filesystem::create_symlink("none/out.json", folder.path("link"));
  expect_usage_error({"demo", "--model", model, "--json", folder.path("link").string()},
                     "': cannot be written, there is no folder " + folder.path("none").string());
}

// ---- streams
// ---------------------------------------------------------------------------------------------------

TEST(Arguments, AStdoutThatTakesNothingIsExitCode1) {
  for (const char* what : {"--help", "--version", "generate --help", "inspect --help"}) {
    const Outcome full = run_shell(tool() + " " + what + " >/dev/full");
    EXPECT_EQ(full.code, 1) << what;
    EXPECT_TRUE(says(full.err, {"cannot write to stdout", "No space left on device"}));
    const Outcome closed = run_shell(tool() + " " + what + " >&-");
    EXPECT_EQ(closed.code, 1) << what;
    EXPECT_TRUE(says(closed.err, {"cannot write to stdout", "Bad file descriptor"}));
  }
}

TEST(Arguments, AStderrThatTakesNothingChangesNoExitCode) {
  EXPECT_EQ(run_shell(tool() + " fly 2>/dev/full").code, 2);
  EXPECT_EQ(run_shell(tool() + " fly 2>&-").code, 2);
  EXPECT_EQ(run_shell(tool() + " 2>/dev/full").code, 2);
  const Folder folder;
  const std::string model = folder.write("broken.gguf", "GGUF but no more").string();
  EXPECT_EQ(run_shell(tool() + " inspect " + quoted(model) + " 2>/dev/full").code, 1);
}

// ---- with the real model
// ---------------------------------------------------------------------------------------

class ArgumentsWithModel : public RealModel {
 protected:
  static std::string model() { return quoted(model_path()); }
};

TEST_F(ArgumentsWithModel, AFullDiskBehindStdoutIsExitCode1) {
  for (const std::string& what :
       {" inspect " + model(), " inspect --json " + model(),
        " generate --method full --prompt hi --max-new-tokens 2 --model " + model(),
        " generate --method full --prompt hi --max-new-tokens 2 --json --model " + model()}) {
    const Outcome outcome = run_shell(tool() + what + " >/dev/full");
    EXPECT_EQ(outcome.code, 1) << what;
    EXPECT_TRUE(says(outcome.err, {"cannot write to stdout", "No space left on device"}));
  }
  EXPECT_EQ(run_shell(tool() + " inspect " + model() + " >/dev/null").code, 0);
}

TEST_F(ArgumentsWithModel, SignalsEndAnAnswerWithTheirExitCode) {
  for (const auto& [name, code] : {std::pair{"INT", 130}, {"TERM", 143}}) {
    for (const std::string& what : {" generate --method full --prompt 'Tell me a long story.' --temperature "
                                    "1.5 --max-new-tokens 100000 --model " +
                                        model(),
                                    " demo --haystack " + quoted(COMPRESSKV_SOURCE_DIR "/docs/engines.md") +
                                        " --length 2000 --model " + model()}) {
      // Else timeout sends two signals, to its child and to its group: a second one ends the tool at once.
      const Outcome outcome = run_shell(std::string("timeout --foreground --preserve-status -k 60 -s ") +
                                        name + " 2 " + tool() + what + " >/dev/null");
      EXPECT_EQ(outcome.code, code) << what << outcome.err;
      EXPECT_TRUE(says(outcome.err, {"interrupted"}));
    }
  }
}

TEST_F(ArgumentsWithModel, GenerateFindsTheCalibrationOfItsModel) {
  const Arguments start = {"generate",
                           "--model",
                           model_path(),
                           "--json",
                           "--positions",
                           "--max-new-tokens",
                           "3",
                           "--rows",
                           "40",
                           "--prompt",
                           read(COMPRESSKV_SOURCE_DIR "/docs/calibration.md").substr(0, 1200)};
  const auto with = [&](const Arguments& more) {
    Arguments all = start;
    all.insert(all.end(), more.begin(), more.end());
    if (std::find(more.begin(), more.end(), "--method") == more.end()) {
      all.insert(all.end(), {"--method", "compresskv"});
    }
    const Outcome outcome = run_tool(all);
    EXPECT_EQ(outcome.code, 0) << outcome.err;
    return outcome.json();
  };
  const std::string heads = calibration("_head_idx.json").string();
  const std::string errors = calibration("_layer_score.jsonl").string();
  const Json found = with({});
  EXPECT_EQ(found.at("kept_positions"), with({"--heads", heads, "--errors", errors}).at("kept_positions"));
  EXPECT_NE(found.at("kept_positions"),
            with({"--heads", heads}).at("kept_positions"));  // every layer the same
  EXPECT_EQ(std::filesystem::path(found.at("settings").at("heads")).filename(),
            std::filesystem::path(heads).filename());
  EXPECT_EQ(std::filesystem::path(found.at("settings").at("errors")).filename(),
            std::filesystem::path(errors).filename());
  // Raw scores for the methods that weigh them
  const Json weighed = with({"--method", "model-wide"});
  EXPECT_EQ(weighed.at("kept_positions"),
            with({"--method", "model-wide", "--heads", calibration("_head_scores.json").string()})
                .at("kept_positions"));
  // Methods without heads look for none.
  EXPECT_EQ(with({"--method", "snapkv"}).at("settings").at("heads"), Json());
  const Folder folder;
  Arguments elsewhere = start;
  elsewhere.insert(elsewhere.end(), {"--method", "compresskv", "--models-dir", folder.path("none").string()});
  expect_usage_error(elsewhere, "--method compresskv needs --heads: no calibration of this model in '" +
                                    folder.path("none").string());
  elsewhere.at(start.size() + 1) = "q-filter";
  expect_usage_error(elsewhere,
                     "--method q-filter needs --statistics: no query statistics of this model in '" +
                         folder.path("none").string());
  elsewhere.at(start.size() + 1) = "kvzip-heads";
  expect_usage_error(elsewhere,
                     "--method kvzip-heads needs --kv-heads: no scores of KV heads of this model in '" +
                         folder.path("none").string());
}

TEST_F(ArgumentsWithModel, TablesKeepToTheWidthOfTheTerminal) {
  expect_narrow_output({"inspect", model_path()}, "\nKV cache of");
}

/// What appears on a terminal of so many columns.
std::string on_terminal(const std::string& command, std::size_t columns) {
  const Folder folder;
  const std::string typed = folder.path("typed").string();
  run_shell("script -qec " + quoted("stty cols " + std::to_string(columns) + "; unset COLUMNS; " + command) +
            " " + quoted(typed) + " >/dev/null </dev/null");
  return read(typed);
}

TEST_F(ArgumentsWithModel, ProgressIsOneLineThatOnlyGrows) {
  if (std::system("command -v script >/dev/null") != 0) {
    GTEST_SKIP() << "no program `script`, which makes a terminal";
  }
  const Folder folder;
  const std::string text =
      folder.write("text", read(COMPRESSKV_SOURCE_DIR "/docs/calibration.md").substr(0, 1600)).string();
  for (const std::size_t columns : {80U, 40U, 10U}) {
    const std::string seen =
        on_terminal(tool() + " generate --method full --max-new-tokens 1 --prefill-chunk 32 --model " +
                        model() + " --prompt-file " + quoted(text),
                    columns);
    std::size_t lines = 0;
    std::size_t bar = 0;
    for (std::size_t at = seen.find("\r\033[K"); at != std::string::npos;
         at = seen.find("\r\033[K", at + 1)) {
      const std::string line = seen.substr(at + 4, seen.find_first_of("\r\n", at + 4) - at - 4);
      EXPECT_LT(line.size(), columns) << line;
      if (!line.starts_with("prefill")) {
        continue;  // the line was taken away, and the answer follows
      }
      const auto full = static_cast<std::size_t>(std::count(line.begin(), line.end(), '='));
      EXPECT_GE(full, bar) << line;
      bar = std::max(bar, full);
      ++lines;
    }
    EXPECT_GT(lines, 2U) << seen;
  }
}

}  // namespace
}  // namespace ckv_test
