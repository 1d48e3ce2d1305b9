#include "calibration.hpp"

#include <fmt/core.h>

#include <algorithm>
#include <compresskv/calibrate/eviction_error_accumulator.hpp>
#include <compresskv/calibrate/head_score_accumulator.hpp>
#include <compresskv/calibrate/rouge1_recall.hpp>
#include <map>
#include <utility>

#include "engine/error.hpp"
#include "evaluation.hpp"
#include "tasks.hpp"

namespace ckv {
namespace {

namespace calibrate = compresskv::calibrate;

constexpr std::size_t text_steps = 32;  // that a stretch of text goes on

Json merged(Json key, Json more) {
  key.update(more);
  return key;
}

}  // namespace

Json heads_key(std::size_t run) { return {{"kind", "heads"}, {"run", run}}; }

Json errors_key(std::size_t rows, const std::string& data_set, std::size_t run) {
  return {{"kind", "errors"}, {"rows", rows}, {"data_set", data_set}, {"run", run}};
}

Json ablation_key(std::size_t length, const HeadMask& mask, std::size_t run) {
  return {{"kind", "ablation"},           {"length", length}, {"heads", mask.heads}, {"draw", mask.draw},
          {"masked", mask.masked.size()}, {"run", run}};
}

Json key_of(const Json& record) {
  static const std::map<std::string, std::vector<std::string>> names = {
      {"heads", {"run"}},
      {"errors", {"rows", "data_set", "run"}},
      {"ablation", {"length", "heads", "draw", "masked", "run"}}};
  Json key = {{"kind", record.at("kind")}};
  const auto found = names.find(key.at("kind").get<std::string>());
  if (found == names.end()) {
    throw engine::Error(fmt::format("its kind is {}", key.at("kind").dump()));
  }
  for (const std::string& name : found->second) {
    key[name] = record.at(name);
  }
  return key;
}

compresskv::ModelShape shape_of_file(std::string_view engine, const std::filesystem::path& path) {
  if (engine == small_engine) {
    return shape_of(engine::read_config(engine::GgufFile::open(path)), engine::KvType::f32);
  }
  compresskv::ModelShape shape;
  const auto start = [&] {
    return [&](std::size_t, const Take& hand_on) {
      const compresskv::ModelShape found = load_engine(engine, path, 1)->shape(engine::KvType::f32);
      hand_on({{"layers", found.layers},
               {"query_heads", found.query_heads},
               {"kv_heads", found.kv_heads},
               {"head_dim", found.head_dim},
               {"kv_row_bytes", found.kv_row_bytes}});
    };
  };
  share_out(
      1, 1, start,
      [&](const Json& found) {
        shape = {.layers = found.at("layers"),
                 .query_heads = found.at("query_heads"),
                 .kv_heads = found.at("kv_heads"),
                 .head_dim = found.at("head_dim"),
                 .kv_row_bytes = found.at("kv_row_bytes")};
      },
      [](std::size_t) {});
  return shape;
}

PromptCalibration::PromptCalibration(const CalibrationSettings& settings, const std::filesystem::path& model,
                                     int threads)
    : settings_(&settings),
      loaded_(load_engine(settings.engine, model, threads)),
      haystack_(Haystack::from(settings.haystack)) {}

const LoadedModel& PromptCalibration::small() const {
  const auto* loaded = dynamic_cast<const LoadedModel*>(loaded_.get());
  if (loaded == nullptr) {
    throw engine::Error(fmt::format("layer errors and masks need the small engine, the model is loaded in {}",
                                    loaded_->engine_name()));
  }
  return *loaded;
}

NeedlePrompt PromptCalibration::prompt_of(const NeedleRun& run) const {
  // Each needle lies in another part of the text, so that the heads are not those of one passage.
  const double start = static_cast<double>(run.needle) / static_cast<double>(settings_->needles.size());
  return needle_prompt(*loaded_, haystack_, settings_->needles[run.needle].view(),
                       {.tokens = run.length, .depth = run.depth, .start = start});
}

Json PromptCalibration::score_heads(const NeedleRun& run) const {
  const compresskv::ModelShape shape = loaded_->shape(engine::KvType::f32);
  const NeedlePrompt prompt = prompt_of(run);
  calibrate::HeadScoreAccumulator scores{shape.layers, shape.query_heads};
  scores.begin_run(run.run, prompt.tokens, prompt.needle);
  const std::string answer = loaded_->answer(
      prompt.tokens, settings_->max_new_tokens,
      {.on_attention = [&](std::size_t layer, std::size_t head,
                           std::span<const float> row) { scores.add_attention(layer, head, row); },
       .on_token = [&](TokenId token) { scores.add_token(token); }});
  const std::string& fact = settings_->needles[run.needle].fact;
  scores.end_run(calibrate::answered(answer, fact));
  const calibrate::HeadRun& ended = scores.runs().at(run.run);
  return merged(heads_key(run.run), {{"needle", run.needle},
                                     {"length", run.length},
                                     {"tokens", prompt.tokens.size()},
                                     {"depth", run.depth},
                                     {"answer", answer},
                                     {"recall", calibrate::rouge1_recall(answer, fact)},
                                     {"counted", ended.counted},
                                     {"once_per_occurrence", ended.once_per_occurrence},
                                     {"once_per_step", ended.once_per_step},
                                     {"classic", ended.classic}});
}

void PromptCalibration::measure_errors(const ErrorPrompt& prompt, const compresskv::HeadRanking& ranking,
                                       std::span<const std::size_t> budgets, const Take& hand_on) const {
  const LoadedModel& loaded = small();
  const auto layers = static_cast<std::size_t>(loaded.model.config().layers);
  std::vector<TokenId> tokens;
  std::vector<TokenId> continuation;
  if (prompt.needle) {
    tokens = prompt_of(*prompt.needle).tokens;
  } else {
    TaskPrompt text =
        task_prompt("perplexity", loaded, haystack_, {.length = prompt.length, .index = prompt.run});
    tokens = std::move(text.tokens);
    continuation = std::move(text.continuation);
    continuation.resize(std::min(continuation.size(), text_steps));
  }
  Compression how{.method = Method::compresskv, .heads = ranking};
  settings_->cache.apply_to(how);
  const Evaluation evaluation{loaded, engine::KvType::f32, settings_->max_new_tokens};
  ReadPrompt read = evaluation.read(tokens, window_of(how), [](double) {});
  for (const std::size_t rows : budgets) {
    how.budget = compresskv::Budget::tokens_per_layer(rows);
    engine::Sequence sequence = evaluation.compress(read, how, true).first;
    calibrate::EvictionErrorAccumulator errors{layers};
    errors.begin_run(prompt.data_set, prompt.run);
    sequence.hooks().shadow = [&](int layer, std::span<const float> full, std::span<const float> evicted) {
      errors.add(static_cast<std::size_t>(layer), full, evicted);
    };
    std::size_t steps = 0;
    if (prompt.needle) {
      decode_greedily(loaded, sequence, settings_->max_new_tokens, [&](TokenId) { ++steps; });
    }
    for (const TokenId token : continuation) {
      sequence.decode(token, sequence.next_position());
      ++steps;
    }
    std::vector<double> sums(layers, 0.0);
    if (steps > 0) {
      errors.end_run();
      sums = errors.data_sets().at(prompt.data_set).at(prompt.run).errors;
    }
    hand_on(merged(errors_key(rows, prompt.data_set, prompt.run), {{"steps", steps}, {"errors", sums}}));
  }
}

void PromptCalibration::ablate(std::size_t length, std::size_t run, std::span<const HeadMask> masks,
                               const Take& hand_on) const {
  const LoadedModel& loaded = small();
  const TaskPrompt prompt =
      task_prompt("needle", loaded, haystack_,
                  {.length = length, .index = run, .depth = settings_->depth(run % settings_->depths)});
  const Evaluation evaluation{loaded, engine::KvType::f32, settings_->max_new_tokens};
  for (const HeadMask& mask : masks) {
    engine::Sequence sequence{loaded.model, {.masked_heads = mask.masked}};
    sequence.prefill(prompt.tokens);
    engine::Sequence* const only = &sequence;
    const std::string answer = evaluation.answer(prompt, {&only, 1})[0];
    const bool right = is_right(prompt, answer);
    hand_on(merged(ablation_key(length, mask, run), {{"right", right}, {"answer", answer}}));
    if (mask.masked.empty() && !right) {
      return;
    }
  }
}

}  // namespace ckv
