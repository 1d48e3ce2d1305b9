// ckv evaluate: every method on the same prompts, from one prefill each.

#include <fmt/core.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <compresskv/io/calibration_files.hpp>
#include <compresskv/io/json_file.hpp>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <numeric>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include "arguments.hpp"
#include "commands.hpp"
#include "compress.hpp"
#include "engine/error.hpp"
#include "engine/sha256.hpp"
#include "evaluation.hpp"
#include "records.hpp"
#include "run.hpp"
#include "tasks.hpp"
#include "terminal.hpp"
#include "usage_error.hpp"

namespace ckv {
namespace {

struct EvaluateArguments {
  ModelArguments model;
  CacheArguments cache;
  std::vector<std::string> methods = {"all"};
  std::vector<std::string> tasks = {"needle"};
  std::vector<double> ratios;
  std::vector<std::size_t> tokens;
  std::vector<std::size_t> lengths = {1000};
  std::size_t prompts = 20;
  std::size_t depths = 5;
  std::uint64_t seed = 0;
  std::filesystem::path heads;
  std::filesystem::path errors;
  std::filesystem::path statistics;
  std::filesystem::path kv_heads;
  std::filesystem::path surrogate;
  std::filesystem::path models_dir = COMPRESSKV_MODELS_DIR;
  std::filesystem::path haystack;
  std::size_t max_new_tokens = 32;
  std::filesystem::path out;
};

/// One cell's way: a method at a budget.
struct Variant {
  std::string method;  ///< as the user wrote it
  Json budget;
  Compression how;
};

double rounded(double milliseconds) { return std::round(1000.0 * milliseconds) / 1000.0; }

// ---- what is asked for ----

/// A number that may follow a method's name: "window=8".
struct MethodOption {
  std::string_view name;
  std::string_view unit;
  std::uint64_t least;
  std::uint64_t most;
  void (*set)(Compression& how, std::uint64_t number);
};

constexpr std::array<MethodOption, 15> method_options = {{
    {"min", "ROWS", 1, most_tokens, [](Compression& how, std::uint64_t number) { how.min_rows = number; }},
    {"window", "N", 1, most_tokens, [](Compression& how, std::uint64_t number) { how.window = number; }},
    {"heads", "N", 1, most_tokens,
     [](Compression& how, std::uint64_t number) { how.heads_per_layer = number; }},
    {"width", "N", 1, most_tokens, [](Compression& how, std::uint64_t number) { how.pool_width = number; }},
    {"seed", "N", 0, any_number, [](Compression& how, std::uint64_t number) { how.seed = number; }},
    {"decay", "PERCENT", 0, 100,
     [](Compression& how, std::uint64_t number) { how.decay = static_cast<float>(number) / 100.0F; }},
    {"hold", "N", 0, most_tokens, [](Compression& how, std::uint64_t number) { how.hold_layers = number; }},
    {"model", "N", 1, most_tokens, [](Compression& how, std::uint64_t number) { how.model_heads = number; }},
    {"share", "PERCENT", 0, 100,
     [](Compression& how, std::uint64_t number) { how.model_share = static_cast<double>(number) / 100.0; }},
    {"sinks", "N", 0, most_tokens, [](Compression& how, std::uint64_t number) { how.sinks = number; }},
    {"lag", "ROWS", 2, most_tokens, [](Compression& how, std::uint64_t number) { how.lag = number; }},
    {"block", "ROWS", 1, most_tokens, [](Compression& how, std::uint64_t number) { how.block = number; }},
    {"chunk", "N", 1, most_tokens, [](Compression& how, std::uint64_t number) { how.chunk = number; }},
    {"head-sinks", "N", 0, most_tokens,
     [](Compression& how, std::uint64_t number) { how.head_sinks = number; }},
    {"head-recent", "N", 0, most_tokens,
     [](Compression& how, std::uint64_t number) { how.head_recent = number; }},
}};

/// The same with a fraction: "lambda=0.1". Its bounds are the library's.
struct MethodFraction {
  std::string_view name;
  std::string_view unit;
  float Compression::*number;
};

constexpr std::array<MethodFraction, 2> method_fractions = {{
    {"lambda", "SHARE", &Compression::lambda},
    {"cosine", "COSINE", &Compression::threshold},
}};

std::string method_option_help() {
  std::string text = "uniform, errors, equal, pool=avg, pool=max, pool=trailing, threshold=SCORE";
  for (const MethodOption& option : method_options) {
    text += fmt::format(", {}={}", option.name, option.unit);
  }
  for (const MethodFraction& option : method_fractions) {
    text += fmt::format(", {}={}", option.name, option.unit);
  }
  return text;
}

/// A number as JSON writes it.
std::optional<float> fraction_of(const std::string& text) {
  const Json number = Json::parse(text, nullptr, false);
  return number.is_number() ? std::optional(number.get<float>()) : std::nullopt;
}

/// "name:option:option": a method and what is special about it.
Compression parse_method(const std::string& text, const Compression& base,
                         const std::optional<compresskv::LayerErrors>& errors) {
  std::vector<std::string> parts;
  for (std::size_t begin = 0; begin <= text.size();) {
    const std::size_t end = std::min(text.find(':', begin), text.size());
    parts.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  Compression how = base;
  try {
    how.method = compresskv::method_named(parts[0]).method;
  } catch (const compresskv::ArgumentError& error) {
    throw UsageError(fmt::format("--methods: {}", error.what()));
  }
  const auto refuse = [&](const std::string& why) {
    throw UsageError(fmt::format("--methods {}: {}", text, why));
  };
  // The paper's budgets belong to the paper's method; the others' are their own.
  bool by_errors = info(how.method).needs_heads && errors.has_value();
  for (std::size_t i = 1; i < parts.size(); ++i) {
    const std::string& part = parts[i];
    const std::size_t equals = std::min(part.find('='), part.size());
    const std::string name = part.substr(0, equals);
    std::string value = equals < part.size() ? part.substr(equals + 1) : std::string();
    const auto option = std::find_if(method_options.begin(), method_options.end(),
                                     [&](const MethodOption& row) { return row.name == name; });
    if (option != method_options.end()) {
      if (const std::string wrong = check_count(value, option->least, option->most); !wrong.empty()) {
        refuse(fmt::format("{} {}", name, wrong));
      }
      option->set(how, std::stoull(value));
    } else if (const auto fraction = std::ranges::find(method_fractions, name, &MethodFraction::name);
               fraction != method_fractions.end()) {
      const std::optional<float> number = fraction_of(value);
      if (!number) {
        refuse(fmt::format("{} is '{}', must be a number such as 0.1", name, value));
      }
      how.*fraction->number = *number;
    } else if (part == "uniform") {
      by_errors = false;
    } else if (part == "errors") {
      if (!errors) {
        refuse("there are no layer errors; name them with --errors");
      }
      by_errors = true;
    } else if (part == "equal") {
      how.equal_weights = true;
    } else if (name == "threshold") {
      float threshold = 0.0F;
      const auto read = std::from_chars(value.data(), value.data() + value.size(), threshold);
      if (read.ec != std::errc() || read.ptr != value.data() + value.size() || !std::isfinite(threshold)) {
        refuse(fmt::format("threshold '{}' is no number: give a score, such as -4", value));
      }
      how.score_threshold = threshold;
    } else if (name == "pool") {
      how.pool = pool_named(value);
      if (!how.pool) {
        refuse(fmt::format("pool '{}' is none: give {}", value, pool_names()));
      }
    } else {
      refuse(fmt::format("'{}' is not known; options are {}", part, method_option_help()));
    }
  }
  if (by_errors) {
    how.errors = errors;
  }
  return how;
}

/// Of `all` those that need what is measured when asked for are left out where it was not.
std::vector<std::string> wanted_methods(const EvaluateArguments& arguments, const CalibrationFiles& files) {
  std::vector<std::string> names;
  for (const std::string& name : arguments.methods) {
    const std::vector<std::string> more = name == "all" ? method_names() : std::vector<std::string>{name};
    for (const std::string& method : more) {
      if (name == "all" && arguments.model.is_llama_cpp() &&
          !goes_with_llama_cpp(compresskv::method_named(method).method)) {
        continue;
      }
      if (name == "all" && std::ranges::any_of(measured_when_asked, [&](const MeasuredWhenAsked& row) {
            return (files.*row.file).empty() && compresskv::method_named(method).*row.needed;
          })) {
        continue;
      }
      // The full cache always answers first.
      if (method != "full" && std::find(names.begin(), names.end(), method) == names.end()) {
        names.push_back(method);
      }
    }
  }
  return names;
}

/// Whether a method asked for needs what this member of its row says.
bool wants(const EvaluateArguments& arguments, const CalibrationFiles& files, bool MethodInfo::*what) {
  const auto wanted = wanted_methods(arguments, files);
  return std::any_of(wanted.begin(), wanted.end(), [&](const std::string& text) {
    return std::any_of(compresskv::methods.begin(), compresskv::methods.end(), [&](const MethodInfo& row) {
      return row.*what && row.name == text.substr(0, text.find(':'));
    });
  });
}

template <class T>
void check_once(const char* option, std::vector<T> values) {
  std::sort(values.begin(), values.end());
  const auto twice = std::adjacent_find(values.begin(), values.end());
  if (twice != values.end()) {
    throw UsageError(fmt::format("{} has {} twice: drop one", option, *twice));
  }
}

std::vector<Variant> wanted_variants(const EvaluateArguments& arguments, const CalibrationFiles& files) {
  Compression base;
  arguments.cache.apply_to(base);
  if (!files.heads.empty()) {
    base.heads = compresskv::io::load_head_ranking(files.heads);
  }
  if (!files.scores.empty()) {
    base.scores = compresskv::io::load_head_scores(files.scores);
  }
  if (!files.statistics.empty()) {
    base.statistics = compresskv::io::load_query_statistics(files.statistics);
  }
  if (!files.kv_heads.empty()) {
    base.kv_scores = compresskv::io::load_head_scores(files.kv_heads);
  }
  if (!files.surrogate.empty()) {
    base.surrogate = compresskv::io::load_surrogate(files.surrogate);
  }
  std::optional<compresskv::LayerErrors> errors;
  if (!files.errors.empty()) {
    errors = compresskv::io::load_layer_errors(files.errors);
  }
  std::vector<Variant> variants;
  const auto add = [&](const std::string& method, Json budget, const compresskv::Budget& amount) {
    Variant variant{.method = method, .budget = std::move(budget), .how = parse_method(method, base, errors)};
    variant.how.budget = amount;
    if (arguments.model.is_llama_cpp()) {
      check_method_of_llama_cpp(variant.how.method);
    }
    if ((info(variant.how.method).needs_heads && !base.heads) ||
        (info(variant.how.method).needs_scores && !base.scores)) {
      throw UsageError(fmt::format(
          "--methods {} needs --heads: no calibration of this model in '{}'; `ckv calibrate --model {} --out "
          "DIR` makes one",
          method, arguments.models_dir.string(), arguments.model.model.string()));
    }
    check_measured(files, info(variant.how.method), fmt::format("--methods {}", method), arguments.models_dir,
                   arguments.model.model);
    variants.push_back(std::move(variant));
  };
  for (const double ratio : arguments.ratios) {
    if (!(ratio > 0.0 && ratio <= 1.0)) {
      throw UsageError(fmt::format("--ratios has {}: each is a share kept, in (0, 1]", ratio));
    }
  }
  for (const std::string& method : wanted_methods(arguments, files)) {
    for (const double ratio : arguments.ratios) {
      add(method, {{"ratio", ratio}}, compresskv::Budget::kept_ratio(ratio));
    }
    for (const std::size_t rows : arguments.tokens) {
      add(method, {{"tokens", rows}}, compresskv::Budget::tokens_per_layer(rows));
    }
  }
  return variants;
}

/// What records of one file must have in common. Methods, budgets, lengths and the number of prompts may
/// grow.
Json header_json(const EvaluateArguments& arguments, const CalibrationFiles& files,
                 const std::string& sha256) {
  Json settings = {{"seed", arguments.seed},
                   {"depths", arguments.depths},
                   {"window", arguments.cache.window ? Json(*arguments.cache.window) : Json()},
                   {"heads_per_layer", arguments.cache.heads_per_layer},
                   {"pool", arguments.cache.pool.empty() ? Json() : Json(arguments.cache.pool)},
                   {"kv_type", arguments.cache.kv_type},
                   {"max_new_tokens", arguments.max_new_tokens},
                   {"heads_sha256", file_digest(files.heads)},
                   {"errors_sha256", file_digest(files.errors)},
                   {"scores_sha256", file_digest(files.scores)},
                   {"haystack", haystack_json(arguments.haystack, file_digest(arguments.haystack))}};
  if (!files.statistics.empty()) {
    settings["statistics_sha256"] = file_digest(files.statistics);
  }
  if (!files.kv_heads.empty()) {
    settings["kv_heads_sha256"] = file_digest(files.kv_heads);
  }
  if (!files.surrogate.empty()) {
    settings["surrogate_sha256"] = file_digest(files.surrogate);
  }
  if (arguments.model.is_llama_cpp()) {
    settings["engine"] = arguments.model.engine;
  }
  return record_header("ckv evaluate", arguments.model.model, sha256, settings);
}

// ---- the grid ----

struct Cell {
  std::string task;
  std::size_t length = 0;
  std::size_t prompt = 0;
  std::string method;
  std::string budget;

  auto operator<=>(const Cell&) const = default;
};

Cell cell_of(const Json& record) {
  return {.task = record.at("task"),
          .length = record.at("length"),
          .prompt = record.at("prompt"),
          .method = record.at("method"),
          .budget = record.at("budget").dump()};
}

/// Of the questions that were asked, those answered rightly. Throws where the record says nothing of it.
double share_right(const Json& record) {
  const auto questions = record.find("questions");
  if (questions == record.end()) {
    return record.at("right").get<bool>() ? 1.0 : 0.0;
  }
  static_cast<void>(questions->at(0));  // one at least
  std::size_t right = 0;
  for (const Json& question : *questions) {
    right += question.at("right").get<bool>() ? 1U : 0U;
  }
  return static_cast<double>(right) / static_cast<double>(questions->size());
}

/// A record's cell, as text. Throws where something is absent or of another kind that the summary wants.
std::string key_of_cell(const Json& record) {
  const Cell cell = cell_of(record);
  for (const char* name : {"kv_bytes", "compress_ms"}) {
    record.at(name).get<double>();
  }
  if (record.contains("right")) {
    record.at("right").get<bool>();
    share_right(record);
  } else {
    record.at(record.contains("perplexity") ? "perplexity" : "error").get<double>();
  }
  if (record.contains("token_ms")) {
    record.at("token_ms").get<double>();
    record.at("full_token_ms").get<double>();
    record.at("cut_share").get<double>();
  }
  return fmt::format("{}, {} tokens, prompt {}, {}, budget {}", cell.task, cell.length, cell.prompt,
                     cell.method, cell.budget);
}

/// A prompt that the full cache answers wrongly says nothing about the methods, nor does one of whose
/// questions it misses one.
bool is_dropped(const Json& full_record) { return full_record.value("right", Json(true)) == Json(false); }

class Grid {
 public:
  Grid(const EvaluateArguments& arguments, const ModelEngine& model, const Haystack& haystack,
       std::span<const Variant> variants, RecordFile& file)
      : arguments_(&arguments),
        model_(&model),
        haystack_(&haystack),
        variants_(variants),
        file_(&file),
        shape_(model.shape(arguments.cache.type())) {
    shape_.layers = model.compressed_layers().size();
    for (const Json& record : file.records()) {
      keep(record);
    }
    for (const Variant& variant : variants) {
      if (!wants_hidden_states(variant.how.method)) {
        widest_ = std::max(widest_, window_of(variant.how));
      }
    }
  }

  void run() {
    double total = 0.0;
    for (const std::size_t length : arguments_->lengths) {
      total += static_cast<double>(length * arguments_->prompts * arguments_->tasks.size());
    }
    Progress progress{"evaluate", total};
    double done = 0.0;
    for (const std::string& task : arguments_->tasks) {
      for (const std::size_t length : arguments_->lengths) {
        run_length(task, length, progress, done);
        done += static_cast<double>(length * arguments_->prompts);
      }
    }
    progress.clear();
  }

  const std::map<Cell, Json>& records() const { return records_; }

 private:
  using Show = std::function<void(double share, std::string_view what)>;

  /// Prompts go round the depths; each depth is to have its share of those that the full cache answers.
  void run_length(const std::string& task, std::size_t length, Progress& progress, double done) {
    const std::size_t depths = arguments_->depths;
    constexpr std::size_t patience = 10;  // prompts tried for each that is wanted
    std::vector<std::size_t> missing(depths);
    for (std::size_t d = 0; d < depths; ++d) {
      missing[d] = arguments_->prompts / depths + (d < arguments_->prompts % depths ? 1 : 0);
    }
    std::size_t answered = 0;
    const std::size_t rounds = patience * ((arguments_->prompts + depths - 1) / depths);
    for (std::size_t round = 0; round < rounds && answered < arguments_->prompts; ++round) {
      for (std::size_t d = 0; d < depths; ++d) {
        if (missing[d] == 0) {
          continue;
        }
        const PromptPlace place{
            .seed = arguments_->seed,
            .length = length,
            .index = round * depths + d,
            .depth = depths == 1 ? 0.5 : static_cast<double>(d) / static_cast<double>(depths - 1)};
        const auto show = [&](double share, std::string_view what) {
          progress.show(done + (static_cast<double>(answered) + share) * static_cast<double>(length),
                        fmt::format("{}, {} tokens, prompt {}: {}", task, length, place.index, what));
        };
        if (run_prompt(task, place, show)) {
          --missing[d];
          ++answered;
        }
      }
    }
    if (answered < arguments_->prompts) {
      progress.clear();
      complain(fmt::format("{} at {} tokens: the full cache answers {} of the {} prompts wanted", task,
                           length, answered, arguments_->prompts));
    }
  }

  /// Whether the full cache answers it; then all variants have, too.
  bool run_prompt(const std::string& task, const PromptPlace& place, const Show& show) {
    Json common = {{"task", task}, {"length", place.length}, {"prompt", place.index}, {"depth", place.depth}};
    const auto cell = [&](const std::string& method, const Json& budget) {
      return Cell{.task = task,
                  .length = place.length,
                  .prompt = place.index,
                  .method = method,
                  .budget = budget.dump()};
    };
    const auto full_record = records_.find(cell("full", nullptr));
    if (full_record != records_.end() && is_dropped(full_record->second)) {
      return false;
    }
    std::vector<const Variant*> todo;
    for (const Variant& variant : variants_) {
      if (!records_.contains(cell(variant.method, variant.budget))) {
        todo.push_back(&variant);
      }
    }
    if (full_record != records_.end() && todo.empty()) {
      return true;
    }

    const TaskPrompt prompt = task_prompt(task, *model_, *haystack_, place);
    if (prompt.later.empty() && prompt.measure != Measure::recalls) {
      common["expect"] = prompt.expect;
    }
    if (!prompt.rule.kind.empty()) {
      common["rule"] = {{"kind", prompt.rule.kind}, {"says", prompt.rule.says}, {"never", prompt.rule.never}};
    }
    common["prompt_tokens"] = prompt.tokens.size();
    if (prompt.fact.size() > 0) {
      common["fact"] = {prompt.fact.first, prompt.fact.last};
    }
    const bool all_queries = std::any_of(todo.begin(), todo.end(), [](const Variant* variant) {
      return wants_all_queries(variant->how.method);
    });
    const bool hidden_states = std::any_of(todo.begin(), todo.end(), [](const Variant* variant) {
      return wants_hidden_states(variant->how.method);
    });
    const bool on_budget = decodes_on_budget(prompt.measure);
    const bool alone = on_budget && is_timed(place, task, full_record);
    const auto held = model_->hold(prompt, {.kv_type = arguments_->cache.type(),
                                            .window = all_queries ? 0 : widest_,
                                            .hidden_states = hidden_states,
                                            .max_new_tokens = arguments_->max_new_tokens,
                                            .alone = alone,
                                            .progress = [&](double share) { show(0.4 * share, "reading"); }});
    const Compression full{.method = Method::full};
    Json record;
    const auto add_full = [&](const Outcome& outcome) {
      record = record_of(common, "full", nullptr, prompt, outcome);
      record["prefill_ms"] = rounded(held->prefill_ms());
      add(record);
      return !is_dropped(record);
    };
    const bool full_first = full_record == records_.end() && !on_budget;
    if (full_first) {
      const Compression* const only = &full;
      if (!add_full(held->outcomes({&only, 1}, [](double, std::string_view) {})[0])) {
        return false;
      }
    }

    // On a budget the full cache decodes with the others: a token's time is compared in one run.
    const bool beside = !full_first && (full_record == records_.end() || alone);
    std::vector<const Compression*> ways(beside ? 1 : 0, &full);
    for (const Variant* variant : todo) {
      ways.push_back(&variant->how);
    }
    std::vector<Outcome> outcomes =
        held->outcomes(ways, [&](double share, std::string_view what) { show(0.4 + 0.6 * share, what); });
    std::optional<double> full_ms;
    if (beside) {
      full_ms = token_ms(outcomes[0]);
      const bool answered = full_record != records_.end() || add_full(outcomes[0]);
      outcomes.erase(outcomes.begin());
      if (!answered) {
        return false;
      }
    }
    if (on_budget && full_record != records_.end()) {
      record = full_record->second;
    }
    for (std::size_t i = 0; i < todo.size(); ++i) {
      check_rows(*todo[i], prompt.tokens.size(), outcomes[i].rows);
      if (const std::optional<LongAnswer>& answer = outcomes[i].long_answer) {
        const std::size_t since = answer->steps % decode_step;
        check_rows(*todo[i], prompt.tokens.size() + answer->steps - since, answer->rows, since);
      }
      if (place.index >= arguments_->depths) {
        outcomes[i].kept.clear();  // one map a depth is enough
      }
      add(record_of(common, todo[i]->method, todo[i]->budget, prompt, outcomes[i], &record, full_ms));
    }
    return true;
  }

  /// Long texts are decoded as one batch, whose step's time is nobody's. So one text a task and length is
  /// decoded alone in part: the first that is found, and no other.
  bool is_timed(const PromptPlace& place, const std::string& task,
                const std::map<Cell, Json>::const_iterator& full_record) const {
    if (full_record != records_.end()) {
      return full_record->second.contains("token_ms");
    }
    return std::ranges::none_of(records_, [&](const auto& entry) {
      return entry.first.task == task && entry.first.length == place.length && entry.first.method == "full" &&
             entry.second.contains("token_ms") && !is_dropped(entry.second);
    });
  }

  /// What a decoded token took, cuts included, where that was measured.
  static std::optional<double> token_ms(const Outcome& outcome) {
    const std::optional<LongAnswer>& answer = outcome.long_answer;
    if (!answer || !answer->decode_ms) {
      return std::nullopt;
    }
    return (*answer->decode_ms + answer->cut_ms) / static_cast<double>(answer->steps);
  }

  /// Every method holds the same bytes at one budget, or the comparison is worth nothing; with a threshold at
  /// most these.
  /// `since`: tokens that were decoded since, whose rows come on top.
  void check_rows(const Variant& variant, std::size_t tokens, std::size_t rows, std::size_t since = 0) const {
    const compresskv::ModelShape& shape = shape_;
    const std::size_t expected =
        (variant.how.budget->resolve(tokens, window_of(variant.how), shape) + since) * shape.layers *
        shape.kv_heads;
    if (variant.how.score_threshold ? rows > expected : rows != expected) {
      throw engine::Error(
          fmt::format("{} at {} keeps {} rows of a prompt of {} tokens, all methods are to keep {}: not a "
                      "fair comparison",
                      variant.method, variant.budget.dump(), rows, tokens, expected));
    }
  }

  Json record_of(const Json& common, const std::string& method, const Json& budget, const TaskPrompt& prompt,
                 const Outcome& outcome, const Json* full = nullptr,
                 std::optional<double> full_ms = std::nullopt) const {
    Json record = common;
    record["method"] = method;
    record["budget"] = budget;
    if (prompt.measure == Measure::recalls) {
      add_recalls(prompt, *outcome.long_answer, full, record);
    } else if (outcome.perplexity) {
      if (!std::isfinite(*outcome.perplexity)) {
        throw engine::Error(fmt::format("the perplexity of {} at {} is {}: not a number that JSON can hold",
                                        method, budget.dump(), *outcome.perplexity));
      }
      record["perplexity"] = *outcome.perplexity;
    } else if (!outcome.errors.empty()) {
      record["error"] = std::accumulate(outcome.errors.begin(), outcome.errors.end(), 0.0) /
                        static_cast<double>(outcome.errors.size());
      record["layer_errors"] = outcome.errors;
    } else if (prompt.later.empty()) {
      record["right"] = is_right(prompt, outcome.answers[0]);
      record["answer"] = outcome.answers[0];
    } else {
      Json questions = Json::array();
      bool all = true;
      for (std::size_t i = 0; i < prompt.later.size(); ++i) {
        const bool right = is_right(prompt, outcome.answers[i], i);
        questions.push_back(
            {{"expect", prompt.later[i].expect}, {"right", right}, {"answer", outcome.answers[i]}});
        all = all && right;
      }
      record["right"] = all;
      record["questions"] = questions;
    }
    if (!outcome.kept.empty()) {
      record["kept"] = outcome.kept;
    }
    const std::size_t rows = outcome.long_answer ? outcome.long_answer->rows : outcome.rows;
    record["rows"] = rows;
    record["kv_bytes"] = rows * shape_.kv_row_bytes;
    record["compress_ms"] = rounded(outcome.compress_ms);
    if (outcome.long_answer) {
      record["cut_ms"] = rounded(outcome.long_answer->cut_ms);
    }
    if (const std::optional<double> ms = token_ms(outcome)) {
      record["token_ms"] = rounded(*ms);
      record["cut_share"] =
          outcome.long_answer->cut_ms / (*ms * static_cast<double>(outcome.long_answer->steps));
      record["full_token_ms"] = rounded(full_ms.value_or(*ms));
    }
    return record;
  }

  /// Of the recalls those that the full cache says count.
  static void add_recalls(const TaskPrompt& prompt, const LongAnswer& answer, const Json* full,
                          Json& record) {
    Json questions = Json::array();
    bool all = true;
    for (std::size_t i = 0; i < prompt.recalls.size(); ++i) {
      const Recall& recall = prompt.recalls[i];
      const bool right = is_right(recall, answer.said[i]);
      const bool counts =
          full == nullptr ? right : std::ranges::any_of(full->at("questions"), [&](const Json& of_full) {
            return of_full.at("asked") == recall.first;
          });
      if (counts) {
        questions.push_back({{"expect", recall.expect},
                             {"told", recall.told},
                             {"asked", recall.first},
                             {"right", right},
                             {"answer", answer.said[i]}});
        all = all && right;
      }
    }
    record["right"] = all && !questions.empty();
    if (!questions.empty()) {
      record["questions"] = questions;
    }
    record["recalls"] = prompt.recalls.size();
    record["decoded_tokens"] = prompt.continuation.size();
    record["loss"] = answer.loss;
  }

  void add(const Json& record) {
    file_->add(record);
    keep(record);
  }

  void keep(const Json& record) { records_.insert_or_assign(cell_of(record), record); }

  const EvaluateArguments* arguments_;
  const ModelEngine* model_;
  const Haystack* haystack_;
  std::span<const Variant> variants_;
  RecordFile* file_;
  compresskv::ModelShape shape_;
  std::map<Cell, Json> records_;
  std::size_t widest_ = 1;
};

/// Milliseconds a decoded token, beside the full cache's in the same run, and the cuts' share of them.
std::string time_text(const Json& record) {
  const auto ms = record.at("token_ms").get<double>();
  return fmt::format("{:.1f} {:.2f} x {:.1f} %", ms, ms / record.at("full_token_ms").get<double>(),
                     100.0 * record.at("cut_share").get<double>());
}

void print_summary(const EvaluateArguments& arguments, std::span<const Variant> variants,
                   const std::map<Cell, Json>& records) {
  struct Sum {
    std::size_t prompts = 0;
    double value = 0.0;  // of what `unit` says
    std::string_view unit;
    double bytes = 0.0;
    double ms = 0.0;
    std::optional<Json> timed = std::nullopt;  // the record of the text that was decoded alone
  };
  std::map<std::tuple<std::string, std::size_t, std::string, std::string>, Sum> sums;
  for (const auto& [cell, record] : records) {
    if (cell.method == "full" && is_dropped(record)) {
      continue;
    }
    Sum& sum = sums[{cell.task, cell.length, cell.budget, cell.method}];
    ++sum.prompts;
    if (record.contains("right")) {
      sum.value += 100.0 * share_right(record);
      sum.unit = " %";
    } else {
      sum.value += record.value("perplexity", record.value("error", 0.0));
    }
    sum.bytes += record.at("kv_bytes").get<double>();
    sum.ms += record.at("compress_ms").get<double>();
    if (record.contains("token_ms")) {
      sum.timed = record;
    }
  }
  // A file may hold records of other tasks and lengths, too.
  std::size_t measured = 0;
  for (const std::string& task : arguments.tasks) {
    for (const std::size_t length : arguments.lengths) {
      measured += sums.contains({task, length, "null", "full"}) ? 1U : 0U;
    }
  }
  if (measured == 0) {
    throw engine::Error(
        "nothing was measured: the full cache answers none of the prompts; give other --lengths or --tasks");
  }
  std::size_t widest = 28;
  for (const Variant& variant : variants) {
    widest = std::max(widest, variant.method.size() + 1);
  }
  std::vector<Table::Column> columns{{.title = "task", .width = 10, .left = true},
                                     {.title = "tokens", .width = 7},
                                     {.title = " budget", .width = 17, .left = true},
                                     {.title = "method", .width = widest, .left = true},
                                     {.title = "prompts", .width = 8},
                                     {.title = "result", .width = 10},
                                     {.title = "KV bytes", .width = 11},
                                     {.title = "compress ms", .width = 13}};
  const bool timed = std::ranges::any_of(sums, [](const auto& sum) { return sum.second.timed.has_value(); });
  if (timed) {
    columns.push_back({.title = "ms/token, of full's, cuts", .width = 27});
  }
  const Table table{columns};
  const auto row = [&](const std::string& task, std::size_t length, const std::string& method,
                       const Json& budget) {
    const auto found = sums.find({task, length, budget.dump(), method});
    if (found == sums.end()) {
      return;
    }
    const Sum& sum = found->second;
    const auto count = static_cast<double>(sum.prompts);
    const std::string amount =
        budget.is_null() ? "all" : budget.begin().key() + " " + budget.begin().value().dump();
    std::vector<std::string> cells = {task,
                                      std::to_string(length),
                                      " " + amount,
                                      method,
                                      std::to_string(sum.prompts),
                                      fmt::format("{:.3g}{}", sum.value / count, sum.unit),
                                      fmt::format("{:.0f}", sum.bytes / count),
                                      fmt::format("{:.1f}", sum.ms / count)};
    if (timed) {
      cells.push_back(sum.timed ? time_text(*sum.timed) : "");
    }
    table.row(cells);
  };
  for (const std::string& task : arguments.tasks) {
    for (const std::size_t length : arguments.lengths) {
      row(task, length, "full", nullptr);
      for (const Variant& variant : variants) {
        row(task, length, variant.method, variant.budget);
      }
    }
  }
  fmt::print("\n");
  print_text(
      "result: answers that are right, also where a text is asked several questions, perplexity, or "
      "relative error, as the task is");
  if (!variants.empty()) {
    const bool judged = std::any_of(variants.begin(), variants.end(), [](const Variant& variant) {
      return variant.how.score_threshold.has_value();
    });
    print_text(judged ? "Every method held the same bytes at each budget, those with a threshold at most "
                        "these: checked."
                      : "Every method held the same bytes at each budget: checked.");
  }
}

/// Every variant of a prompt is a copy of its cache, soon given back. Were the copies' pages given back as
/// well, a third of the time at 4,000 tokens would go into clearing them for the next.
void keep_freed_memory() {
#if defined(__GLIBC__)
  mallopt(M_MMAP_THRESHOLD, 32 << 20);
  mallopt(M_TRIM_THRESHOLD, std::numeric_limits<int>::max());
#endif
}

/// Throws UsageError where a long text ends before a budget is exceeded: all methods would be the full cache.
void check_cuts(const EvaluateArguments& arguments) {
  for (const std::string& task : arguments.tasks) {
    for (const std::size_t length : arguments.lengths) {
      const std::size_t most = tokens_at_last_cut(task, length);
      const auto idle =
          std::ranges::find_if(arguments.tokens, [&](std::size_t rows) { return rows >= most; });
      if (decodes_on_budget(measure_of(task)) && idle != arguments.tokens.end()) {
        throw UsageError(
            fmt::format("--tasks {} at --lengths {} has {} tokens when its cache is cut for the last time, "
                        "and --tokens {} "
                        "holds them all: give fewer rows or a greater length",
                        task, length, most, *idle));
      }
    }
  }
}

void evaluate(const EvaluateArguments& arguments) {
  keep_freed_memory();
  check_engine(arguments.model.engine);
  if (arguments.model.is_llama_cpp()) {
    refuse_with_llama_cpp({{"--errors", !arguments.errors.empty()}});
    for (const std::string& task : arguments.tasks) {
      if (measure_of(task) == Measure::attention_error) {
        needs_small_engine(fmt::format("--tasks {}", task),
                           "a layer's attention output from the whole cache beside that from what is kept");
      }
    }
  }
  const auto on_budget = std::find_if(arguments.tasks.begin(), arguments.tasks.end(),
                                      [](const auto& task) { return decodes_on_budget(measure_of(task)); });
  if (on_budget != arguments.tasks.end()) {
    if (arguments.model.is_llama_cpp()) {
      needs_small_engine(fmt::format("--tasks {}", *on_budget),
                         "a cache that is compressed again and again as it grows");
    }
    if (!arguments.ratios.empty()) {
      throw UsageError(
          fmt::format("--tasks {} does not go with --ratios: a share would grow with the text; give --tokens",
                      *on_budget));
    }
    check_cuts(arguments);
  }
  if (arguments.ratios.empty() && arguments.tokens.empty()) {
    throw UsageError("no budget: give --ratios, --tokens or both");
  }
  // Their records would stand in the file twice.
  check_once("--ratios", arguments.ratios);
  check_once("--tokens", arguments.tokens);
  check_once("--lengths", arguments.lengths);
  check_once("--tasks", arguments.tasks);
  compresskv::io::detail::require_regular(arguments.model.model);
  const std::string sha256 = engine::sha256_of_file(arguments.model.model);
  CalibrationFiles files{.heads = arguments.heads,
                         .errors = arguments.errors,
                         .statistics = arguments.statistics,
                         .kv_heads = arguments.kv_heads,
                         .surrogate = arguments.surrogate};
  const bool all_given =
      !files.heads.empty() && std::ranges::none_of(measured_when_asked, [&](const MeasuredWhenAsked& row) {
        return (files.*row.file).empty();
      });
  const auto found = all_given ? std::nullopt : find_calibration(arguments.models_dir, sha256);
  for (const MeasuredWhenAsked& row : measured_when_asked) {
    if ((files.*row.file).empty() && found) {
      files.*row.file = (*found).*row.file;
    }
  }
  if (files.heads.empty() && found) {
    files.heads = found->heads;
    files.errors = files.errors.empty() && !arguments.model.is_llama_cpp() ? found->errors : files.errors;
    files.scores = found->scores;
  } else if (!files.heads.empty() && wants(arguments, files, &MethodInfo::needs_scores)) {
    files.scores = files.heads;  // a bare ranking is refused there, with the reason
  }
  // What no method asks for is not looked at, and old records go on without it.
  for (const MeasuredWhenAsked& row : measured_when_asked) {
    if (!wants(arguments, files, row.needed)) {
      (files.*row.file).clear();
    }
  }
  std::vector<Variant> variants = wanted_variants(arguments, files);
  for (const Variant& variant : variants) {
    const std::string_view why = why_not_while_decoding(variant.how.method);
    if (on_budget != arguments.tasks.end() && !why.empty()) {
      throw UsageError(
          fmt::format("--tasks {} compresses each layer again by the last queries, which --methods {} does "
                      "not, as it {}: drop one",
                      *on_budget, variant.method, why));
    }
  }
  RecordFile file{arguments.out, header_json(arguments, files, sha256), key_of_cell};
  const std::unique_ptr<ModelEngine> model =
      load_engine(arguments.model.engine, arguments.model.model, arguments.model.threads);
  const compresskv::ModelShape shape = model->shape(arguments.cache.type());
  check_calibration(files.heads, files.errors, shape);
  for (Variant& variant : variants) {
    model->show_outputs(variant.how);
    try {
      variant.how.budget->validate(window_of(variant.how), shape);
      static_cast<void>(compresskv::AnyPlan(shape, variant.how.method, settings_of(variant.how)));
    } catch (const compresskv::ArgumentError& error) {
      throw UsageError(fmt::format("--methods {}: {}", variant.method, error.what()));
    }
  }
  const Haystack haystack = Haystack::from(arguments.haystack);
  Grid grid{arguments, *model, haystack, variants, file};
  grid.run();
  print_summary(arguments, variants, grid.records());
}

}  // namespace

void add_evaluate(CLI::App& app) {
  CLI::App* command = app.add_subcommand(
      "evaluate", "Compare methods and budgets on the same prompts, from one prefill each");
  const auto arguments = std::make_shared<EvaluateArguments>();
  arguments->model.add_to(*command);
  command
      ->add_option(
          "--methods", arguments->methods,
          "Methods to compare, or `all`; the full cache always answers first. Options may follow: "
          "compresskv:uniform, snapkv:errors, compresskv:heads=8:window=16:pool=max, kvzap:threshold=-4 (the "
          "budget is then what is kept at most)\n" +
              method_help())
      ->delimiter(',')
      ->capture_default_str();
  command->add_option("--tasks", arguments->tasks, "What is asked\n" + task_help())
      ->delimiter(',')
      ->check(CLI::IsMember(task_names()))
      ->capture_default_str();
  command->add_option("--ratios", arguments->ratios, "Shares of the cache to keep")->delimiter(',');
  command->add_option("--tokens", arguments->tokens, "Rows a layer to keep, on average")
      ->delimiter(',')
      ->check(CLI::PositiveNumber);
  command->add_option("--lengths", arguments->lengths, "Lengths of the prompts in tokens: 1000,2000,4000")
      ->delimiter(',')
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command
      ->add_option(
          "--prompts", arguments->prompts,
          "Prompts of each length, shared out over the depths; those that the full cache answers wrongly "
          "are replaced")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command->add_option("--depths", arguments->depths, "Depths of the needle, evenly from first to last")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command->add_option("--seed", arguments->seed, "Of the prompts")->capture_default_str();
  command
      ->add_option("--heads", arguments->heads,
                   "Head ranking or raw scores; default: the one in --models-dir made from this model file")
      ->type_name("FILE");
  command
      ->add_option(
          "--errors", arguments->errors,
          "Layer errors, by which the compresskv methods share their budget; default: as with --heads")
      ->type_name("FILE");
  command
      ->add_option("--statistics", arguments->statistics,
                   "Query statistics, for expected-attention, q-filter and triattention; default: as with "
                   "--heads. `all` leaves these methods out where there are none")
      ->type_name("FILE");
  command->add_option("--kv-heads", arguments->kv_heads, "Scores of KV heads, for kvzip-heads; likewise")
      ->type_name("FILE");
  command
      ->add_option(
          "--surrogate", arguments->surrogate,
          "Surrogate, for kvzap; default: as with --heads. `all` leaves this method out where there is none")
      ->type_name("FILE");
  command->add_option("--models-dir", arguments->models_dir, "Folder of calibrations, one folder a model")
      ->type_name("DIR");
  command
      ->add_option("--haystack", arguments->haystack,
                   "A long text to make prompts from; default: the King James text, from the program `bible`")
      ->type_name("FILE");
  arguments->cache.add_to(*command);
  command->add_option("--max-new-tokens", arguments->max_new_tokens, "Longest answer")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command
      ->add_option("--out", arguments->out,
                   "Records as JSON Lines; where it is there, what it lacks is added")
      ->required()
      ->type_name("FILE.jsonl");
  command->footer(
      "Example:\n  ckv evaluate --model M.gguf --methods compresskv,snapkv,streaming --ratios 0.03,0.12 "
      "--lengths "
      "1000,2000 --prompts 40 --out results.jsonl\nEvery method keeps the same bytes at a budget, and "
      "answers "
      "the same prompts in the same way. `tools/report.py results.jsonl` draws tables and plots.");
  command->callback([arguments] { evaluate(*arguments); });
}

}  // namespace ckv
