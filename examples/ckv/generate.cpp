// ckv generate: one answer, and what it took.

#include <fmt/core.h>

#include <array>
#include <compresskv/io/calibration_files.hpp>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "arguments.hpp"
#include "commands.hpp"
#include "engine/error.hpp"
#include "engine/sha256.hpp"
#include "run.hpp"
#include "saved_context.hpp"
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
  std::string method = std::string(info(Method::blend).name);
  std::size_t rows = 0;
  double ratio = 0.0;
  std::uint64_t bytes = 0;
  std::filesystem::path heads;
  std::filesystem::path errors;
  std::filesystem::path statistics;
  std::filesystem::path kv_heads;
  std::filesystem::path surrogate;
  std::optional<float> threshold;
  std::filesystem::path models_dir = COMPRESSKV_MODELS_DIR;
  std::size_t prefill_chunk = 0;
  std::size_t working_rows = 0;
  std::size_t decode_every = 0;
  std::optional<double> lambda;
  std::optional<double> cosine;
  std::size_t max_new_tokens = 128;
  engine::SamplerOptions sampling;
  bool raw = false;
  bool json = false;
  bool positions = false;
  std::filesystem::path save_cache;
  std::filesystem::path load_cache;
  std::string budget;  ///< "rows", "ratio" or "bytes", as the option that was given; empty: none

  // Which of the options were given
  const CLI::App* command = nullptr;
  bool given(const char* option) const { return command->get_option(option)->count() > 0; }
};

std::optional<compresskv::Budget> budget_of(const GenerateArguments& arguments) {
  if (arguments.budget == "rows") {
    return compresskv::Budget::tokens_per_layer(arguments.rows);
  }
  if (arguments.budget == "ratio") {
    try {
      return compresskv::Budget::kept_ratio(arguments.ratio);
    } catch (const compresskv::ArgumentError& error) {
      throw UsageError(fmt::format("--ratio: {}", error.what()));
    }
  }
  if (arguments.budget == "bytes") {
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
  const std::array<std::tuple<const char*, std::optional<double>, float*>, 2> of_rkv = {
      {{"--lambda", arguments.lambda, &how.lambda}, {"--cosine", arguments.cosine, &how.threshold}}};
  for (const auto& [option, given, number] : of_rkv) {
    if (given && how.method != Method::rkv) {
      throw UsageError(fmt::format(
          "{} is an option of --method rkv and has no use with --method {}: drop one", option, method.name));
    }
    if (given) {
      *number = static_cast<float>(*given);
    }
  }
  if (how.method == Method::rkv) {
    try {
      static_cast<void>(compresskv::score::RKv{{.lambda = how.lambda, .threshold = how.threshold}});
    } catch (const compresskv::ArgumentError& error) {
      throw UsageError(error.what());
    }
  }
  how.working_rows = arguments.working_rows;
  how.score_threshold = arguments.threshold;
  if (how.score_threshold && !method.needs_surrogate) {
    throw UsageError(
        fmt::format("--threshold is for kvzap, the method is {}: drop it, or give that one", method.name));
  }
  if (how.score_threshold && !how.budget) {
    // What is kept, the threshold says alone.
    how.budget = how.working_rows > 0 ? compresskv::Budget::tokens_per_layer(how.working_rows)
                                      : compresskv::Budget::kept_ratio(1.0);
  }
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
  if (arguments.decode_every >= arguments.max_new_tokens && arguments.decode_every > 0) {
    throw UsageError(
        fmt::format("--decode-every {} would compress again after {} generated tokens, --max-new-tokens {} "
                    "ends the answer before: give fewer, or a longer answer",
                    arguments.decode_every, arguments.decode_every, arguments.max_new_tokens));
  }
  if (how.working_rows > 0 && how.working_rows < window_of(how)) {
    throw UsageError(fmt::format("--working-rows is {}, the window alone is {}: give at least the window",
                                 how.working_rows, window_of(how)));
  }
  if (how.method != Method::full && !how.budget) {
    throw UsageError(fmt::format("--method {} needs a budget: give one of --rows, --ratio and --bytes{}",
                                 method.name, method.needs_surrogate ? ", or --threshold" : ""));
  }
  if (how.method == Method::full) {
    const std::array<std::pair<const char*, bool>, 8> unused = {
        {{"--rows", arguments.budget == "rows"},
         {"--ratio", arguments.budget == "ratio"},
         {"--bytes", arguments.budget == "bytes"},
         {"--heads", !arguments.heads.empty()},
         {"--errors", !arguments.errors.empty()},
         {"--statistics", !arguments.statistics.empty()},
         {"--kv-heads", !arguments.kv_heads.empty()},
         {"--surrogate", !arguments.surrogate.empty()}}};
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

/// The calibration that the user names.
CalibrationFiles calibration_given(const GenerateArguments& arguments) {
  return {.heads = arguments.heads,
          .errors = arguments.errors,
          .statistics = arguments.statistics,
          .kv_heads = arguments.kv_heads,
          .surrogate = arguments.surrogate};
}

/// The calibration to run with: the user's; of what a method needs and is not given, the one made from this
/// model file, with its layer errors for heads unless others are given.
CalibrationFiles calibration_of(const GenerateArguments& arguments, const MethodInfo& method) {
  CalibrationFiles files = calibration_given(arguments);
  const bool looks_for = std::ranges::any_of(measured_when_asked, [&](const MeasuredWhenAsked& row) {
    return method.*row.needed && (files.*row.file).empty();
  });
  if (looks_for) {
    const CalibrationFiles found =
        find_calibration(arguments.models_dir, engine::sha256_of_file(arguments.model.model))
            .value_or(CalibrationFiles{});
    for (const MeasuredWhenAsked& row : measured_when_asked) {
      if (method.*row.needed && (files.*row.file).empty()) {
        files.*row.file = found.*row.file;
      }
    }
    check_measured(files, method, fmt::format("--method {}", method.name), arguments.models_dir,
                   arguments.model.model);
  }
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
  if (method.needs_statistics) {
    how.statistics = compresskv::io::load_query_statistics(files.statistics);
  }
  if (method.needs_kv_scores) {
    how.kv_scores = compresskv::io::load_head_scores(files.kv_heads);
  }
  if (method.needs_surrogate) {
    how.surrogate = compresskv::io::load_surrogate(files.surrogate);
  }
  if (!files.errors.empty()) {
    how.errors = compresskv::io::load_layer_errors(files.errors);
  }
}

Json budget_json(const GenerateArguments& arguments) {
  if (arguments.budget == "rows") {
    return {{"rows", arguments.rows}};
  }
  if (arguments.budget == "ratio") {
    return {{"ratio", arguments.ratio}};
  }
  if (arguments.budget == "bytes") {
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
          {"statistics", file_json(files.statistics)},
          {"kv_heads", file_json(files.kv_heads)},
          {"surrogate", file_json(files.surrogate)},
          {"threshold", arguments.threshold ? Json(*arguments.threshold) : Json()},
          {"window", arguments.cache.window.value()},
          {"heads_per_layer", arguments.cache.heads_per_layer},
          {"pool", arguments.cache.pool},
          {"kv_type", arguments.cache.kv_type},
          {"prefill_chunk", count_json(arguments.prefill_chunk)},
          {"working_rows", count_json(arguments.working_rows)},
          {"decode_every", count_json(arguments.decode_every)},
          {"lambda", arguments.lambda ? Json(*arguments.lambda) : Json()},
          {"cosine", arguments.cosine ? Json(*arguments.cosine) : Json()},
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

/// `answered`: there is an answer, not a cache alone that was saved.
Json result_json(const GenerateArguments& arguments, const CalibrationFiles& files, const ModelEngine& model,
                 const std::vector<TokenId>& prompt, const RunResult& result, bool answered = true) {
  Json out;
  if (answered) {
    out["answer"] = result.answer;
  }
  out["prompt_tokens"] = prompt.size();
  if (arguments.positions) {
    out["prompt_token_ids"] = prompt;
  }
  if (answered) {
    out["answer_tokens"] = result.tokens.size();
    if (arguments.positions) {
      out["answer_token_ids"] = result.tokens;
    }
  }
  out["rows"] = per_layer(result, [](const std::vector<std::uint32_t>& list) { return Json(list.size()); });
  if (arguments.positions) {
    out["kept_positions"] = per_layer(result, [](const auto& list) { return Json(list); });
  }
  out["kv_bytes_full"] = result.kv_bytes_full;
  out["kv_bytes_kept"] = result.kv_bytes_kept;
  out["kv_bytes_peak"] = result.kv_bytes_peak;
  if (answered) {
    out["rows_peak"] = result.rows_peak;
  }
  out["prefill_ms"] = result.prefill_ms;
  out["compress_ms"] = result.compress_ms;
  if (answered) {
    out["decode_tokens_per_second"] = result.decode_tokens_per_second();
  }
  if (!arguments.save_cache.empty() || !arguments.load_cache.empty()) {
    out["cache"] =
        arguments.save_cache.empty() ? arguments.load_cache.string() : arguments.save_cache.string();
  }
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

/// Options whose value a saved cache says.
constexpr std::array<const char*, 13> said_by_cache = {
    "--method", "--rows",    "--ratio",    "--bytes",           "--window",
    "--pool",   "--kv-type", "--raw",      "--heads-per-layer", "--working-rows",
    "--lambda", "--cosine",  "--threshold"};

/// Throws UsageError where options do not go with a cache that is saved or loaded.
void check_saving(const GenerateArguments& arguments) {
  const bool saves = !arguments.save_cache.empty();
  const bool loads = !arguments.load_cache.empty();
  if (!saves && !loads) {
    return;
  }
  const char* const option = saves ? "--save-cache" : "--load-cache";
  check_engine(arguments.model.engine);
  if (arguments.model.is_llama_cpp()) {
    refuse_with_llama_cpp({{option, true}});
  }
  if (saves && loads) {
    throw UsageError("--save-cache and --load-cache do not go together: a loaded cache is saved already");
  }
  if (saves && arguments.raw) {
    throw UsageError(
        "--save-cache does not go with --raw: what is asked later comes through the chat template");
  }
  if (saves && arguments.question.empty() && arguments.decode_every > 0) {
    throw UsageError("--decode-every has no use with --save-cache alone: give it where the cache is asked");
  }
  if (loads && arguments.question.empty()) {
    throw UsageError("--load-cache needs --question: what is asked of the text that was saved");
  }
  for (const char* const said : said_by_cache) {
    if (loads && arguments.given(said)) {
      throw UsageError(fmt::format("{} has no use with --load-cache, whose file says it: drop it", said));
    }
  }
  if (loads && arguments.given("--prefill-chunk")) {
    throw UsageError("--prefill-chunk has no use with --load-cache: the text was read already; drop it");
  }
  if (saves) {
    check_writable("--save-cache", arguments.save_cache);
  }
}

/// What decides what a cache holds, beside the method, its budget and its calibration.
nlohmann::json saved_settings(const GenerateArguments& arguments) {
  nlohmann::json settings = {{"window", arguments.cache.window.value()},
                             {"heads_per_layer", arguments.cache.heads_per_layer},
                             {"pool", arguments.cache.pool},
                             {"kv_type", arguments.cache.kv_type},
                             {"prefill_chunk", arguments.working_rows == 0 ? 0 : arguments.prefill_chunk},
                             {"working_rows", arguments.working_rows}};
  // Caches of methods without these are those of before.
  if (arguments.lambda) {
    settings["lambda"] = *arguments.lambda;
  }
  if (arguments.cosine) {
    settings["cosine"] = *arguments.cosine;
  }
  if (arguments.threshold) {
    settings["threshold"] = *arguments.threshold;
  }
  return settings;
}

/// The arguments with which a cache was saved. Throws engine::Error where the file names none that there are.
GenerateArguments arguments_of(const GenerateArguments& given, const ContextOrigin& origin) {
  GenerateArguments arguments = given;
  try {
    arguments.method = compresskv::method_named(origin.method).name;
    if (!origin.budget.is_null()) {
      arguments.budget =
          origin.budget.is_object() && origin.budget.size() == 1 ? origin.budget.begin().key() : "";
      arguments.rows = origin.budget.value("rows", arguments.rows);
      arguments.ratio = origin.budget.value("ratio", arguments.ratio);
      arguments.bytes = origin.budget.value("bytes", arguments.bytes);
    }
    const nlohmann::json& settings = origin.settings;
    arguments.cache.window = settings.at("window").get<std::size_t>();
    settings.at("heads_per_layer").get_to(arguments.cache.heads_per_layer);
    settings.at("pool").get_to(arguments.cache.pool);
    settings.at("kv_type").get_to(arguments.cache.kv_type);
    settings.at("prefill_chunk").get_to(arguments.prefill_chunk);
    settings.at("working_rows").get_to(arguments.working_rows);
    if (settings.contains("lambda")) {
      arguments.lambda = settings.at("lambda").get<double>();
    }
    if (settings.contains("cosine")) {
      arguments.cosine = settings.at("cosine").get<double>();
    }
    if (settings.contains("threshold")) {
      arguments.threshold = settings.at("threshold").get<float>();
    }
    arguments.cache.type();
  } catch (const std::exception& error) {
    throw engine::Error(fmt::format("{}: what it says of its origin cannot be used: {}",
                                    given.load_cache.string(), error.what()));
  }
  const auto unless_given = [](std::filesystem::path& path, const std::filesystem::path& was) {
    path = path.empty() ? was : path;
  };
  unless_given(arguments.heads, origin.calibration.heads);
  unless_given(arguments.errors, origin.calibration.errors);
  unless_given(arguments.statistics, origin.calibration.statistics);
  unless_given(arguments.kv_heads, origin.calibration.kv_heads);
  unless_given(arguments.surrogate, origin.calibration.surrogate);
  return arguments;
}

/// What is seen of a run while it goes on.
RunOptions shown_run(const GenerateArguments& arguments, Progress& progress) {
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
  return options;
}

double layers_to_read(const GenerateArguments& arguments, const ModelEngine& model, std::size_t tokens) {
  const std::size_t chunks =
      arguments.prefill_chunk == 0 ? 1 : (tokens + arguments.prefill_chunk - 1) / arguments.prefill_chunk;
  return static_cast<double>(model.layers()) * static_cast<double>(chunks);
}

void print_result(const GenerateArguments& arguments, const CalibrationFiles& files, const ModelEngine& model,
                  const std::vector<TokenId>& prompt, const RunResult& result, bool answered = true) {
  if (arguments.json) {
    // An answer cut off by the token limit may end inside a character.
    fmt::print("{}\n", result_json(arguments, files, model, prompt, result, answered)
                           .dump(-1, ' ', false, Json::error_handler_t::replace));
  } else if (answered) {
    fmt::print("\n");
  } else {
    fmt::print("{}: {} tokens, {} of {} bytes of cache\n", arguments.save_cache.string(), prompt.size(),
               result.kv_bytes_kept, result.kv_bytes_full);
  }
}

/// Asks a context and prints what it answers.
void ask_and_print(const GenerateArguments& arguments, const CalibrationFiles& files,
                   const LoadedModel& model, const Compression& how, const std::string& text,
                   Context& context, const RunOptions& options, Progress& progress) {
  const std::vector<TokenId> rest = rest_of_chat(model, text, context.tokens, arguments.question);
  if (arguments.decode_every > 0 && rest.size() + arguments.decode_every < window_of(how)) {
    throw UsageError(fmt::format(
        "--decode-every {} compresses again {} tokens behind the text, fewer than the window of {}: give at "
        "least {}",
        arguments.decode_every, rest.size() + arguments.decode_every, window_of(how),
        window_of(how) - rest.size()));
  }
  std::vector<TokenId> prompt = context.tokens;
  prompt.insert(prompt.end(), rest.begin(), rest.end());
  const RunResult result = ask(model, context, rest, how, options);
  progress.clear();
  print_result(arguments, files, model, prompt, result);
}

std::filesystem::path from_anywhere(const std::filesystem::path& file) {
  return file.empty() ? file : std::filesystem::absolute(file);
}

/// Reads and compresses a text, saves it, and where there is a question asks it.
void save_and_ask(const GenerateArguments& arguments, const CalibrationFiles& files, const LoadedModel& model,
                  const Compression& how, const std::string& text) {
  const std::vector<TokenId> tokens = context_tokens(model, text);
  if (how.method != Method::full) {
    check_budget(how, model.shape(arguments.cache.type()), tokens.size());
  }
  if (!arguments.question.empty()) {
    rest_of_chat(model, text, tokens, arguments.question);  // refuses before the work
  }
  Progress progress{"prefill", layers_to_read(arguments, model, tokens.size())};
  const RunOptions options = shown_run(arguments, progress);
  Context context = read_context(model, tokens, how, options);
  const ContextOrigin origin{.model_sha256 = engine::sha256_of_file(arguments.model.model),
                             .text = text,
                             .tokens = tokens,
                             .method = arguments.method,
                             .budget = budget_json(arguments),
                             .settings = saved_settings(arguments),
                             .calibration = {.heads = from_anywhere(files.heads),
                                             .errors = from_anywhere(files.errors),
                                             .statistics = from_anywhere(files.statistics),
                                             .kv_heads = from_anywhere(files.kv_heads),
                                             .surrogate = from_anywhere(files.surrogate)}};
  write_text_file(arguments.save_cache, save_context(origin, model, how, context));
  if (!arguments.question.empty()) {
    ask_and_print(arguments, files, model, how, text, context, options, progress);
    return;
  }
  progress.clear();
  context.result.kv_bytes_full =
      engine::Sequence::full_cache_bytes(model.model.config(), arguments.cache.type(), tokens.size());
  context.result.kv_bytes_kept = context.sequence.cache_bytes();
  context.result.kv_bytes_peak = context.sequence.prefill_peak_cache_bytes();
  print_result(arguments, files, model, tokens, context.result, false);
}

/// Asks a text that was saved.
void load_and_ask(const GenerateArguments& given) {
  const SavedContext saved(given.load_cache, read_text_file(given.load_cache));
  const ContextOrigin& origin = saved.origin();
  const std::string sha256 = engine::sha256_of_file(given.model.model);
  if (origin.model_sha256 != sha256) {
    throw engine::Error(fmt::format(
        "{}: is a cache of another model file, whose SHA-256 begins {}; that of {} begins {}: give "
        "the model that it was saved with, or save it again",
        given.load_cache.string(), origin.model_sha256.substr(0, 16), given.model.model.string(),
        sha256.substr(0, 16)));
  }
  const GenerateArguments arguments = arguments_of(given, origin);
  Compression how = compression_of(arguments);
  const MethodInfo& method = info(how.method);
  const CalibrationFiles files = calibration_given(arguments);
  load(files, method, how);
  const LoadedModel model = load_model(arguments.model.model, arguments.model.threads);
  model.show_outputs(how);
  check_interrupt();
  if (how.method != Method::full) {
    check_calibration(files.heads, files.errors, model.shape(arguments.cache.type()));
  }
  Context context = saved.restore(model, how, arguments.cache.type(), files);
  Progress progress{"prefill", static_cast<double>(model.layers())};
  ask_and_print(arguments, files, model, how, origin.text, context, shown_run(arguments, progress), progress);
}

void generate(const GenerateArguments& arguments) {
  check_saving(arguments);
  if (!arguments.load_cache.empty()) {
    load_and_ask(arguments);
    return;
  }
  Compression how = compression_of(arguments);
  const MethodInfo& method = info(how.method);
  const std::string text =
      arguments.given("--prompt")
          ? checked_text(arguments.prompt, "--prompt")
          : checked_text(read_text_file(arguments.prompt_file),
                         fmt::format("--prompt-file '{}'", arguments.prompt_file.string()));
  const std::string question = checked_text(arguments.question, "--question");
  const CalibrationFiles files = calibration_of(arguments, method);
  load(files, method, how);
  if (!arguments.save_cache.empty()) {
    const LoadedModel model = load_model(arguments.model.model, arguments.model.threads);
    model.show_outputs(how);
    check_interrupt();
    if (how.method != Method::full) {
      check_calibration(files.heads, files.errors, model.shape(arguments.cache.type()));
    }
    save_and_ask(arguments, files, model, how, text);
    return;
  }
  const std::unique_ptr<ModelEngine> model =
      load_engine(arguments.model.engine, arguments.model.model, arguments.model.threads);
  model->show_outputs(how);
  check_interrupt();
  const std::vector<TokenId> prompt =
      arguments.raw ? encode_prompt(*model, text)
                    : encode_prompt(*model, chat_prompt(*model, message_text(text, question)));
  if (how.method != Method::full) {
    const compresskv::ModelShape shape = model->shape(arguments.cache.type());
    check_calibration(files.heads, files.errors, shape);
    check_budget(how, shape, prompt.size());
  }

  Progress progress{"prefill", layers_to_read(arguments, *model, prompt.size())};
  const RunResult result = model->run(prompt, how, shown_run(arguments, progress));
  progress.clear();
  print_result(arguments, files, *model, prompt, result);
}

}  // namespace

void add_generate(CLI::App& app) {
  CLI::App* command = app.add_subcommand("generate", "Answer a prompt from a full or a compressed cache");
  const auto arguments = std::make_shared<GenerateArguments>();
  arguments->model.add_to(*command);

  CLI::Option_group* text = command->add_option_group("Prompt", "One of these");
  text->add_option("--prompt", arguments->prompt, "The text itself");
  text->add_option("--prompt-file", arguments->prompt_file, "A file that holds the text")->type_name("FILE");
  text->add_option("--load-cache", arguments->load_cache,
                   "A text that --save-cache has read and compressed: it is asked --question; method, budget "
                   "and element type are those of the file")
      ->type_name("FILE");
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
  budget->add_option("--rows", arguments->rows, "Rows a layer, on average")->check(CLI::PositiveNumber);
  budget->add_option("--ratio", arguments->ratio, "Share of the prompt that is kept, in (0, 1]");
  budget
      ->add_option("--bytes", arguments->bytes, "Bytes of keys and values over all layers; 2MiB, 500kB, ...")
      ->transform(byte_count());
  budget->require_option(0, 1);

  command
      ->add_option(
          "--heads", arguments->heads,
          "Raw head scores, as `ckv calibrate` writes them; for the compresskv methods a ranking is enough; "
          "default: those in --models-dir made from this model file, for compresskv with their layer errors")
      ->type_name("FILE");
  command
      ->add_option("--errors", arguments->errors,
                   "Layer errors, by which layers share the budget; with --heads alone: every layer the "
                   "same. pyramidkv, cake, duoattention and kvzip-heads have budgets of their own")
      ->type_name("FILE");
  command
      ->add_option("--statistics", arguments->statistics,
                   "For expected-attention, q-filter and triattention: query statistics, as `ckv calibrate "
                   "--statistics` writes them; default: those in --models-dir made from this model file")
      ->type_name("FILE");
  command
      ->add_option("--kv-heads", arguments->kv_heads,
                   "For kvzip-heads: scores of KV heads, as `ckv calibrate --kv-heads` writes them; default: "
                   "likewise")
      ->type_name("FILE");
  command
      ->add_option("--surrogate", arguments->surrogate,
                   "For kvzap: a surrogate, as `ckv calibrate --surrogate` writes it; default: the one in "
                   "--models-dir made from this model file")
      ->type_name("FILE");
  command->add_option(
      "--threshold", arguments->threshold,
      "For kvzap: the lowest score of a row that stays, such as -4; a budget is then the most that is "
      "kept");
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
  command->add_option("--lambda", arguments->lambda,
                      "Of rkv: weight of attention; the rest, to 1, is that of redundancy. Default: 0.07");
  command->add_option("--cosine", arguments->cosine,
                      "Of rkv: keys with a larger cosine are alike. Default: 0.5");
  command
      ->add_option("--save-cache", arguments->save_cache,
                   "Compress the text before --question is read, and write its cache to this file, for "
                   "--load-cache; without a question nothing is answered")
      ->type_name("FILE");
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
      "0.12\nA model without a calibration in --models-dir: add --heads M_head_scores.json.");
  arguments->command = command;
  command->callback([arguments] {
    for (const char* const name : {"rows", "ratio", "bytes"}) {
      if (arguments->given(("--" + std::string(name)).c_str())) {
        arguments->budget = name;
      }
    }
    const Method method = compresskv::method_named(arguments->method).method;
    if (arguments->threshold && !arguments->cache.window) {
      arguments->cache.window = compresskv::own_window(method, true);
    }
    arguments->cache.fill(method);
    generate(*arguments);
  });
}

}  // namespace ckv
