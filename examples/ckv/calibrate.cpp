// ckv calibrate: which heads retrieve, and what evicting from each layer costs, from needle prompts.

#include <fmt/core.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <compresskv/io/calibration_files.hpp>
#include <cstddef>
#include <cstdio>
#include <filesystem>
#include <functional>
#include <initializer_list>
#include <map>
#include <memory>
#include <numeric>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "arguments.hpp"
#include "calibration.hpp"
#include "calibration_jobs.hpp"
#include "calibration_results.hpp"
#include "commands.hpp"
#include "engine/error.hpp"
#include "engine/sha256.hpp"
#include "needle.hpp"
#include "run.hpp"
#include "terminal.hpp"
#include "usage_error.hpp"

namespace ckv {
namespace {

using compresskv::calibrate::HeadScoreKind;

struct CalibrateArguments {
  ModelArguments model;
  CalibrationSettings settings;
  std::filesystem::path out;
  std::string name;
  std::vector<std::size_t> lengths = {512, 1024, 2048};
  std::size_t needles = 0;  // all of the file, 4 of ours
  std::filesystem::path needle_file;
  std::string counting = "occurrence";
  std::size_t error_rows = 32;
  std::size_t texts = 5;
  std::size_t jobs = 1;
  bool curves = false;
  bool statistics = false;
  bool kv_heads = false;
  bool surrogate = false;
  std::vector<std::size_t> ablate_heads;  // ascending; empty: no ablation
  std::size_t ablate_length = 512;
  std::size_t ablate_prompts = 40;

  bool ablates() const { return !ablate_heads.empty(); }
  /// llama.cpp does not show what a layer's attention gives.
  bool measures_errors() const { return !model.is_llama_cpp(); }
  HeadScoreKind kind() const {
    return counting == "step" ? HeadScoreKind::once_per_step : HeadScoreKind::once_per_occurrence;
  }
};

constexpr std::size_t own_needles = 4;    // of the tool's, where no number is given
constexpr std::size_t curve_prompts = 4;  // of each data set
constexpr std::size_t ablation_draws = 5;
constexpr std::size_t statistics_texts = 4;  // of the longest of --lengths; so of --kv-heads
constexpr std::size_t surrogate_texts = 16;  // the same length; an eighth as many more are held out
const std::vector<std::size_t> ablation_heads = {2, 5, 10, 20, 30};

// ---- what is asked for ----

std::vector<NeedleText> wanted_needles(const CalibrateArguments& arguments) {
  std::vector<NeedleText> needles;
  if (!arguments.needle_file.empty()) {
    needles = read_needles(arguments.needle_file);
  } else {
    for (const Needle& needle : calibration_needles()) {
      needles.push_back({.fact = std::string(needle.fact), .question = std::string(needle.question)});
    }
  }
  const std::size_t most = arguments.needle_file.empty() ? own_needles : needles.size();
  const std::size_t count = arguments.needles == 0 ? most : arguments.needles;
  if (count > needles.size()) {
    throw UsageError(fmt::format("--needles is {}, there are {}", count, needles.size()));
  }
  needles.resize(count);
  return needles;
}

std::vector<NeedleRun> plan_runs(const CalibrateArguments& arguments) {
  std::vector<NeedleRun> runs;
  for (const std::size_t length : arguments.lengths) {
    for (std::size_t depth = 0; depth < arguments.settings.depths; ++depth) {
      for (std::size_t needle = 0; needle < arguments.settings.needles.size(); ++needle) {
        runs.push_back({.run = runs.size(),
                        .needle = needle,
                        .length = length,
                        .depth = arguments.settings.depth(depth)});
      }
    }
  }
  return runs;
}

/// One data set a length and kind of text: long prompts must not rule the mean because they lose more.
std::vector<std::vector<ErrorPrompt>> plan_data_sets(const CalibrateArguments& arguments,
                                                     std::span<const NeedleRun> runs) {
  std::vector<std::vector<ErrorPrompt>> sets;
  for (const std::size_t length : arguments.lengths) {
    auto& needles = sets.emplace_back();
    for (const NeedleRun& run : runs) {
      if (run.length == length) {
        needles.push_back(
            {.data_set = fmt::format("needle_{}", length), .run = run.run, .length = length, .needle = run});
      }
    }
    if (arguments.texts > 0) {
      auto& texts = sets.emplace_back();
      for (std::size_t run = 0; run < arguments.texts; ++run) {
        texts.push_back({.data_set = fmt::format("text_{}", length), .run = run, .length = length});
      }
    }
  }
  return sets;
}

/// 16, 32, 64, ... up to the longest length, each with room for the window.
std::vector<std::size_t> wanted_curve_rows(const CalibrateArguments& arguments) {
  const std::size_t longest = *std::max_element(arguments.lengths.begin(), arguments.lengths.end());
  std::vector<std::size_t> rows;
  for (std::size_t budget = 16; budget < longest; budget *= 2) {
    if (budget > arguments.settings.cache.window.value()) {
      rows.push_back(budget);
    }
  }
  rows.push_back(longest);
  return rows;
}

/// What records of one folder must have in common. What is measured beside the heads may grow.
Json header_json(const CalibrateArguments& arguments, const std::string& sha256) {
  const CalibrationSettings& settings = arguments.settings;
  Json told = {{"lengths", arguments.lengths},
               {"depths", settings.depths},
               {"needles", settings.needles.size()},
               {"needle_file_sha256", file_digest(arguments.needle_file)},
               {"max_new_tokens", settings.max_new_tokens},
               {"counting", arguments.counting},
               {"window", settings.cache.window.value()},
               {"heads_per_layer", settings.cache.heads_per_layer},
               {"pool", settings.cache.pool},
               {"haystack", haystack_json(settings.haystack, file_digest(settings.haystack))}};
  if (arguments.model.is_llama_cpp()) {
    told["engine"] = arguments.model.engine;
  }
  return record_header("ckv calibrate", arguments.model.model, sha256, std::move(told));
}

// ---- the work ----

/// Something to do on a prompt, in whichever process.
struct PromptTask {
  double tokens = 0.0;  ///< what it costs, in tokens read
  std::string note;
  std::function<void(const PromptCalibration&, const Take&)> work;
};

double tokens_of(std::span<const PromptTask> tasks) {
  return std::accumulate(tasks.begin(), tasks.end(), 0.0,
                         [](double sum, const PromptTask& task) { return sum + task.tokens; });
}

/// All that is done to the prompts, and the records of it.
class CalibrationWork {
 public:
  /// Those given must outlive it.
  CalibrationWork(const CalibrateArguments& arguments, const compresskv::ModelShape& shape,
                  CalibrationRecords& records)
      : arguments_(&arguments), shape_(shape), records_(&records), runs_(plan_runs(arguments)) {
    if (!arguments.measures_errors()) {
      return;
    }
    for (const std::vector<ErrorPrompt>& set : plan_data_sets(arguments, runs_)) {
      for (std::size_t i = 0; i < set.size(); ++i) {
        prompts_.push_back(set[i]);
        // Spread over the set, so that all depths and needles have their share.
        if (arguments.curves && i * curve_prompts % set.size() < curve_prompts) {
          curve_prompts_.push_back(set[i]);
        }
      }
    }
    if (arguments.curves) {
      curve_rows_ = wanted_curve_rows(arguments);
    }
  }

  /// Does what has no record yet.
  void run() {
    const std::vector<PromptTask> heads = head_tasks();
    const std::vector<PromptTask> errors = error_tasks();
    const std::size_t ablated = arguments_->ablates() ? ablated_before() : 0;
    const std::size_t ablations = arguments_->ablates() ? arguments_->ablate_prompts : 0;
    if (!records_->empty() && (!heads.empty() || !errors.empty() || ablated < ablations)) {
      complain(fmt::format(
          "going on: {} of {} prompts are done for the heads{}{}", runs_.size() - heads.size(), runs_.size(),
          prompts_.empty() ? ""
                           : fmt::format(", {} of {} for the layer errors", prompts_.size() - errors.size(),
                                         prompts_.size()),
          ablations == 0 ? "" : fmt::format(", {} of {} for the masks", ablated, ablations)));
    }
    const std::size_t passes = 1 + arguments_->ablate_heads.size() * (2 + ablation_draws);
    Progress progress{"calibrate", tokens_of(heads) + tokens_of(errors) +
                                       static_cast<double>((ablations - std::min(ablated, ablations)) *
                                                           arguments_->ablate_length * passes)};
    do_all(heads, progress);
    scores_.emplace(records_->heads(runs_.size(), shape_));
    ranking_.emplace(scores_->scores(arguments_->kind()).ranking());
    do_all(errors, progress);
    if (arguments_->ablates()) {
      ablate(progress);
    }
  }

  // What has come of it, after run().

  std::span<const NeedleRun> runs() const { return runs_; }
  const compresskv::calibrate::HeadScoreAccumulator& scores() const { return *scores_; }
  /// None where they are not measured.
  std::optional<compresskv::LayerErrors> errors() const {
    if (!arguments_->measures_errors()) {
      return std::nullopt;
    }
    return records_->errors(prompts_, arguments_->error_rows, shape_).errors();
  }
  Json curves_json() const {
    Json errors = Json::array();
    for (const std::size_t rows : curve_rows_) {
      errors.push_back(records_->errors(curve_prompts_, rows, shape_).step_errors());
    }
    return {{"rows", curve_rows_}, {"errors", std::move(errors)}};
  }
  Json masks_json() const { return ablation_json(*records_, arguments_->ablate_length, masks_, ablated_); }

 private:
  void do_all(std::span<const PromptTask> tasks, Progress& progress) {
    const std::size_t jobs = std::min(arguments_->jobs, tasks.size());
    const auto all_threads = arguments_->model.threads == 0
                                 ? static_cast<std::size_t>(std::thread::hardware_concurrency())
                                 : static_cast<std::size_t>(arguments_->model.threads);
    const auto start = [&] {
      const auto threads = static_cast<int>(std::max<std::size_t>(1, all_threads / jobs));
      const auto calibration =
          std::make_shared<PromptCalibration>(arguments_->settings, arguments_->model.model, threads);
      return [calibration, tasks](std::size_t task, const Take& hand_on) {
        tasks[task].work(*calibration, hand_on);
      };
    };
    const auto show = [&](std::size_t task) {
      if (task < tasks.size()) {
        progress.show(done_, tasks[task].note);
      }
    };
    show(0);
    share_out(
        tasks.size(), jobs, start, [&](const Json& record) { records_->add(record); },
        [&](std::size_t task) {
          done_ += tasks[task].tokens;
          show(task + 1);
        });
  }

  std::vector<PromptTask> head_tasks() const {
    std::vector<PromptTask> tasks;
    for (const NeedleRun& run : runs_) {
      if (!records_->has(heads_key(run.run))) {
        tasks.push_back({.tokens = static_cast<double>(run.length),
                         .note = fmt::format("scoring heads, {} tokens", run.length),
                         .work = [run](const PromptCalibration& calibration, const Take& hand_on) {
                           hand_on(calibration.score_heads(run));
                         }});
      }
    }
    return tasks;
  }

  std::vector<PromptTask> error_tasks() const {
    std::vector<PromptTask> tasks;
    for (const ErrorPrompt& prompt : prompts_) {
      std::set<std::size_t> budgets = {arguments_->error_rows};
      const bool has_curve =
          std::any_of(curve_prompts_.begin(), curve_prompts_.end(), [&](const ErrorPrompt& other) {
            return other.data_set == prompt.data_set && other.run == prompt.run;
          });
      if (has_curve) {
        budgets.insert(curve_rows_.begin(), curve_rows_.end());
      }
      std::vector<std::size_t> missing;
      for (const std::size_t rows : budgets) {
        if (!records_->has(errors_key(rows, prompt.data_set, prompt.run))) {
          missing.push_back(rows);
        }
      }
      if (!missing.empty()) {
        // An answer from both caches takes about as long as reading a third of the prompt.
        tasks.push_back(
            {.tokens = static_cast<double>(prompt.length) * (1.0 + 0.3 * static_cast<double>(missing.size())),
             .note = fmt::format("measuring layers, {} tokens", prompt.length),
             .work = [this, prompt, missing](const PromptCalibration& calibration, const Take& hand_on) {
               calibration.measure_errors(prompt, *ranking_, missing, hand_on);
             }});
      }
    }
    return tasks;
  }

  /// Prompts of which every answer is there; before the ranking is known, which names no heads.
  std::size_t ablated_before() const {
    const HeadMask none{.heads = "srh"};
    const HeadMask last{.heads = "random",
                        .draw = ablation_draws - 1,
                        .masked = std::vector<engine::HeadIndex>(arguments_->ablate_heads.back())};
    std::size_t count = 0;
    for (std::size_t run = 0; records_->has(ablation_key(arguments_->ablate_length, none, run)); ++run) {
      count += records_->has(ablation_key(arguments_->ablate_length, last, run)) ? 1U : 0U;
    }
    return count;
  }

  /// Of the prompts in their order those count that the model answers with all heads.
  void ablate(Progress& progress) {
    constexpr std::size_t patience = 10;  // prompts tried for each that is wanted
    const std::size_t wanted = arguments_->ablate_prompts;
    const std::size_t length = arguments_->ablate_length;
    masks_ = head_masks(scores_->scores(arguments_->kind()), scores_->scores(HeadScoreKind::classic),
                        arguments_->ablate_heads, ablation_draws);
    for (std::size_t first = 0; ablated_.size() < wanted && first < patience * wanted;) {
      const std::size_t last = first + wanted - ablated_.size();
      std::vector<PromptTask> tasks;
      for (std::size_t run = first; run < last; ++run) {
        const bool known = records_->has(ablation_key(length, masks_[0], run));
        std::vector<HeadMask> missing;
        for (const HeadMask& mask : masks_) {
          if (!records_->has(ablation_key(length, mask, run))) {
            missing.push_back(mask);
          }
        }
        if (!missing.empty() && (!known || records_->right(length, masks_[0], run))) {
          tasks.push_back(
              {.tokens = static_cast<double>(length * missing.size()),
               .note = fmt::format("masking heads, prompt {}", run),
               .work = [length, run, missing](const PromptCalibration& calibration, const Take& hand_on) {
                 calibration.ablate(length, run, missing, hand_on);
               }});
        }
      }
      do_all(tasks, progress);
      for (; first < last; ++first) {
        if (records_->right(length, masks_[0], first)) {
          ablated_.push_back(first);
        }
      }
    }
    if (ablated_.empty()) {
      throw engine::Error(fmt::format(
          "--ablate: the model answers none of {} prompts of {} tokens with all its heads; give a smaller "
          "--ablate-length",
          patience * wanted, length));
    }
    if (ablated_.size() < wanted) {
      progress.clear();
      complain(
          fmt::format("--ablate: the model answers {} of the {} prompts wanted", ablated_.size(), wanted));
    }
  }

  const CalibrateArguments* arguments_;
  compresskv::ModelShape shape_;
  CalibrationRecords* records_;
  std::vector<NeedleRun> runs_;
  std::vector<ErrorPrompt> prompts_;
  std::vector<ErrorPrompt> curve_prompts_;
  std::vector<std::size_t> curve_rows_;
  std::optional<compresskv::calibrate::HeadScoreAccumulator> scores_;
  std::optional<compresskv::HeadRanking> ranking_;
  std::vector<HeadMask> masks_;
  std::vector<std::size_t> ablated_;  // prompts that count
  double done_ = 0.0;                 // tokens
};

/// What `measure` makes of stretches of the longest length, in a process of its own, as this one may have to
/// fork again.
Json measure_texts(const CalibrateArguments& arguments,
                   const std::function<Json(const PromptCalibration&, std::size_t length)>& measure) {
  const std::size_t longest = *std::max_element(arguments.lengths.begin(), arguments.lengths.end());
  Json told;
  const auto start = [&] {
    const auto calibration = std::make_shared<PromptCalibration>(arguments.settings, arguments.model.model,
                                                                 arguments.model.threads);
    return [&, calibration](std::size_t, const Take& hand_on) { hand_on(measure(*calibration, longest)); };
  };
  share_out(
      1, 1, start, [&](const Json& record) { told = record; }, [](std::size_t) {});
  told["length"] = longest;
  return told;
}

// ---- what is told about it ----

/// "SmolLM2-135M-Instruct" of "SmolLM2-135M-Instruct.Q4_1.gguf"; dots inside a name like "3.1" stay.
std::string model_name(const std::filesystem::path& path) {
  const std::filesystem::path stem = path.stem();
  const std::string type = stem.extension().string();
  for (const char* prefix : {".Q", ".IQ", ".F16", ".F32", ".BF16", ".q", ".f16", ".f32", ".bf16"}) {
    if (type.starts_with(prefix)) {
      return stem.stem().string();
    }
  }
  return stem.string();
}

std::string command_text(const CalibrateArguments& arguments) {
  const CalibrationSettings& settings = arguments.settings;
  std::string text = fmt::format(
      "ckv calibrate{} --model {} --out DIR --lengths {} --depths {} --needles {} --max-new-tokens {} "
      "--counting {}",
      arguments.model.is_llama_cpp() ? " --engine llama.cpp" : "", arguments.model.model.filename().string(),
      fmt::join(arguments.lengths, ","), settings.depths, settings.needles.size(), settings.max_new_tokens,
      arguments.counting);
  if (arguments.measures_errors()) {
    text += fmt::format(" --texts {} --error-rows {} --window {} --heads-per-layer {} --pool {}",
                        arguments.texts, arguments.error_rows, settings.cache.window.value(),
                        settings.cache.heads_per_layer, settings.cache.pool);
  }
  if (!arguments.needle_file.empty()) {
    text += fmt::format(" --needle-file {}", arguments.needle_file.filename().string());
  }
  if (!settings.haystack.empty()) {
    text += fmt::format(" --haystack {}", settings.haystack.filename().string());
  }
  if (arguments.curves) {
    text += " --curves";
  }
  if (arguments.statistics) {
    text += " --statistics";
  }
  if (arguments.kv_heads) {
    text += " --kv-heads";
  }
  if (arguments.surrogate) {
    text += " --surrogate";
  }
  if (arguments.ablates()) {
    text += fmt::format(" --ablate {} --ablate-length {} --ablate-prompts {}",
                        fmt::join(arguments.ablate_heads, ","), arguments.ablate_length,
                        arguments.ablate_prompts);
  }
  return text;
}

/// What was run on what, so that the files beside it can be made again, and what it says.
Json calibration_json(const CalibrateArguments& arguments, const std::string& name, const std::string& sha256,
                      const CalibrationRecords& records, const CalibrationWork& work) {
  Json out;
  out["model"] = name;
  out["model_file"] = arguments.model.model.filename().string();
  out["model_sha256"] = sha256;
  out["command"] = command_text(arguments);
  out["haystack"] =
      haystack_json(arguments.settings.haystack, arguments.settings.haystack.filename().string());
  if (arguments.model.is_llama_cpp()) {
    out["engine"] = arguments.model.engine;
  } else {
    out["code_path"] = compresskv::kernel::name(compresskv::kernel::code_path());
  }
  for (const NeedleText& needle : arguments.settings.needles) {
    out["needles"].push_back({{"fact", needle.fact}, {"question", needle.question}});
  }
  for (const NeedleRun& run : work.runs()) {
    const Json& record = records.at(heads_key(run.run));
    Json told;
    for (const char* key : {"run", "needle", "length", "tokens", "depth", "recall", "counted", "answer"}) {
      told[key] = record.at(key);
    }
    out["runs"].push_back(std::move(told));
  }
  out["stability"] = stability_json(work.scores(), arguments.kind());
  if (arguments.curves) {
    out["curves"] = work.curves_json();
  }
  if (arguments.ablates()) {
    out["ablation"] = work.masks_json();
  }
  return out;
}

void print_stability(const Json& stability) {
  fmt::print("\n");
  if (stability.is_null()) {
    print_text("stability: too few prompts counted to compare halves of them; give more");
    return;
  }
  const Json& halves = stability.at("halves");
  print_text(fmt::format(
      "rankings from {} and from {} other prompts: {:.0f} % of the best 4 heads a layer the same, rank "
      "correlation over all heads {:.3f}",
      halves.at("prompts").at(0).get<std::size_t>(), halves.at("prompts").at(1).get<std::size_t>(),
      100.0 * halves.at("top4_overlap").get<double>(), halves.at("rank_correlation").get<double>()));
  for (const Json& row : stability.at("by_prompts")) {
    print_text(fmt::format("  {:>3} prompts: {:.0f} % of the best 4 as from all",
                           row.at("prompts").get<std::size_t>(),
                           100.0 * row.at("top4_overlap").get<double>()));
  }
}

void print_masks(const Json& rows) {
  fmt::print("\n");
  print_text(fmt::format("right answers with so many heads masked, of {} that are right with none",
                         rows.at(0).at("prompts").get<std::size_t>()));
  std::map<std::size_t, std::map<std::string, double>> shares;
  for (const Json& row : rows) {
    shares[row.at("masked")][row.at("heads")] = row.at("right");
  }
  std::vector<Table::Column> columns = {{.title = "masked", .width = 8, .left = true}};
  for (const auto& [heads, right] : shares.begin()->second) {
    columns.push_back({.title = heads, .width = 10});
  }
  const Table table{columns};
  for (const auto& [masked, of] : shares) {
    std::vector<std::string> cells = {std::to_string(masked)};
    for (const auto& [heads, right] : of) {
      cells.push_back(fmt::format("{:.0f} %", 100.0 * right));
    }
    table.row(cells);
  }
}

void print_surrogate(const Json& told) {
  const auto explained = told.at("explained").get<std::vector<double>>();
  fmt::print("\n");
  print_text(fmt::format(
      "surrogate from {} tokens: of {} held out it explains {:.2f} of the scores' variance, mean over layers "
      "({:.2f} "
      "to {:.2f})",
      told.at("tokens").get<std::size_t>(), told.at("held_out").get<std::size_t>(),
      std::accumulate(explained.begin(), explained.end(), 0.0) / static_cast<double>(explained.size()),
      *std::min_element(explained.begin(), explained.end()),
      *std::max_element(explained.begin(), explained.end())));
}

void print_layers(const compresskv::LayerErrors& errors) {
  fmt::print("\nlayers by what evicting costs\n");
  std::vector<std::size_t> order(errors.layers());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](auto a, auto b) { return errors.average()[a] > errors.average()[b]; });
  for (const std::size_t layer : std::span(order).first(std::min<std::size_t>(5, order.size()))) {
    fmt::print("  layer {:>2}  {:.4f}\n", layer, errors.average()[layer]);
  }
}

void print_summary(const CalibrateArguments& arguments, const CalibrationWork& work,
                   const compresskv::HeadScores& scores, const std::optional<compresskv::LayerErrors>& errors,
                   const Json& told) {
  const Table table{{{.title = "tokens", .width = 8, .left = true},
                     {.title = "prompts", .width = 10},
                     {.title = "counted", .width = 10}}};
  for (const std::size_t length : arguments.lengths) {
    std::size_t prompts = 0;
    std::size_t counted = 0;
    for (const NeedleRun& run : work.runs()) {
      prompts += run.length == length ? 1 : 0;
      counted += run.length == length && work.scores().runs().at(run.run).counted ? 1U : 0U;
    }
    table.row({std::to_string(length), std::to_string(prompts), std::to_string(counted)});
  }

  const std::vector<engine::HeadIndex> heads = best_heads(scores);
  fmt::print("\nbest retrieval heads (mean score)\n");
  for (const auto& [layer, head] : std::span(heads).first(std::min<std::size_t>(10, heads.size()))) {
    fmt::print("  layer {:>2} head {:>2}  {:.3f}\n", layer, head,
               scores.mean(static_cast<std::size_t>(layer), static_cast<std::size_t>(head)));
  }

  if (errors) {
    print_layers(*errors);
  }
  print_stability(told.at("stability"));
  if (arguments.surrogate) {
    print_surrogate(told.at("surrogate"));
  }
  if (arguments.ablates()) {
    print_masks(told.at("ablation"));
  }
}

void check(const CalibrateArguments& arguments, const compresskv::ModelShape& shape) {
  if (std::filesystem::path(arguments.name).has_parent_path() || arguments.name == "." ||
      arguments.name == "..") {
    throw UsageError(fmt::format("--name is '{}': how the names of files in --out begin, without a folder",
                                 arguments.name));
  }
  if (std::set(arguments.lengths.begin(), arguments.lengths.end()).size() < arguments.lengths.size()) {
    throw UsageError(
        fmt::format("--lengths {}: one stands there twice, drop it", fmt::join(arguments.lengths, ",")));
  }
  if (arguments.measures_errors()) {
    try {
      compresskv::Budget::tokens_per_layer(arguments.error_rows)
          .validate(arguments.settings.cache.window.value(), shape);
    } catch (const compresskv::ArgumentError& error) {
      throw UsageError(fmt::format("--error-rows: {}", error.what()));
    }
  }
  const std::size_t heads = shape.layers * shape.query_heads;
  for (const std::size_t masked : arguments.ablate_heads) {
    if (masked > heads) {
      throw UsageError(fmt::format("--ablate {}: the model has {} heads in all", masked, heads));
    }
  }
}

void calibrate(CalibrateArguments& arguments) {
  arguments.settings.engine = arguments.model.engine;
  arguments.settings.needles = wanted_needles(arguments);
  const compresskv::ModelShape shape = shape_of_file(arguments.model.engine, arguments.model.model);
  check(arguments, shape);
  std::error_code failure;
  std::filesystem::create_directories(arguments.out, failure);
  if (failure) {
    throw engine::Error(
        fmt::format("cannot make the folder '{}': {}", arguments.out.string(), failure.message()));
  }
  const std::string sha256 = engine::sha256_of_file(arguments.model.model);
  CalibrationRecords records{arguments.out / "records.jsonl", header_json(arguments, sha256)};
  CalibrationWork work{arguments, shape, records};
  work.run();

  // Each file appears whole, and only once all is measured.
  const std::string name = arguments.name.empty() ? model_name(arguments.model.model) : arguments.name;
  const auto file = [&](const char* ending) { return arguments.out / (name + ending); };
  const compresskv::HeadScores scores = work.scores().scores(arguments.kind());
  const std::optional<compresskv::LayerErrors> errors = work.errors();
  Json told = calibration_json(arguments, name, sha256, records, work);
  if (arguments.statistics) {
    told["query_statistics"] =
        measure_texts(arguments, [&](const PromptCalibration& calibration, std::size_t length) {
          return calibration.measure_statistics(length, statistics_texts, file("_query_statistics.bin"));
        });
    told["query_statistics"]["texts"] = statistics_texts;
  }
  if (arguments.kv_heads) {
    told["kv_heads"] =
        measure_texts(arguments, [&](const PromptCalibration& calibration, std::size_t length) {
          return calibration.measure_kv_heads(length, statistics_texts, file("_kv_head_scores.json"));
        });
    told["kv_heads"]["texts"] = statistics_texts;
  }
  if (arguments.surrogate) {
    told["surrogate"] =
        measure_texts(arguments, [&](const PromptCalibration& calibration, std::size_t length) {
          return calibration.fit_surrogate(length, surrogate_texts, file("_surrogate.bin"));
        });
  }
  compresskv::io::save_head_scores(file("_head_scores.json"), scores);
  compresskv::io::save_head_scores(file("_classic_scores.json"),
                                   work.scores().scores(HeadScoreKind::classic));
  compresskv::io::save_head_ranking(file("_head_idx.json"), scores.ranking());
  if (errors) {
    compresskv::io::save_layer_errors(file("_layer_score.jsonl"), *errors);
  }
  write_text_file(arguments.out / "calibration.json", told.dump(1) + "\n");

  print_summary(arguments, work, scores, errors, told);
  fmt::print("\n");
  print_text(fmt::format(
      "written to {}: {}_head_idx.json, _head_scores.json, _classic_scores.json, {}{}{}{}calibration.json, "
      "records.jsonl",
      arguments.out.string(), name, errors ? "_layer_score.jsonl, " : "",
      arguments.statistics ? "_query_statistics.bin, " : "",
      arguments.kv_heads ? "_kv_head_scores.json, " : "", arguments.surrogate ? "_surrogate.bin, " : ""));
}

/// Throws UsageError where an option was given that needs the small engine.
void refuse_what_needs_small_engine(const CLI::App& command) {
  const auto refuse = [&](std::initializer_list<const char*> options, std::string_view not_shown) {
    for (const char* option : options) {
      if (command.count(option) > 0) {
        needs_small_engine(option, not_shown);
      }
    }
  };
  refuse({"--texts", "--error-rows", "--curves", "--window", "--heads-per-layer", "--pool"},
         "what a layer loses by eviction (layer errors)");
  refuse({"--statistics"}, "queries and how they were rotated (query statistics)");
  refuse({"--kv-heads"}, "the queries of a text that is fed once more (scores of KV heads)");
  refuse({"--surrogate"}, "what goes into a layer's attention (surrogates)");
  refuse({"--ablate"}, "a model without some of its heads (masks)");
}

}  // namespace

void add_calibrate(CLI::App& app) {
  CLI::App* command = app.add_subcommand(
      "calibrate", "Find a model's semantic retrieval heads and what evicting from each layer costs");
  const auto arguments = std::make_shared<CalibrateArguments>();
  arguments->model.add_to(*command);
  command
      ->add_option("--out", arguments->out,
                   "Folder for the results; made where it is not there. Where a run was stopped, this one "
                   "goes on")
      ->required()
      ->type_name("DIR");
  command->add_option("--name", arguments->name, "How the files begin; default: the model file's name");
  command->add_option("--lengths", arguments->lengths, "Lengths of the prompts in tokens: 512,1024,2048")
      ->delimiter(',')
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command
      ->add_option("--depths", arguments->settings.depths, "Depths of the needle, evenly from first to last")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command
      ->add_option("--needles", arguments->needles,
                   fmt::format("Needles; default: {} of the {} of this program, all of --needle-file",
                               own_needles, calibration_needles().size()))
      ->check(CLI::PositiveNumber);
  command
      ->add_option("--needle-file", arguments->needle_file,
                   "Needles of your own as JSON Lines: {\"fact\": \"a sentence\", \"question\": \"what it "
                   "answers\"}")
      ->type_name("FILE.jsonl");
  command
      ->add_option("--haystack", arguments->settings.haystack,
                   "A long text to hide the needles in, and to go on with; default: the King James text, "
                   "from the program `bible`")
      ->type_name("FILE");
  command->add_option("--max-new-tokens", arguments->settings.max_new_tokens, "Longest answer")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command
      ->add_option(
          "--counting", arguments->counting,
          "How often a step counts whose token is in the needle: for each occurrence there (as the released "
          "code), or once a step (as the paper)")
      ->check(CLI::IsMember({"occurrence", "step"}))
      ->capture_default_str();
  command
      ->add_option("--texts", arguments->texts,
                   "Stretches of the haystack of each length whose continuation is a second data set of "
                   "layer errors, beside the needles")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command
      ->add_option("--error-rows", arguments->error_rows,
                   "Rows that a layer keeps while its error is measured, window included")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command->add_flag("--curves", arguments->curves,
                    fmt::format("Measure layers at capacities of 16, 32, 64, ... rows, too, on {} prompts of "
                                "each data set",
                                curve_prompts));
  command->add_flag("--statistics", arguments->statistics,
                    fmt::format("Measure how each head's queries are spread, too, over {} stretches of the "
                                "haystack of the longest length: NAME_query_statistics.bin, for "
                                "expected-attention, q-filter and triattention",
                                statistics_texts));
  command->add_flag(
      "--kv-heads", arguments->kv_heads,
      fmt::format("Score KV heads by what they look at when the model repeats a text, too, over "
                  "{} stretches of the haystack of the longest length: NAME_kv_head_scores.json, "
                  "for kvzip-heads",
                  statistics_texts));
  command->add_flag(
      "--surrogate", arguments->surrogate,
      fmt::format("Fit a map from hidden states to what repeats of the text look at, too, over {} "
                  "stretches of the haystack of the longest length: NAME_surrogate.bin, for kvzap",
                  surrogate_texts));
  CLI::Option* ablate =
      command
          ->add_option("--ablate", arguments->ablate_heads,
                       fmt::format("Proof that the heads matter: answers with so many of the best heads "
                                   "masked, by both scores, and with as many random ones (mean of {} draws). "
                                   "Without numbers: {}",
                                   ablation_draws, fmt::join(ablation_heads, ",")))
          ->delimiter(',')
          ->expected(0, -1)
          ->check(CLI::PositiveNumber)
          ->type_name("[HEADS,...]");
  command->add_option("--ablate-length", arguments->ablate_length, "Tokens of the prompts of --ablate")
      ->check(CLI::PositiveNumber)
      ->needs(ablate)
      ->capture_default_str();
  command
      ->add_option("--ablate-prompts", arguments->ablate_prompts,
                   "Prompts of --ablate that the model answers with all heads; others are replaced")
      ->check(CLI::PositiveNumber)
      ->needs(ablate)
      ->capture_default_str();
  command
      ->add_option("--jobs", arguments->jobs,
                   "Processes that share the prompts, and --threads; each holds the model. The results do "
                   "not depend on it")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  arguments->settings.cache.add_to(*command, false);
  command->footer(
      "Writes NAME_head_idx.json (ranking), NAME_head_scores.json and NAME_classic_scores.json (a score a "
      "head and prompt),\nNAME_layer_score.jsonl (layer errors), calibration.json (settings, every answer, "
      "how stable the ranking is)\nand, after every prompt, records.jsonl, with which a stopped run goes on. "
      "A prompt counts when the answer\nholds over half of the needle's words. --curves, --ablate, "
      "--statistics, --kv-heads, --surrogate, --texts "
      "and --error-rows may be added to a folder later.\n--engine llama.cpp finds the heads of any model "
      "that it "
      "runs; layer errors, masks, query statistics and surrogates need the small engine.");
  command->callback([arguments, command] {
    check_engine(arguments->model.engine);
    if (arguments->model.is_llama_cpp()) {
      refuse_what_needs_small_engine(*command);
    }
    arguments->settings.cache.fill(Method::compresskv);
    std::vector<std::size_t>& heads = arguments->ablate_heads;
    if (heads == std::vector<std::size_t>{0}) {  // what CLI11 makes of an option without its values
      heads = ablation_heads;
    }
    std::sort(heads.begin(), heads.end());
    heads.erase(std::unique(heads.begin(), heads.end()), heads.end());
    calibrate(*arguments);
  });
}

}  // namespace ckv
