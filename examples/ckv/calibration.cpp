#include "calibration.hpp"

#include <fmt/core.h>

#include <algorithm>
#include <compresskv/calibrate/eviction_error_accumulator.hpp>
#include <compresskv/calibrate/head_score_accumulator.hpp>
#include <compresskv/calibrate/kv_head_score_accumulator.hpp>
#include <compresskv/calibrate/query_statistics_accumulator.hpp>
#include <compresskv/calibrate/rouge1_recall.hpp>
#include <compresskv/calibrate/surrogate_accumulator.hpp>
#include <compresskv/core/rotary.hpp>
#include <compresskv/io/calibration_files.hpp>
#include <compresskv/io/query_statistics_file.hpp>
#include <compresskv/io/surrogate_file.hpp>
#include <map>
#include <utility>

#include "calibration_results.hpp"
#include "engine/error.hpp"
#include "evaluation.hpp"
#include "repeat.hpp"
#include "tasks.hpp"

namespace ckv {
namespace {

namespace calibrate = compresskv::calibrate;

constexpr std::size_t text_steps = 32;   // that a stretch of text goes on
constexpr std::size_t first_tokens = 4;  // which attend otherwise than all others

Json merged(Json key, Json more) {
  key.update(more);
  return key;
}

/// The model's rotary embedding as the library has it.
struct RotaryOfModel {
  explicit RotaryOfModel(const engine::Model& model) {
    const engine::ModelConfig& config = model.config();
    rotary.base = config.rope_base;
    rotary.dims = static_cast<std::size_t>(config.rope_dimensions);
    rotary.pairing = compresskv::RotaryPairing::interleaved;
    if (config.rope_scaling == "linear") {
      rotary.position_scale = 1.0 / config.rope_factor;
    }
    // What base and linear scaling do not say: Llama 3.1's divisors, YaRN's.
    const auto head_dim = static_cast<std::size_t>(config.head_dim);
    bool plain = true;
    for (std::size_t j = 0; j < rotary.pairs(head_dim); ++j) {
      const auto factor = static_cast<float>(rotary.step(j, head_dim) / model.rope_frequencies()[j]);
      factors.push_back(factor);
      plain = plain && factor == 1.0F;
    }
    if (!plain) {
      rotary.frequency_factors = factors;
    }
  }
  RotaryOfModel(const RotaryOfModel&) = delete;
  RotaryOfModel& operator=(const RotaryOfModel&) = delete;
  ~RotaryOfModel() = default;

  std::vector<float> factors;
  compresskv::Rotary rotary;
};

/// How far the keys of the first layer contradict the rotary embedding at most: those of equal tokens, the
/// first and the last of each in the text, are equal before rotation.
double rotary_contradiction(const engine::LayerView& layer, std::span<const TokenId> tokens,
                            const compresskv::Rotary& rotary) {
  const auto head_dim = static_cast<std::size_t>(layer.head_dim);
  const auto key = [&](std::size_t head, std::size_t position) {
    return std::span<const float>(layer.keys<float>() + (head * layer.allocated_rows + position) * head_dim,
                                  head_dim);
  };
  std::map<TokenId, std::size_t> first;
  std::map<TokenId, std::size_t> last;
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    first.try_emplace(tokens[i], i);
    last[tokens[i]] = i;
  }
  double largest = 0.0;
  for (const auto& [token, position] : first) {
    for (std::size_t head = 0; last[token] > position && head < static_cast<std::size_t>(layer.kv_heads);
         ++head) {
      largest = std::max(largest, calibrate::rotary_contradiction(rotary, key(head, position), position,
                                                                  key(head, last[token]), last[token]));
    }
  }
  return largest;
}

}  // namespace

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
    throw engine::Error(fmt::format(
        "layer errors, masks and query statistics need the small engine, the model is loaded in {}",
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

Json PromptCalibration::measure_statistics(std::size_t length, std::size_t texts,
                                           const std::filesystem::path& file) const {
  constexpr double most_contradiction = 1e-2;  // rounding gives less than 1e-4, another base about 1
  const LoadedModel& loaded = small();
  const compresskv::ModelShape shape = loaded.shape(engine::KvType::f32);
  const RotaryOfModel of_model{loaded.model};
  calibrate::QueryStatisticsAccumulator statistics{shape.layers, shape.query_heads, shape.head_dim,
                                                   of_model.rotary};
  double contradiction = 0.0;
  for (std::size_t text = 0; text < texts; ++text) {
    const std::vector<TokenId> tokens =
        task_prompt("perplexity", loaded, haystack_, {.length = length, .index = text}).tokens;
    engine::Sequence sequence{loaded.model};
    const auto on_layer = [&](engine::LayerView& layer) {
      if (layer.layer == 0) {
        contradiction = std::max(contradiction, rotary_contradiction(layer, tokens, of_model.rotary));
      }
      statistics.add_queries(static_cast<std::size_t>(layer.layer), queries_of(layer), 0,
                             std::min(first_tokens, tokens.size() - 1));
    };
    sequence.prefill(tokens, {.window = tokens.size(), .on_layer = on_layer, .on_logits = {}});
  }
  if (!(contradiction < most_contradiction)) {
    throw engine::Error(
        fmt::format("keys of equal tokens differ by {:.3g} of their length once turned back by the model's "
                    "rotary embedding: the query statistics would be wrong",
                    contradiction));
  }
  compresskv::io::save_query_statistics(file, statistics.statistics());
  return {{"queries", statistics.count(0, 0)}, {"rotary_contradiction", contradiction}};
}

Json PromptCalibration::measure_kv_heads(std::size_t length, std::size_t texts,
                                         const std::filesystem::path& file) const {
  const LoadedModel& loaded = small();
  const compresskv::ModelShape shape = loaded.shape(engine::KvType::f32);
  calibrate::KvHeadScoreAccumulator scores{shape};
  engine::PoolExecutor executor{&loaded.model.pool()};
  const engine::PromptText asked = chat_prompt(loaded, "?");
  const std::vector<TokenId> head = encode_prompt(loaded, asked.substr(0, asked.text().rfind('?')));
  for (std::size_t text = 0; text < texts; ++text) {
    // A text as a user would give it, and no question.
    const std::vector<TokenId> plain =
        task_prompt("perplexity", loaded, haystack_, {.length = length, .index = text}).tokens;
    std::vector<TokenId> tokens = head;
    tokens.insert(tokens.end(), plain.begin() + (loaded.bos() ? 1 : 0), plain.end());
    engine::Sequence sequence{loaded.model};
    sequence.prefill(tokens);
    scores.begin_text(tokens.size());
    repeat_context(loaded, sequence, tokens,
                   ShowRepeats([&](engine::LayerView& layer, const compresskv::Stretch& stretch) {
                     scores.observe(static_cast<std::size_t>(layer.layer), view_of<float>(layer), stretch,
                                    queries_of(layer), executor);
                   }));
  }
  compresskv::io::save_head_scores(file, scores.scores());
  return Json::object();
}

Json PromptCalibration::fit_surrogate(std::size_t length, std::size_t texts,
                                      const std::filesystem::path& file) const {
  const LoadedModel& loaded = small();
  const compresskv::ModelShape shape = loaded.shape(engine::KvType::f32);
  const auto hidden_size = static_cast<std::size_t>(loaded.model.config().embedding);
  const compresskv::Plan plan{
      shape, compresskv::score::KvZipPlus{loaded.output_weights().value(), {.sinks = first_tokens}},
      compresskv::select::WholeModel{}, compresskv::budget::Uniform{compresskv::Budget::kept_ratio(1.0)}};
  calibrate::SurrogateAccumulator fitted{shape.layers, shape.kv_heads, hidden_size};
  calibrate::SurrogateAccumulator held_out = fitted;
  const std::size_t more = std::max<std::size_t>(1, texts / 8);
  for (std::size_t text = 0; text < texts + more; ++text) {
    const std::vector<TokenId> tokens =
        task_prompt("perplexity", loaded, haystack_, {.length = length, .index = text}).tokens;
    engine::Sequence sequence{loaded.model};
    HeldStates states{loaded.model.config()};
    sequence.prefill(tokens, {.window = 1,
                              .hidden_states = true,
                              .on_layer = [&](const engine::LayerView& layer) { states.add(layer); },
                              .on_logits = {}});
    engine::PoolExecutor executor{&loaded.model.pool()};
    compresskv::Compressor compressor{plan, executor};
    compressor.begin(tokens.size());
    repeat_context(loaded, sequence, tokens,
                   ShowRepeats([&](engine::LayerView& layer, const compresskv::Stretch& stretch) {
                     compressor.observe(static_cast<std::size_t>(layer.layer), view_of<float>(layer), stretch,
                                        queries_of(layer), {layer.hidden_norms, layer.window});
                   }));
    const std::size_t skipped = std::min(first_tokens, tokens.size() - 1);
    const std::size_t count = tokens.size() - skipped;
    for (std::size_t layer = 0; layer < shape.layers; ++layer) {
      std::vector<float> scores;
      for (std::size_t head = 0; head < shape.kv_heads; ++head) {
        const std::vector<float> of_head = compressor.repeat_scores(layer, head);
        scores.insert(scores.end(), of_head.begin() + static_cast<std::ptrdiff_t>(skipped), of_head.end());
      }
      const float* const first = states.view(static_cast<int>(layer)).hidden_run().row(skipped);
      (text < texts ? fitted : held_out)
          .add(layer, compresskv::HiddenStates<float>(first, {.tokens = count, .hidden_size = hidden_size}),
               scores);
    }
  }
  const compresskv::Surrogate surrogate = fitted.surrogate();
  compresskv::io::save_surrogate(file, surrogate);
  return {{"texts", texts},
          {"tokens", fitted.count(0)},
          {"held_out", held_out.count(0)},
          {"explained", held_out.explained(surrogate)}};
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
