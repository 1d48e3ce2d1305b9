// ckv demo: one question to one long text, from the full cache and from smaller and smaller ones.

#include <fmt/core.h>

#include <compresskv/io/calibration_files.hpp>
#include <cstddef>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "arguments.hpp"
#include "commands.hpp"
#include "engine/error.hpp"
#include "engine/sha256.hpp"
#include "needle.hpp"
#include "run.hpp"
#include "terminal.hpp"
#include "usage_error.hpp"

namespace ckv {
namespace {

using Json = nlohmann::ordered_json;
constexpr double mebibyte = 1024.0 * 1024.0;

struct DemoArguments {
  ModelArguments model;
  CacheArguments cache;
  std::filesystem::path prompt_file;
  std::string question;
  std::string expect;
  std::filesystem::path haystack;
  std::size_t length = 2000;
  double depth = 0.4;
  std::vector<double> ratios = {0.25, 0.12, 0.06, 0.03};
  std::filesystem::path heads;
  std::filesystem::path errors;
  std::filesystem::path models_dir = COMPRESSKV_MODELS_DIR;
  bool uniform = false;
  std::size_t max_new_tokens = 32;
  std::filesystem::path json;
};

/// The rankings to run with: the user's, else the ones found; errors only as asked for.
Compression compression_of(const DemoArguments& arguments, const std::string& sha256) {
  CalibrationFiles files{.heads = arguments.heads, .errors = arguments.errors};
  // In llama.cpp layers have equal rows.
  const bool uniform = arguments.uniform || arguments.model.is_llama_cpp();
  if (files.heads.empty()) {
    const std::optional<CalibrationFiles> found = find_calibration(arguments.models_dir, sha256);
    if (!found) {
      throw UsageError(fmt::format(
          "no calibration of this model in '{}': make one with `ckv calibrate --model {} --out DIR` "
          "and name it with --heads and --errors",
          arguments.models_dir.string(), arguments.model.model.string()));
    }
    files.heads = found->heads;
    files.scores = found->scores;
    files.errors = files.errors.empty() ? found->errors : files.errors;
  }
  Compression how{.method = Method::compresskv, .heads = compresskv::io::load_head_ranking(files.heads)};
  try {
    how.scores = compresskv::io::load_head_scores(files.scores.empty() ? files.heads : files.scores);
  } catch (const compresskv::FileError&) {
    // A bare ranking is enough for all but the blend, which the demo then leaves out.
  }
  if (!uniform && !files.errors.empty()) {
    how.errors = compresskv::io::load_layer_errors(files.errors);
  }
  arguments.cache.apply_to(how);
  return how;
}

struct Question {
  std::vector<TokenId> tokens;
  std::optional<compresskv::calibrate::TokenSpan> needle;
  std::string text;
  std::string expect;
};

Question ask(const DemoArguments& arguments, const ModelEngine& loaded) {
  if (!arguments.prompt_file.empty()) {
    const std::string text =
        message_text(checked_text(read_text_file(arguments.prompt_file),
                                  fmt::format("--prompt-file '{}'", arguments.prompt_file.string())),
                     checked_text(arguments.question, "--question"));
    return {.tokens = encode_prompt(loaded, chat_prompt(loaded, text)),
            .needle = std::nullopt,
            .text = arguments.question,
            .expect = arguments.expect};
  }
  const Needle& needle = demo_needle();
  NeedlePrompt prompt = needle_prompt(loaded, Haystack::from(arguments.haystack), needle,
                                      {.tokens = arguments.length, .depth = arguments.depth});
  return {.tokens = std::move(prompt.tokens),
          .needle = prompt.needle,
          .text = std::string(needle.question),
          .expect = std::string(needle.expect)};
}

/// An answer as a cell of a table.
std::string one_line(std::string_view answer, std::size_t width) {
  std::string line;
  for (const char c : answer) {
    line += c == '\n' || c == '\t' || c == '\r' ? ' ' : c;
  }
  return cut(line, width).size() == line.size() ? line : std::string(cut(line, width - 3)) + "...";
}

std::optional<bool> right(const Question& question, const RunResult& result) {
  return question.expect.empty() ? std::nullopt : std::optional(holds(result.answer, question.expect));
}

Table table() {
  return Table{{{.title = "method", .width = 11, .left = true},
                {.title = "kept", .width = 6},
                {.title = "right", .width = 7},
                {.title = "KV MiB", .width = 9},
                {.title = "peak MiB", .width = 9},
                {.title = "compress ms", .width = 18},
                {.title = "tokens/s", .width = 10},
                {.title = "  answer", .width = 20, .left = true}}};
}

void print_row(const Table& table, const MethodInfo& method, double share, const Question& question,
               const RunResult& result) {
  const std::optional<bool> is_right = right(question, result);
  const std::string compress = method.method != Method::full
                                   ? fmt::format("{:.1f} ({:.2f} %)", result.compress_ms,
                                                 100.0 * result.compress_ms / result.prefill_ms)
                                   : std::string("-");
  table.row({std::string(method.name), fmt::format("{:.0f} %", 100.0 * share),
             is_right ? (*is_right ? "yes" : "no") : "-",
             fmt::format("{:.2f}", static_cast<double>(result.kv_bytes_kept) / mebibyte),
             fmt::format("{:.2f}", static_cast<double>(result.kv_bytes_peak) / mebibyte), compress,
             fmt::format("{:.1f}", result.decode_tokens_per_second()), "  " + one_line(result.answer, 100)});
  flush_stdout();
}

Json run_json(const MethodInfo& method, double share, const Question& question, const RunResult& result) {
  Json run = {{"method", method.name}, {"kept", share}, {"answer", result.answer}, {"right", nullptr}};
  if (const std::optional<bool> is_right = right(question, result)) {
    run["right"] = *is_right;
  }
  run["kv_bytes_full"] = result.kv_bytes_full;
  run["kv_bytes_kept"] = result.kv_bytes_kept;
  run["kv_bytes_peak"] = result.kv_bytes_peak;
  run["prefill_ms"] = result.prefill_ms;
  run["compress_ms"] = result.compress_ms;
  run["decode_tokens_per_second"] = result.decode_tokens_per_second();
  for (const auto& lists : result.kept) {
    // Every method here keeps one set of positions for all KV heads of a layer.
    run["kept_positions"].push_back(lists.front());
  }
  return run;
}

void demo(const DemoArguments& arguments) {
  for (const double ratio : arguments.ratios) {
    if (!(ratio > 0.0 && ratio <= 1.0)) {
      throw UsageError(fmt::format("--ratios has {}: each is a share kept, in (0, 1]", ratio));
    }
  }
  if (!arguments.json.empty()) {
    check_writable("--json", arguments.json);
  }
  check_engine(arguments.model.engine);
  if (arguments.model.is_llama_cpp()) {
    refuse_with_llama_cpp({{"--errors", !arguments.errors.empty()}});
  }
  const std::string sha256 = engine::sha256_of_file(arguments.model.model);
  const Compression compresskv_way = compression_of(arguments, sha256);
  const std::unique_ptr<ModelEngine> model =
      load_engine(arguments.model.engine, arguments.model.model, arguments.model.threads);
  check_interrupt();
  const Question question = ask(arguments, *model);

  fmt::print("{}: {} tokens", arguments.model.model.filename().string(), question.tokens.size());
  if (question.needle) {
    fmt::print("; hidden {:.0f} % deep: \"{}\"", 100.0 * arguments.depth, demo_needle().fact);
  }
  fmt::print("\nQuestion: {}\n\n", question.text.empty() ? "(the text itself)" : question.text);
  const Table rows = table();
  flush_stdout();

  Json out = {{"model", arguments.model.model.filename().string()},
              {"model_sha256", sha256},
              {"engine", model->engine_name()},
              {"prompt_tokens", question.tokens.size()},
              {"layers", model->layers()},
              {"question", question.text},
              {"budgets", compresskv_way.errors ? "by layer error" : "uniform"},
              {"needle", nullptr}};
  if (question.needle) {
    out["needle"] = {{"first", question.needle->first}, {"last", question.needle->last}};
  }

  std::vector<std::pair<Method, double>> todo = {{Method::full, 1.0}};
  for (const Method method : {Method::blend, Method::compresskv, Method::streaming}) {
    if (info(method).needs_scores && !compresskv_way.scores) {
      continue;
    }
    for (const double ratio : arguments.ratios) {
      todo.emplace_back(method, ratio);
    }
  }
  Progress progress{"demo", static_cast<double>(todo.size())};
  for (std::size_t i = 0; i < todo.size(); ++i) {
    const auto [method, share] = todo[i];
    const auto layers = static_cast<double>(model->layers());
    RunOptions options{.kv_type = arguments.cache.type(), .max_new_tokens = arguments.max_new_tokens};
    options.on_layer = [&](std::size_t done) {
      progress.show(static_cast<double>(i) + static_cast<double>(done) / layers, info(todo[i].first).name);
    };
    Compression how = compresskv_way;
    how.method = method;
    if (method != Method::compresskv) {
      how.errors.reset();
    }
    how.budget = compresskv::Budget::kept_ratio(share);
    const RunResult result = model->run(question.tokens, how, options);
    progress.clear();
    print_row(rows, info(method), share, question, result);
    out["runs"].push_back(run_json(info(method), share, question, result));
  }
  fmt::print("\n");
  print_text(
      "compress ms: all the library's work and giving the memory back; in brackets its share of prefill");
  if (!arguments.json.empty()) {
    write_text_file(arguments.json, out.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n");
  }
}

}  // namespace

void add_demo(CLI::App& app) {
  CLI::App* command = app.add_subcommand(
      "demo", "Ask for a needle in a long text, from the full cache down to a few per cent of it");
  const auto arguments = std::make_shared<DemoArguments>();
  arguments->model.add_to(*command);
  CLI::Option* file =
      command
          ->add_option("--prompt-file", arguments->prompt_file, "A text of your own instead of the haystack")
          ->type_name("FILE");
  command->add_option("--question", arguments->question, "What to ask about your text")->needs(file);
  command
      ->add_option("--expect", arguments->expect,
                   "What a right answer about your text holds; capitals do not matter")
      ->needs(file);
  command
      ->add_option(
          "--haystack", arguments->haystack,
          "A long text to hide the needle in; default: the King James text, from the program `bible`")
      ->type_name("FILE")
      ->excludes(file);
  command->add_option("--length", arguments->length, "Tokens of the prompt with the needle")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command->add_option("--depth", arguments->depth, "Where the needle lies: 0 first, 1 last")
      ->check(share())
      ->capture_default_str();
  command->add_option("--ratios", arguments->ratios, "Shares of the cache to keep")
      ->delimiter(',')
      ->capture_default_str();
  command
      ->add_option("--heads", arguments->heads,
                   "Head ranking or raw scores; default: the one in --models-dir made from this model file")
      ->type_name("FILE");
  command->add_option("--errors", arguments->errors, "Layer errors; default: as with --heads")
      ->type_name("FILE");
  command->add_flag("--uniform", arguments->uniform, "Give every layer the same budget");
  command->add_option("--models-dir", arguments->models_dir, "Folder of calibrations, one folder a model")
      ->type_name("DIR");
  arguments->cache.add_to(*command);
  command->add_option("--max-new-tokens", arguments->max_new_tokens, "Longest answer")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command->add_option("--json", arguments->json, "Write all of it, kept positions too, to this file")
      ->type_name("FILE");
  command->callback([arguments] { demo(*arguments); });
}

}  // namespace ckv
