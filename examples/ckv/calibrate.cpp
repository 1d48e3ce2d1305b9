// ckv calibrate: which heads retrieve, and what evicting from each layer costs, from needle prompts.

#include <fmt/core.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <compresskv/calibrate/eviction_error_accumulator.hpp>
#include <compresskv/calibrate/head_score_accumulator.hpp>
#include <compresskv/calibrate/rouge1_recall.hpp>
#include <compresskv/io/calibration_files.hpp>
#include <cstddef>
#include <filesystem>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "arguments.hpp"
#include "commands.hpp"
#include "compress.hpp"
#include "engine/error.hpp"
#include "engine/sha256.hpp"
#include "needle.hpp"
#include "run.hpp"
#include "terminal.hpp"
#include "usage_error.hpp"

namespace ckv {
namespace {

using Json = nlohmann::ordered_json;
namespace calibration = compresskv::calibrate;

struct CalibrateArguments {
  ModelArguments model;
  CacheArguments cache;
  std::filesystem::path out;
  std::string name;
  std::vector<std::size_t> lengths = {512, 1024, 2048};
  std::size_t depths = 5;
  std::size_t needles = 4;
  std::filesystem::path haystack;
  std::size_t max_new_tokens = 50;
  std::string counting = "occurrence";
  std::size_t error_rows = 32;
};

/// One needle prompt, and what came of it.
struct CalibrationRun {
  std::size_t needle = 0;
  std::size_t length = 0;
  double depth = 0.0;
  NeedlePrompt prompt = {};
  std::string answer = {};
  double recall = 0.0;
  bool counted = false;
};

/// Greedy decoding of one prompt to the end token; `picked` hears of each token before it is fed.
template <class Picked>
std::vector<TokenId> decode_greedily(const LoadedModel& loaded, engine::Sequence& sequence,
                                     std::span<const TokenId> prompt, const engine::PrefillOptions& options,
                                     std::size_t max_new_tokens, Picked&& picked) {
  std::vector<TokenId> tokens;
  std::span<const float> logits = sequence.prefill(prompt, options);
  while (tokens.size() < max_new_tokens) {
    check_interrupt();
    const TokenId token = engine::greedy(logits);
    if (loaded.tokenizer.is_end_of_generation(token)) {
      break;
    }
    tokens.push_back(token);
    picked(token);
    logits = sequence.decode(token, sequence.next_position());
  }
  return tokens;
}

std::vector<CalibrationRun> plan_runs(const CalibrateArguments& arguments, const LoadedModel& loaded,
                                      const Haystack& haystack) {
  std::vector<CalibrationRun> runs;
  for (const std::size_t length : arguments.lengths) {
    for (std::size_t depth = 0; depth < arguments.depths; ++depth) {
      for (std::size_t needle = 0; needle < arguments.needles; ++needle) {
        // Each needle lies in another part of the text, so that the heads are not those of one passage.
        const double start = static_cast<double>(needle) / static_cast<double>(arguments.needles);
        CalibrationRun run{.needle = needle, .length = length};
        run.depth = arguments.depths == 1
                        ? 0.5
                        : static_cast<double>(depth) / static_cast<double>(arguments.depths - 1);
        run.prompt = needle_prompt(loaded, haystack, calibration_needles()[needle],
                                   {.tokens = length, .depth = run.depth, .start = start});
        runs.push_back(std::move(run));
      }
    }
  }
  return runs;
}

double tokens_of(std::span<const CalibrationRun> runs) {
  double total = 0.0;
  for (const CalibrationRun& run : runs) {
    total += static_cast<double>(run.prompt.tokens.size());
  }
  return total;
}

compresskv::HeadScores score_heads(const CalibrateArguments& arguments, const LoadedModel& loaded,
                                   std::span<CalibrationRun> runs, Progress& progress, double& done) {
  const engine::ModelConfig& config = loaded.model.config();
  calibration::HeadScoreAccumulator scores{static_cast<std::size_t>(config.layers),
                                           static_cast<std::size_t>(config.heads)};
  for (CalibrationRun& run : runs) {
    engine::Sequence sequence{loaded.model};
    sequence.hooks().attention = [&](int layer, int head, std::span<const float> row) {
      scores.add_attention(static_cast<std::size_t>(layer), static_cast<std::size_t>(head), row);
    };
    const auto on_layer = [&](const engine::LayerView& layer) {
      const double share = static_cast<double>(layer.layer + 1) / config.layers;
      progress.show(done + share * static_cast<double>(run.prompt.tokens.size()), "scoring heads");
      check_interrupt();
    };
    scores.begin_run(run.prompt.tokens, run.prompt.needle);
    const std::vector<TokenId> tokens =
        decode_greedily(loaded, sequence, run.prompt.tokens, {.on_layer = on_layer, .on_logits = {}},
                        arguments.max_new_tokens, [&](TokenId token) { scores.add_token(token); });
    run.answer = loaded.tokenizer.decode(tokens, {.skip_special = true});
    const std::string_view fact = calibration_needles()[run.needle].fact;
    run.recall = calibration::rouge1_recall(run.answer, fact);
    run.counted = calibration::answered(run.answer, fact);
    scores.end_run(run.counted);
    done += static_cast<double>(run.prompt.tokens.size());
  }
  return scores.scores(arguments.counting == "step" ? calibration::HeadScoreKind::once_per_step
                                                    : calibration::HeadScoreKind::once_per_occurrence);
}

compresskv::LayerErrors measure_errors(const CalibrateArguments& arguments, const LoadedModel& loaded,
                                       const compresskv::HeadRanking& ranking,
                                       std::span<const CalibrationRun> runs, Progress& progress,
                                       double& done) {
  const engine::ModelConfig& config = loaded.model.config();
  Compression how{.method = Method::compresskv,
                  .budget = compresskv::Budget::tokens_per_layer(arguments.error_rows),
                  .heads = ranking};
  arguments.cache.apply_to(how);
  calibration::EvictionErrorAccumulator errors{static_cast<std::size_t>(config.layers)};
  const auto compressor = make_compressor(how, shape_of(config, engine::KvType::f32), loaded.model.pool());
  // One data set a length: long prompts must not rule the mean because they lose more.
  std::size_t number = 0;
  for (const CalibrationRun& run : runs) {
    errors.begin_run(fmt::format("needle_{}", run.length), number++);
    engine::Sequence sequence{loaded.model};
    sequence.hooks().shadow = [&](int layer, std::span<const float> full, std::span<const float> evicted) {
      errors.add(static_cast<std::size_t>(layer), full, evicted);
    };
    const auto on_layer = [&](engine::LayerView& layer) {
      compressor->compress(layer.shadow(), {.queries = queries_of(layer)});
      const double share = static_cast<double>(layer.layer + 1) / config.layers;
      progress.show(done + share * static_cast<double>(run.prompt.tokens.size()), "measuring layers");
      check_interrupt();
    };
    compressor->begin(run.prompt.tokens.size());
    decode_greedily(loaded, sequence, run.prompt.tokens,
                    {.window = how.window, .on_layer = on_layer, .on_logits = {}}, arguments.max_new_tokens,
                    [](TokenId) {});
    errors.end_run();
    done += static_cast<double>(run.prompt.tokens.size());
  }
  return errors.errors();
}

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
  std::string text = fmt::format(
      "ckv calibrate --model {} --out DIR --lengths {} --depths {} --needles {} --max-new-tokens {} "
      "--counting {} "
      "--error-rows {} --window {} --heads-per-layer {} --pool {}",
      arguments.model.model.filename().string(), fmt::join(arguments.lengths, ","), arguments.depths,
      arguments.needles, arguments.max_new_tokens, arguments.counting, arguments.error_rows,
      arguments.cache.window, arguments.cache.heads_per_layer, arguments.cache.pool);
  if (!arguments.haystack.empty()) {
    text += fmt::format(" --haystack {}", arguments.haystack.filename().string());
  }
  return text;
}

/// What was run on what, so that the files beside it can be made again.
Json record_json(const CalibrateArguments& arguments, const std::string& name,
                 std::span<const CalibrationRun> runs) {
  Json record;
  record["model"] = name;
  record["model_file"] = arguments.model.model.filename().string();
  record["model_sha256"] = engine::sha256_of_file(arguments.model.model);
  record["command"] = command_text(arguments);
  record["haystack"] = arguments.haystack.empty() ? "King James text of Debian's bible-kjv"
                                                  : arguments.haystack.filename().string();
  record["code_path"] = compresskv::kernel::name(compresskv::kernel::code_path());
  for (std::size_t needle = 0; needle < arguments.needles; ++needle) {
    record["needles"].push_back(
        {{"fact", calibration_needles()[needle].fact}, {"question", calibration_needles()[needle].question}});
  }
  for (const CalibrationRun& run : runs) {
    record["runs"].push_back({{"needle", run.needle},
                              {"tokens", run.prompt.tokens.size()},
                              {"depth", run.depth},
                              {"recall", run.recall},
                              {"counted", run.counted},
                              {"answer", run.answer}});
  }
  return record;
}

void print_summary(const CalibrateArguments& arguments, std::span<const CalibrationRun> runs,
                   const compresskv::HeadScores& scores, const compresskv::LayerErrors& errors) {
  fmt::print("{:<8}{:>10}{:>10}\n", "tokens", "prompts", "counted");
  for (const std::size_t length : arguments.lengths) {
    std::size_t prompts = 0;
    std::size_t counted = 0;
    for (const CalibrationRun& run : runs) {
      prompts += run.length == length ? 1 : 0;
      counted += run.length == length && run.counted ? 1 : 0;
    }
    fmt::print("{:<8}{:>10}{:>10}\n", length, prompts, counted);
  }

  struct Head {
    std::size_t layer;
    std::size_t head;
    double score;
  };
  std::vector<Head> heads;
  for (std::size_t layer = 0; layer < scores.layers(); ++layer) {
    for (std::size_t head = 0; head < scores.heads(); ++head) {
      heads.push_back({.layer = layer, .head = head, .score = scores.mean(layer, head)});
    }
  }
  std::stable_sort(heads.begin(), heads.end(),
                   [](const Head& a, const Head& b) { return a.score > b.score; });
  fmt::print("\nbest retrieval heads (mean score)\n");
  for (const Head& head : std::span(heads).first(std::min<std::size_t>(10, heads.size()))) {
    fmt::print("  layer {:>2} head {:>2}  {:.3f}\n", head.layer, head.head, head.score);
  }

  fmt::print("\nlayers by what evicting costs\n");
  std::vector<std::size_t> order(errors.layers());
  for (std::size_t layer = 0; layer < order.size(); ++layer) {
    order[layer] = layer;
  }
  std::stable_sort(order.begin(), order.end(),
                   [&](auto a, auto b) { return errors.average()[a] > errors.average()[b]; });
  for (const std::size_t layer : std::span(order).first(std::min<std::size_t>(5, order.size()))) {
    fmt::print("  layer {:>2}  {:.4f}\n", layer, errors.average()[layer]);
  }
}

void calibrate(const CalibrateArguments& arguments) {
  if (arguments.needles > calibration_needles().size()) {
    throw UsageError(
        fmt::format("--needles is {}, there are {}", arguments.needles, calibration_needles().size()));
  }
  std::error_code failure;
  std::filesystem::create_directories(arguments.out, failure);
  if (failure) {
    throw engine::Error(
        fmt::format("cannot make the folder '{}': {}", arguments.out.string(), failure.message()));
  }
  const LoadedModel loaded = load_model(arguments.model.model, arguments.model.threads);
  const Haystack haystack = Haystack::from(arguments.haystack);
  std::vector<CalibrationRun> runs = plan_runs(arguments, loaded, haystack);

  Progress progress{"calibrate", 2.0 * tokens_of(runs)};
  double done = 0.0;
  const compresskv::HeadScores scores = score_heads(arguments, loaded, runs, progress, done);
  const compresskv::HeadRanking ranking = scores.ranking();
  const compresskv::LayerErrors errors = measure_errors(arguments, loaded, ranking, runs, progress, done);
  progress.clear();

  // Nothing is written before all is measured; each file appears whole.
  const std::string name = arguments.name.empty() ? model_name(arguments.model.model) : arguments.name;
  const auto file = [&](const char* ending) { return arguments.out / (name + ending); };
  compresskv::io::save_head_scores(file("_head_scores.json"), scores);
  compresskv::io::save_head_ranking(file("_head_idx.json"), ranking);
  compresskv::io::save_layer_errors(file("_layer_score.jsonl"), errors);
  write_text_file(
      arguments.out / "calibration.json",
      record_json(arguments, name, runs).dump(1, ' ', false, Json::error_handler_t::replace) + "\n");

  print_summary(arguments, runs, scores, errors);
  fmt::print("\nwritten to {}: {}_head_idx.json, _head_scores.json, _layer_score.jsonl, calibration.json\n",
             arguments.out.string(), name);
}

}  // namespace

void add_calibrate(CLI::App& app) {
  CLI::App* command = app.add_subcommand(
      "calibrate", "Find a model's semantic retrieval heads and what evicting from each layer costs");
  const auto arguments = std::make_shared<CalibrateArguments>();
  arguments->model.add_to(*command);
  command->add_option("--out", arguments->out, "Folder for the results; made where it is not there")
      ->required()
      ->type_name("DIR");
  command->add_option("--name", arguments->name, "How the files begin; default: the model file's name");
  command->add_option("--lengths", arguments->lengths, "Lengths of the prompts in tokens: 512,1024,2048")
      ->delimiter(',')
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command->add_option("--depths", arguments->depths, "Depths of the needle, evenly from first to last")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command
      ->add_option("--needles", arguments->needles,
                   fmt::format("Needles, up to {}", calibration_needles().size()))
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command
      ->add_option(
          "--haystack", arguments->haystack,
          "A long text to hide the needles in; default: the King James text, from the program `bible`")
      ->type_name("FILE");
  command->add_option("--max-new-tokens", arguments->max_new_tokens, "Longest answer")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command
      ->add_option("--counting", arguments->counting,
                   "How often a step counts whose token is in the needle: for each occurrence there (as the "
                   "released code), or once a step (as the paper)")
      ->check(CLI::IsMember({"occurrence", "step"}))
      ->capture_default_str();
  command
      ->add_option("--error-rows", arguments->error_rows,
                   "Tokens that a layer keeps while its error is measured, window included")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  arguments->cache.add_to(*command, false);
  command->footer(
      "Writes NAME_head_idx.json (ranking), NAME_head_scores.json (a score a head and run), "
      "NAME_layer_score.jsonl (layer errors)\nand calibration.json (settings and every answer). A run counts "
      "when "
      "the answer holds over half of the needle's words.");
  command->callback([arguments] { calibrate(*arguments); });
}

}  // namespace ckv
