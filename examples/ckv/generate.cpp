// ckv generate: one answer, and what it took.

#include <fmt/core.h>

#include <array>
#include <compresskv/io/calibration_files.hpp>
#include <cstdint>
#include <cstdio>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "arguments.hpp"
#include "commands.hpp"
#include "engine/sha256.hpp"
#include "run.hpp"
#include "terminal.hpp"
#include "usage_error.hpp"

namespace ckv {
namespace {

using Json = nlohmann::ordered_json;

struct GenerateArguments {
  ModelArguments model;
  CacheArguments cache;
  std::string prompt;
  std::filesystem::path prompt_file;
  std::string question;
  std::string method = std::string(info(Method::compresskv).name);
  std::size_t rows = 0;
  double ratio = 0.0;
  std::uint64_t bytes = 0;
  std::filesystem::path heads;
  std::filesystem::path errors;
  std::filesystem::path models_dir = COMPRESSKV_MODELS_DIR;
  std::size_t prefill_chunk = 0;
  std::size_t working_rows = 0;
  std::size_t decode_every = 0;
  std::size_t max_new_tokens = 128;
  engine::SamplerOptions sampling;
  bool raw = false;
  bool json = false;
  bool positions = false;

  // Which of the options were given
  const CLI::Option* prompt_option = nullptr;
  const CLI::Option* rows_option = nullptr;
  const CLI::Option* ratio_option = nullptr;
  const CLI::Option* bytes_option = nullptr;
};

std::optional<compresskv::Budget> budget_of(const GenerateArguments& arguments) {
  if (arguments.rows_option->count() > 0) {
    return compresskv::Budget::tokens_per_layer(arguments.rows);
  }
  if (arguments.ratio_option->count() > 0) {
    try {
      return compresskv::Budget::kept_ratio(arguments.ratio);
    } catch (const compresskv::ArgumentError& error) {
      throw UsageError(fmt::format("--ratio: {}", error.what()));
    }
  }
  if (arguments.bytes_option->count() > 0) {
    return compresskv::Budget::bytes(arguments.bytes);
  }
  return std::nullopt;
}

/// What the options ask for, but what files hold. Throws UsageError before any is opened where they do not go
/// together.
Compression compression_of(const GenerateArguments& arguments) {
  const MethodInfo& method = compresskv::method_named(arguments.method);
  check_engine(arguments.model.engine);
  if (arguments.model.is_llama_cpp()) {
    refuse_with_llama_cpp({{"--prefill-chunk", arguments.prefill_chunk > 0},
                           {"--working-rows", arguments.working_rows > 0},
                           {"--errors", !arguments.errors.empty()}});
    check_method_of_llama_cpp(method.method);
  }
  Compression how{.method = method.method, .budget = budget_of(arguments)};
  arguments.cache.apply_to(how);
  how.working_rows = arguments.working_rows;
  if (how.working_rows > 0 && how.method == Method::full) {
    throw UsageError(fmt::format("--working-rows {} asks for evictions, and --method full has none: drop one",
                                 how.working_rows));
  }
  if (how.working_rows > 0 && reaches_back(how.method)) {
    throw UsageError(fmt::format(
        "--working-rows {} does not go with --method {}, whose layers share rows once they have all come: "
        "drop one",
        how.working_rows, method.name));
  }
  if (const std::string_view why = why_not_while_decoding(how.method);
      arguments.decode_every > 0 && !why.empty()) {
    throw UsageError(
        fmt::format("--decode-every {} compresses each layer again by the last queries, which --method {} "
                    "does not, as it {}: drop one",
                    arguments.decode_every, method.name, why));
  }
  if (how.working_rows > 0 && how.working_rows < window_of(how)) {
    throw UsageError(fmt::format("--working-rows is {}, the window alone is {}: give at least the window",
                                 how.working_rows, window_of(how)));
  }
  if (how.method != Method::full && !how.budget) {
    throw UsageError(
        fmt::format("--method {} needs a budget: give one of --rows, --ratio and --bytes", method.name));
  }
  if (how.method == Method::full) {
    const std::array<std::pair<const char*, bool>, 5> unused = {
        {{"--rows", arguments.rows_option->count() > 0},
         {"--ratio", arguments.ratio_option->count() > 0},
         {"--bytes", arguments.bytes_option->count() > 0},
         {"--heads", !arguments.heads.empty()},
         {"--errors", !arguments.errors.empty()}}};
    for (const auto& [option, given] : unused) {
      if (given) {
        throw UsageError(
            fmt::format("{} has no use with --method full, which keeps the whole cache: drop it, or give "
                        "another method",
                        option));
      }
    }
  }
  return how;
}

/// The calibration to run with: the user's; for a method that needs heads, where none are given, the one made
/// from this model file, with its layer errors unless others are given.
CalibrationFiles calibration_of(const GenerateArguments& arguments, const MethodInfo& method) {
  CalibrationFiles files{.heads = arguments.heads, .errors = arguments.errors};
  if (!files.heads.empty() || !(method.needs_heads || method.needs_scores)) {
    return files;
  }
  const std::optional<CalibrationFiles> found =
      find_calibration(arguments.models_dir, engine::sha256_of_file(arguments.model.model));
  if (!found) {
    throw UsageError(
        fmt::format("--method {} needs --heads: no calibration of this model in '{}'; `ckv calibrate --model "
                    "{} --out DIR` "
                    "makes one",
                    method.name, arguments.models_dir.string(), arguments.model.model.string()));
  }
  files.heads = method.needs_scores ? found->scores : found->heads;
  // As in `evaluate`: the paper's budgets belong to the paper's method. In llama.cpp layers have equal rows.
  if (files.errors.empty() && method.needs_heads && !arguments.model.is_llama_cpp()) {
    files.errors = found->errors;
  }
  return files;
}

/// Reads what the method uses of it.
void load(const CalibrationFiles& files, const MethodInfo& method, Compression& how) {
  if (method.needs_scores) {
    how.scores = compresskv::io::load_head_scores(files.heads);
  }
  if (method.needs_heads) {
    how.heads = compresskv::io::load_head_ranking(files.heads);
  }
  if (!files.errors.empty()) {
    how.errors = compresskv::io::load_layer_errors(files.errors);
  }
}

Json budget_json(const GenerateArguments& arguments) {
  if (arguments.rows_option->count() > 0) {
    return {{"rows", arguments.rows}};
  }
  if (arguments.ratio_option->count() > 0) {
    return {{"ratio", arguments.ratio}};
  }
  if (arguments.bytes_option->count() > 0) {
    return {{"bytes", arguments.bytes}};
  }
  return nullptr;
}

Json count_json(std::size_t count) { return count == 0 ? Json() : Json(count); }

Json file_json(const std::filesystem::path& path) { return path.empty() ? Json() : Json(path.string()); }

Json settings_json(const GenerateArguments& arguments, const CalibrationFiles& files,
                   const ModelEngine& model) {
  return {{"engine", model.engine_name()},
          {"method", arguments.method},
          {"budget", budget_json(arguments)},
          {"heads", file_json(files.heads)},
          {"errors", file_json(files.errors)},
          {"window", arguments.cache.window.value()},
          {"heads_per_layer", arguments.cache.heads_per_layer},
          {"pool", arguments.cache.pool},
          {"kv_type", arguments.cache.kv_type},
          {"prefill_chunk", count_json(arguments.prefill_chunk)},
          {"working_rows", count_json(arguments.working_rows)},
          {"decode_every", count_json(arguments.decode_every)},
          {"threads", model.threads()},
          {"code_path", compresskv::kernel::name(compresskv::kernel::code_path())},
          {"temperature", arguments.sampling.temperature},
          {"top_p", arguments.sampling.top_p},
          {"seed", arguments.sampling.seed},
          {"max_new_tokens", arguments.max_new_tokens},
          {"raw", arguments.raw}};
}

/// A number or a list a layer, and one level more where KV heads differ.
template <class Of>
Json per_layer(const RunResult& result, Of&& of) {
  Json layers = Json::array();
  for (const auto& lists : result.kept) {
    if (lists.size() == 1) {
      layers.push_back(of(lists[0]));
      continue;
    }
    Json heads = Json::array();
    for (const auto& list : lists) {
      heads.push_back(of(list));
    }
    layers.push_back(std::move(heads));
  }
  return layers;
}

Json result_json(const GenerateArguments& arguments, const CalibrationFiles& files, const ModelEngine& model,
                 const std::vector<TokenId>& prompt, const RunResult& result) {
  Json out;
  out["answer"] = result.answer;
  out["prompt_tokens"] = prompt.size();
  if (arguments.positions) {
    out["prompt_token_ids"] = prompt;
  }
  out["answer_tokens"] = result.tokens.size();
  if (arguments.positions) {
    out["answer_token_ids"] = result.tokens;
  }
  out["rows"] = per_layer(result, [](const std::vector<std::uint32_t>& list) { return Json(list.size()); });
  if (arguments.positions) {
    out["kept_positions"] = per_layer(result, [](const auto& list) { return Json(list); });
  }
  out["kv_bytes_full"] = result.kv_bytes_full;
  out["kv_bytes_kept"] = result.kv_bytes_kept;
  out["kv_bytes_peak"] = result.kv_bytes_peak;
  out["rows_peak"] = result.rows_peak;
  out["prefill_ms"] = result.prefill_ms;
  out["compress_ms"] = result.compress_ms;
  out["decode_tokens_per_second"] = result.decode_tokens_per_second();
  out["model_sha256"] = engine::sha256_of_file(arguments.model.model);
  out["settings"] = settings_json(arguments, files, model);
  return out;
}

/// Throws UsageError where the budget cannot be met.
void check_budget(const Compression& how, const compresskv::ModelShape& shape, std::size_t prompt_tokens) {
  if (!how.budget || how.method == Method::full) {
    return;
  }
  try {
    how.budget->validate(window_of(how), shape);
  } catch (const compresskv::ArgumentError& error) {
    throw UsageError(error.what());
  }
  const std::size_t rows = how.budget->resolve(prompt_tokens, window_of(how), shape);
  if (how.working_rows > 0 && rows > how.working_rows) {
    throw UsageError(fmt::format(
        "--working-rows is {}, the budget is {} rows a layer of a prompt of {} tokens: give at least that",
        how.working_rows, rows, prompt_tokens));
  }
}

void generate(const GenerateArguments& arguments) {
  Compression how = compression_of(arguments);
  const MethodInfo& method = info(how.method);
  const std::string text =
      arguments.prompt_option->count() > 0
          ? checked_text(arguments.prompt, "--prompt")
          : checked_text(read_text_file(arguments.prompt_file),
                         fmt::format("--prompt-file '{}'", arguments.prompt_file.string()));
  const std::string question = checked_text(arguments.question, "--question");
  const CalibrationFiles files = calibration_of(arguments, method);
  load(files, method, how);
  const std::unique_ptr<ModelEngine> model =
      load_engine(arguments.model.engine, arguments.model.model, arguments.model.threads);
  check_interrupt();
  const std::vector<TokenId> prompt =
      arguments.raw ? encode_prompt(*model, text)
                    : encode_prompt(*model, chat_prompt(*model, message_text(text, question)));
  if (how.method != Method::full) {
    const compresskv::ModelShape shape = model->shape(arguments.cache.type());
    check_calibration(files.heads, files.errors, shape);
    check_budget(how, shape, prompt.size());
  }

  const std::size_t chunks = arguments.prefill_chunk == 0
                                 ? 1
                                 : (prompt.size() + arguments.prefill_chunk - 1) / arguments.prefill_chunk;
  Progress progress{"prefill", static_cast<double>(model->layers()) * static_cast<double>(chunks)};
  RunOptions options{.kv_type = arguments.cache.type(),
                     .prefill_chunk = arguments.prefill_chunk,
                     .decode_every = arguments.decode_every,
                     .max_new_tokens = arguments.max_new_tokens,
                     .sampling = arguments.sampling};
  options.on_layer = [&](std::size_t layers) { progress.show(static_cast<double>(layers)); };
  options.on_text = [&](std::string_view part) {
    progress.clear();
    if (!arguments.json) {
      fmt::print("{}", part);
      flush_stdout();
    }
  };
  const RunResult result = model->run(prompt, how, options);
  progress.clear();
  if (arguments.json) {
    // An answer cut off by the token limit may end inside a character.
    fmt::print("{}\n", result_json(arguments, files, *model, prompt, result)
                           .dump(-1, ' ', false, Json::error_handler_t::replace));
  } else {
    fmt::print("\n");
  }
}

}  // namespace

void add_generate(CLI::App& app) {
  CLI::App* command = app.add_subcommand("generate", "Answer a prompt from a full or a compressed cache");
  const auto arguments = std::make_shared<GenerateArguments>();
  arguments->model.add_to(*command);

  CLI::Option_group* text = command->add_option_group("Prompt", "One of these");
  arguments->prompt_option = text->add_option("--prompt", arguments->prompt, "The text itself");
  text->add_option("--prompt-file", arguments->prompt_file, "A file that holds the text")->type_name("FILE");
  text->require_option(1);
  CLI::Option* question = command->add_option(
      "--question", arguments->question,
      "Asked after the text, through the model's chat template; without it the text alone is the message");
  command
      ->add_flag(
          "--raw", arguments->raw,
          "Feed the text as it is, without chat template: special tokens in it are recognised, none added")
      ->excludes(question);

  command
      ->add_option("--method", arguments->method,
                   "What is kept of the cache at the end of prefill:\n" + method_help())
      ->check(CLI::IsMember(method_names()))
      ->capture_default_str();
  CLI::Option_group* budget = command->add_option_group(
      "Budget", "How much to keep, window included: one of these; `full` takes none");
  arguments->rows_option =
      budget->add_option("--rows", arguments->rows, "Rows a layer, on average")->check(CLI::PositiveNumber);
  arguments->ratio_option =
      budget->add_option("--ratio", arguments->ratio, "Share of the prompt that is kept, in (0, 1]");
  arguments->bytes_option = budget
                                ->add_option("--bytes", arguments->bytes,
                                             "Bytes of keys and values over all layers; 2MiB, 500kB, ...")
                                ->transform(byte_count());
  budget->require_option(0, 1);

  command
      ->add_option(
          "--heads", arguments->heads,
          "For the compresskv methods: head ranking or raw head scores, as `ckv calibrate` writes them; "
          "default: those in --models-dir made from this model file, and their layer errors")
      ->type_name("FILE");
  command
      ->add_option("--errors", arguments->errors,
                   "Layer errors, by which layers share the budget; with --heads alone: every layer the "
                   "same. pyramidkv "
                   "and cake have budgets of their own")
      ->type_name("FILE");
  command->add_option("--models-dir", arguments->models_dir, "Folder of calibrations, one folder a model")
      ->type_name("DIR");
  CLI::Option* chunk = command
                           ->add_option("--prefill-chunk", arguments->prefill_chunk,
                                        "Read the prompt so many tokens at a time; the answer stays the same")
                           ->check(CLI::PositiveNumber);
  command
      ->add_option(
          "--working-rows", arguments->working_rows,
          "For prompts longer than memory: compress every layer to so many rows after each chunk, and "
          "to the budget after the last; without: after the last alone")
      ->check(CLI::PositiveNumber)
      ->needs(chunk);
  command
      ->add_option("--decode-every", arguments->decode_every,
                   "For long answers: compress to the budget again after so many generated tokens")
      ->check(CLI::PositiveNumber);
  arguments->cache.add_to(*command);
  command->add_option("--max-new-tokens", arguments->max_new_tokens, "Longest answer")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command->add_option("--temperature", arguments->sampling.temperature, "0: always the likeliest token")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command
      ->add_option("--top-p", arguments->sampling.top_p, "Sample among the likeliest that make up this share")
      ->check(share())
      ->capture_default_str();
  command->add_option("--seed", arguments->sampling.seed, "Of the sampling")->capture_default_str();
  CLI::Option* json = command->add_flag("--json", arguments->json,
                                        "Print one JSON object: the answer, rows, bytes, times, settings");
  command
      ->add_flag("--positions", arguments->positions,
                 "With --json: token ids, and which positions each layer kept")
      ->needs(json);
  command->footer(
      "Example:\n  ckv generate --model M.gguf --prompt-file book.txt --question 'Who is Ishmael?' --ratio "
      "0.12\nA model without a calibration in --models-dir: add --heads M_head_idx.json --errors "
      "M_layer_score.jsonl.");
  command->callback([arguments] {
    arguments->cache.fill(compresskv::method_named(arguments->method).method);
    generate(*arguments);
  });
}

}  // namespace ckv
