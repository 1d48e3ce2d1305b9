#include "evaluation.hpp"

#include <fmt/core.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>

#include "compress.hpp"
#include "engine/error.hpp"
#include "engine/sampler.hpp"
#include "repeat.hpp"
#include "terminal.hpp"

namespace ckv {
namespace {

class HeldInSmallEngine final : public HeldPrompt {
 public:
  HeldInSmallEngine(const LoadedModel& loaded, const TaskPrompt& prompt, const HoldOptions& options)
      : prompt_(&prompt),
        batch_bytes_(options.batch_bytes),
        alone_(options.alone),
        evaluation_(loaded, options.kv_type, options.max_new_tokens),
        read_(evaluation_.read(prompt.tokens, options.window, options.progress, options.hidden_states)) {}

  double prefill_ms() const override { return read_.prefill_ms; }

  std::vector<Outcome> outcomes(std::span<const Compression* const> ways,
                                const std::function<void(double, std::string_view)>& progress) override {
    // Beside the whole cache there is no room for all copies at once.
    const bool beside = prompt_->measure == Measure::attention_error;
    std::vector<engine::Sequence> sequences;  // that have not answered yet
    std::vector<Outcome> outcomes;
    std::vector<std::unique_ptr<PromptCompressor>> compressors(ways.size());
    std::size_t answered = 0;  // outcomes
    const auto show = [&](std::string_view what) {
      const double compressed = static_cast<double>(outcomes.size() - answered) / 3.0;
      progress((static_cast<double>(answered) + compressed) / static_cast<double>(ways.size()), what);
    };
    const auto answer = [&] {
      show("answering");
      const double before = static_cast<double>(answered) / static_cast<double>(ways.size());
      const double after = static_cast<double>(outcomes.size()) / static_cast<double>(ways.size());
      finish(sequences, std::span(outcomes).subspan(answered), std::span(compressors).subspan(answered),
             [&](double share) { progress(before + share * (after - before), "answering"); });
      sequences.clear();
      answered = outcomes.size();
    };
    auto repeated = evaluation_.repeat(read_, prompt_->tokens, ways);
    for (std::size_t i = 0; i < ways.size(); ++i) {
      show("compressing");
      if (ways[i]->method == Method::full) {
        Outcome outcome{.rows = evaluation_.rows_of(read_.sequence)};
        if (beside) {
          outcome.errors.assign(evaluation_.shape().layers, 0.0);
        } else {
          add(read_.sequence.clone(), sequences, answer);
        }
        outcomes.push_back(std::move(outcome));
      } else {
        auto [sequence, outcome] =
            evaluation_.compress(read_, *ways[i], beside, std::move(repeated[i]),
                                 decodes_on_budget(prompt_->measure) ? &compressors[i] : nullptr);
        if (beside) {
          outcome.errors = evaluation_.attention_errors(*prompt_, sequence);
        } else {
          add(std::move(sequence), sequences, answer);
        }
        outcomes.push_back(std::move(outcome));
      }
      check_interrupt();
    }
    if (!sequences.empty()) {
      answer();
    }
    return outcomes;
  }

 private:
  /// A copy for each question; where there is no room for them, those before them `answer` first.
  template <class Answer>
  void add(engine::Sequence sequence, std::vector<engine::Sequence>& sequences, const Answer& answer) const {
    std::size_t bytes = prompt_->copies() * sequence.cache_bytes();
    for (const engine::Sequence& other : sequences) {
      bytes += other.cache_bytes();
    }
    if (bytes > batch_bytes_ && !sequences.empty()) {
      answer();
    }
    for (std::size_t i = 1; i < prompt_->copies(); ++i) {
      sequences.push_back(sequence.clone());
    }
    sequences.push_back(std::move(sequence));
  }

  /// Answers, or what is measured instead.
  void finish(std::span<engine::Sequence> sequences, std::span<Outcome> outcomes,
              std::span<const std::unique_ptr<PromptCompressor>> compressors,
              const std::function<void(double)>& decoded) const {
    std::vector<engine::Sequence*> batch;
    for (engine::Sequence& sequence : sequences) {
      batch.push_back(&sequence);
    }
    if (decodes_on_budget(prompt_->measure)) {
      std::vector<LongAnswer> answers =
          evaluation_.decode_on_budgets(*prompt_, batch, compressors, alone_, decoded);
      for (std::size_t i = 0; i < outcomes.size(); ++i) {
        if (prompt_->measure == Measure::long_loss) {
          outcomes[i].perplexity = std::exp(answers[i].loss);
        }
        outcomes[i].long_answer = std::move(answers[i]);
      }
      return;
    }
    if (prompt_->measure != Measure::none) {
      const std::vector<double> values = evaluation_.perplexities(*prompt_, batch);
      for (std::size_t i = 0; i < outcomes.size(); ++i) {
        outcomes[i].perplexity = values[i * prompt_->copies()];
      }
      return;
    }
    std::vector<std::string> answers = evaluation_.answer(*prompt_, batch);
    for (std::size_t i = 0; i < batch.size(); ++i) {
      outcomes[i / prompt_->copies()].answers.push_back(std::move(answers[i]));
    }
  }

  const TaskPrompt* prompt_;
  std::size_t batch_bytes_;
  bool alone_;
  Evaluation evaluation_;
  ReadPrompt read_;
};

}  // namespace

std::unique_ptr<HeldPrompt> LoadedModel::hold(const TaskPrompt& prompt, const HoldOptions& options) const {
  return std::make_unique<HeldInSmallEngine>(*this, prompt, options);
}

void count_kept(const std::vector<std::vector<std::vector<std::uint32_t>>>& kept, std::size_t tokens,
                const compresskv::ModelShape& shape, Outcome& outcome) {
  outcome.rows = 0;
  outcome.kept.assign(shape.layers, std::vector<std::size_t>(stretches));
  for (std::size_t layer = 0; layer < shape.layers; ++layer) {
    for (std::size_t head = 0; head < shape.kv_heads; ++head) {
      for (const std::uint32_t position : kept[layer][kept[layer].size() == 1 ? 0 : head]) {
        ++outcome.kept[layer][position * stretches / tokens];
        ++outcome.rows;
      }
    }
  }
}

double surprise(std::span<const float> logits, TokenId token) {
  const double highest = *std::max_element(logits.begin(), logits.end());
  double sum = 0.0;
  for (const float logit : logits) {
    sum += std::exp(static_cast<double>(logit) - highest);
  }
  return highest + std::log(sum) - static_cast<double>(logits[static_cast<std::size_t>(token)]);
}

bool is_right(const TaskPrompt& prompt, std::string_view answer, std::size_t copy) {
  if (!prompt.later.empty()) {
    return holds(answer, prompt.later[copy].expect);
  }
  return std::all_of(prompt.expect.begin(), prompt.expect.end(),
                     [&](const std::string& expect) { return holds(answer, expect); }) &&
         obeys(prompt.rule, answer);
}

bool is_right(const Recall& recall, std::string_view said) {
  return said.substr(std::min(said.find_first_not_of(' '), said.size())) == recall.expect;
}

bool is_settled(const TaskPrompt& prompt, std::string_view answer, std::size_t copy) {
  return has_broken(prompt.rule, answer) || (prompt.rule.never.empty() && is_right(prompt, answer, copy));
}

Evaluation::Evaluation(const LoadedModel& loaded, engine::KvType type, std::size_t max_new_tokens)
    : loaded_(&loaded),
      type_(type),
      shape_(shape_of(loaded.model.config(), type)),
      max_new_tokens_(max_new_tokens) {}

ReadPrompt Evaluation::read(std::span<const TokenId> prompt, std::size_t window,
                            const std::function<void(double)>& progress, bool hidden_states) const {
  const auto start = Clock::now();
  ReadPrompt out{.sequence = engine::Sequence{loaded_->model, {.kv_type = type_}},
                 .window = window == 0 ? prompt.size() : std::min(window, prompt.size())};
  if (hidden_states) {
    out.states.emplace(loaded_->model.config());
  }
  const auto on_layer = [&](engine::LayerView& layer) {
    if (out.states) {
      out.states->add(layer);
    }
    const auto count =
        static_cast<std::size_t>(layer.heads) * layer.window * static_cast<std::size_t>(layer.head_dim);
    out.queries.emplace_back(layer.queries, layer.queries + count);
    progress(static_cast<double>(layer.layer + 1) / static_cast<double>(shape_.layers));
    check_interrupt();
  };
  out.sequence.prefill(
      prompt, {.window = out.window, .hidden_states = hidden_states, .on_layer = on_layer, .on_logits = {}});
  out.prefill_ms = milliseconds_since(start);
  return out;
}

compresskv::QueryWindow<float> Evaluation::queries_of(const ReadPrompt& prompt, std::size_t layer) const {
  return {prompt.queries[layer].data(),
          compresskv::QueryShape{
              .query_heads = shape_.query_heads, .queries = prompt.window, .head_dim = shape_.head_dim}};
}

std::vector<std::unique_ptr<PromptCompressor>> Evaluation::repeat(
    ReadPrompt& prompt, std::span<const TokenId> context, std::span<const Compression* const> ways) const {
  std::vector<std::unique_ptr<PromptCompressor>> compressors(ways.size());
  std::vector<PromptCompressor*> shown;
  for (std::size_t i = 0; i < ways.size(); ++i) {
    if (info(ways[i]->method).repeats) {
      compressors[i] = make_compressor(*ways[i], shape_, loaded_->model.pool());
      compressors[i]->begin(context.size());
      shown.push_back(compressors[i].get());
    }
  }
  if (!shown.empty()) {
    const auto start = Clock::now();
    repeat_context(*loaded_, prompt.sequence, context, shown);
    prompt.repeat_ms = milliseconds_since(start);
  }
  return compressors;
}

std::pair<engine::Sequence, Outcome> Evaluation::compress(ReadPrompt& prompt, const Compression& how,
                                                          bool beside,
                                                          std::unique_ptr<PromptCompressor> repeated,
                                                          std::unique_ptr<PromptCompressor>* goes_on) const {
  Outcome outcome;
  const std::size_t tokens = prompt.sequence.next_position();
  const bool by_sums = wants_all_queries(how.method);
  if (by_sums && prompt.sums.empty()) {
    const auto start = Clock::now();
    for (std::size_t layer = 0; layer < shape_.layers; ++layer) {
      prompt.sums.push_back(sum_attention(prompt.sequence.cache(static_cast<int>(layer)),
                                          queries_of(prompt, layer), 1, shape_, loaded_->model.pool()));
      check_interrupt();
    }
    prompt.sums_ms = milliseconds_since(start);
  }
  auto start = Clock::now();
  const bool by_repeats = repeated != nullptr;
  auto compressor = by_repeats ? std::move(repeated) : make_compressor(how, shape_, loaded_->model.pool());
  if (!by_repeats) {
    compressor->begin(tokens);
  }
  outcome.compress_ms = milliseconds_since(start);
  engine::Sequence sequence = prompt.sequence.clone([&](engine::LayerView& layer) {
    start = Clock::now();
    if (by_repeats) {
      compressor->finish(beside ? layer.shadow() : layer);
      outcome.compress_ms += milliseconds_since(start);
      return;
    }
    const auto index = static_cast<std::size_t>(layer.layer);
    std::optional<compresskv::AttentionSums> sums;
    if (by_sums) {
      sums.emplace(
          prompt.sums[index].data(),
          compresskv::AttentionShape{.query_heads = shape_.query_heads, .queries = tokens, .tokens = tokens});
    }
    std::optional<compresskv::HiddenStates<float>> states;
    if (wants_hidden_states(how.method)) {
      states.emplace(prompt.states.value().view(layer.layer));
    }
    compressor->compress(beside ? layer.shadow() : layer, {.queries = queries_of(prompt, index),
                                                           .sums = sums ? &*sums : nullptr,
                                                           .hidden_states = states ? &*states : nullptr});
    outcome.compress_ms += milliseconds_since(start);
  });
  outcome.compress_ms += sequence.shrink_time().count() + (by_sums ? prompt.sums_ms : 0.0) +
                         (by_repeats ? prompt.repeat_ms : 0.0);
  outcome.kept.assign(shape_.layers, std::vector<std::size_t>(stretches));
  for (std::size_t layer = 0; layer < shape_.layers; ++layer) {
    for (std::size_t head = 0; head < shape_.kv_heads; ++head) {
      for (const std::uint32_t position : compressor->retained(layer).positions(head)) {
        ++outcome.kept[layer][position * stretches / tokens];
        ++outcome.rows;
      }
    }
  }
  if (!beside && outcome.rows != rows_of(sequence)) {
    throw engine::Error(fmt::format("{} says that it keeps {} rows, the cache holds {}",
                                    info(how.method).name, outcome.rows, rows_of(sequence)));
  }
  if (goes_on != nullptr) {
    *goes_on = std::move(compressor);
  }
  return {std::move(sequence), outcome};
}

std::size_t Evaluation::rows_of(const engine::Sequence& sequence) const {
  std::size_t rows = 0;
  for (std::size_t layer = 0; layer < shape_.layers; ++layer) {
    for (std::size_t head = 0; head < shape_.kv_heads; ++head) {
      rows += sequence.rows(static_cast<int>(layer), static_cast<int>(head));
    }
  }
  return rows;
}

/// Each copy reads its own question, where questions come later.
void Evaluation::read_later(const TaskPrompt& prompt, std::span<engine::Sequence* const> sequences) const {
  for (std::size_t i = 0; !prompt.later.empty() && i < sequences.size(); ++i) {
    sequences[i]->prefill(prompt.later[i % prompt.later.size()].tokens);
    check_interrupt();
  }
}

/// Greedy answers of all sequences, which advance as one batch: the weights are read once a step. A
/// sequence that has ended its answer leaves the batch; so does one whose answer is `enough`, since what it
/// would say after that changes nothing.
std::vector<std::string> Evaluation::greedy(
    std::span<engine::Sequence* const> sequences,
    const std::function<bool(std::size_t, const std::string&)>& enough) const {
  std::vector<std::string> answers(sequences.size());
  std::vector<engine::StreamDecoder> texts(sequences.size(), engine::StreamDecoder{loaded_->tokenizer});
  std::vector<std::size_t> open(sequences.size());
  std::iota(open.begin(), open.end(), std::size_t{0});
  std::vector<engine::DecodeStep> steps;
  for (std::size_t step = 0; step < max_new_tokens_ && !open.empty(); ++step) {
    check_interrupt();
    steps.clear();
    std::vector<std::size_t> still;
    for (const std::size_t i : open) {
      const TokenId token = engine::greedy(sequences[i]->logits());
      if (loaded_->tokenizer.is_end_of_generation(token)) {
        continue;
      }
      answers[i] += texts[i].push(token);
      if (sequences[i]->next_position() < loaded_->model.config().context && !enough(i, answers[i])) {
        steps.push_back(
            {.sequence = sequences[i], .token = token, .position = sequences[i]->next_position()});
        still.push_back(i);
      }
    }
    open = std::move(still);
    if (!steps.empty() && step + 1 < max_new_tokens_) {
      engine::decode_batch(steps);
    }
  }
  for (std::size_t i = 0; i < answers.size(); ++i) {
    answers[i] += texts[i].finish();
  }
  return answers;
}

std::vector<std::string> Evaluation::answer(const TaskPrompt& prompt,
                                            std::span<engine::Sequence* const> sequences) const {
  if (!prompt.next_turn.empty()) {
    greedy(sequences, [](std::size_t, const std::string&) { return false; });
    for (engine::Sequence* sequence : sequences) {
      sequence->prefill(prompt.next_turn);
      check_interrupt();
    }
  }
  read_later(prompt, sequences);
  return greedy(sequences, [&](std::size_t i, const std::string& text) {
    return is_settled(prompt, text, i % prompt.copies());
  });
}

std::vector<double> Evaluation::perplexities(const TaskPrompt& prompt,
                                             std::span<engine::Sequence* const> sequences) const {
  std::vector<double> sums(sequences.size(), 0.0);
  read_later(prompt, sequences);
  feed(prompt, sequences, [&](TokenId token) {
    for (std::size_t i = 0; i < sequences.size(); ++i) {
      sums[i] += surprise(sequences[i]->logits(), token);
    }
  });
  for (double& sum : sums) {
    sum = std::exp(sum / static_cast<double>(prompt.continuation.size()));
  }
  return sums;
}

std::vector<LongAnswer> Evaluation::decode_on_budgets(
    const TaskPrompt& prompt, std::span<engine::Sequence* const> sequences,
    std::span<const std::unique_ptr<PromptCompressor>> compressors, bool alone,
    const std::function<void(double)>& progress) const {
  std::vector<RecentQueries> recent;  // [sequence], of a whole step
  recent.reserve(sequences.size());
  for (std::size_t i = 0; i < sequences.size(); ++i) {
    recent.emplace_back(loaded_->model.config(), decode_step);
    if (compressors[i] != nullptr) {
      sequences[i]->hooks().queries = [&own = recent[i]](int layer, std::span<const float> queries) {
        own.add(layer, queries);
      };
    }
  }
  const std::vector<TokenId>& text = prompt.continuation;
  std::vector<LongAnswer> answers(sequences.size());
  auto recall = prompt.recalls.begin();
  std::vector<std::vector<TokenId>> said(sequences.size());  // of the recall
  std::vector<double> decode_ms(sequences.size(), 0.0);
  constexpr std::size_t timed_step = 4;  // alone a step takes as long as a batch's
  std::size_t timed = 0;
  std::vector<engine::DecodeStep> steps(sequences.size());
  for (std::size_t t = 0; t < text.size(); ++t) {
    check_interrupt();
    progress(static_cast<double>(t) / static_cast<double>(text.size()));
    const bool recalls = recall != prompt.recalls.end() && t >= recall->first;
    for (std::size_t i = 0; i < sequences.size(); ++i) {
      const std::span<const float> logits = sequences[i]->logits();
      answers[i].loss += surprise(logits, text[t]);
      // Up to a wrong token what is fed is what a greedy answer would feed.
      if (recalls && std::ranges::equal(said[i], std::span(text).subspan(recall->first, t - recall->first))) {
        said[i].push_back(engine::greedy(logits));
      }
      if (recalls && t + 1 == recall->last) {
        answers[i].said.push_back(loaded_->tokenizer.decode(said[i], {.skip_special = true}));
        said[i].clear();
      }
      if (t > 0 && t % decode_step == 0 && compressors[i] != nullptr) {
        const auto start = Clock::now();
        compressors[i]->begin_turn(sequences[i]->next_position());
        sequences[i]->revisit([&](engine::LayerView& layer) {
          compressors[i]->compress(layer, {.queries = recent[i].view(layer.layer)});
        });
        answers[i].cut_ms += milliseconds_since(start);
      }
      steps[i] = {.sequence = sequences[i], .token = text[t], .position = sequences[i]->next_position()};
    }
    recall += recalls && t + 1 == recall->last ? 1 : 0;
    if (t + 1 == text.size()) {
      break;
    }
    if (!alone || t % timed_step != 0) {
      engine::decode_batch(steps);
      continue;
    }
    ++timed;
    for (std::size_t i = 0; i < steps.size(); ++i) {
      const auto start = Clock::now();
      engine::decode_batch({&steps[i], 1});
      decode_ms[i] += milliseconds_since(start);
    }
  }
  for (std::size_t i = 0; i < sequences.size(); ++i) {
    sequences[i]->hooks().queries = {};
    answers[i].loss /= static_cast<double>(text.size());
    answers[i].rows = rows_of(*sequences[i]);
    answers[i].steps = text.size() - 1;
    if (alone) {
      answers[i].decode_ms =
          decode_ms[i] * static_cast<double>(answers[i].steps) / static_cast<double>(timed);
    }
  }
  return answers;
}

std::vector<double> Evaluation::attention_errors(const TaskPrompt& prompt, engine::Sequence& sequence) const {
  std::vector<double> errors(shape_.layers, 0.0);
  sequence.hooks().shadow = [&](int layer, std::span<const float> full, std::span<const float> kept) {
    double difference = 0.0;
    double norm = 0.0;
    for (std::size_t i = 0; i < full.size(); ++i) {
      const double d = static_cast<double>(full[i]) - static_cast<double>(kept[i]);
      difference += d * d;
      norm += static_cast<double>(full[i]) * static_cast<double>(full[i]);
    }
    errors[static_cast<std::size_t>(layer)] += norm > 0.0 ? std::sqrt(difference / norm) : 0.0;
  };
  engine::Sequence* const only = &sequence;
  feed(prompt, {&only, 1}, [](TokenId) {});
  for (double& error : errors) {
    error /= static_cast<double>(prompt.continuation.size() - 1);
  }
  return errors;
}

/// Feeds all sequences what the text goes on with; `before` hears of each token first. The last is not fed.
void Evaluation::feed(const TaskPrompt& prompt, std::span<engine::Sequence* const> sequences,
                      const std::function<void(TokenId)>& before) const {
  std::vector<engine::DecodeStep> steps(sequences.size());
  for (std::size_t t = 0; t < prompt.continuation.size(); ++t) {
    check_interrupt();
    before(prompt.continuation[t]);
    for (std::size_t i = 0; i < steps.size(); ++i) {
      steps[i] = {.sequence = sequences[i],
                  .token = prompt.continuation[t],
                  .position = sequences[i]->next_position()};
    }
    if (t + 1 < prompt.continuation.size() && !steps.empty()) {
      engine::decode_batch(steps);
    }
  }
}

}  // namespace ckv
