// One prompt read in llama.cpp, and its cache compressed in many ways.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "../compress.hpp"
#include "../evaluation.hpp"
#include "../run.hpp"
#include "../tasks.hpp"
#include "../terminal.hpp"
#include "engine/sampler.hpp"
#include "model.hpp"

namespace ckv {
namespace {

using compresskv::llama_cpp::Observer;
using compresskv::llama_cpp::Sequence;

class HeldInLlamaCpp final : public HeldPrompt {
 public:
  HeldInLlamaCpp(const LlamaModel& model, const TaskPrompt& prompt, const HoldOptions& options)
      : model_(&model),
        prompt_(&prompt),
        options_(options),
        all_(model.shape(options.kv_type)),
        shape_(all_),
        observer_(all_, options.window),
        whole_(model.make_context({.type = options.kv_type,
                                   .cells = prompt.tokens.size() + tokens_to_come(),
                                   .sequences = 2,
                                   .observer = &observer_})) {
    const std::size_t tokens = prompt.tokens.size();
    model.check_length(tokens + longest_later());
    const auto start = Clock::now();
    model.read(whole_.get(), &observer_, prompt.tokens, [&](std::size_t done) {
      options_.progress(static_cast<double>(done) / static_cast<double>(tokens));
    });
    prefill_ms_ = milliseconds_since(start);
    shape_.layers = observer_.global_layers(model.get()).size();
    const std::span<const float> logits = model.logits(whole_.get());
    first_logits_.assign(logits.begin(), logits.end());
  }

  double prefill_ms() const override { return prefill_ms_; }

  std::vector<Outcome> outcomes(std::span<const Compression* const> ways,
                                const std::function<void(double, std::string_view)>& progress) override {
    std::vector<Outcome> outcomes;
    for (const Compression* how : ways) {
      progress(static_cast<double>(outcomes.size()) / static_cast<double>(ways.size()), "answering");
      outcomes.push_back(how->method == Method::full ? whole() : compressed(*how));
      check_interrupt();
    }
    return outcomes;
  }

 private:
  /// Tokens of the longest question that comes later.
  std::size_t longest_later() const {
    std::size_t most = 0;
    for (const Later& later : prompt_->later) {
      most = std::max(most, later.tokens.size());
    }
    return most;
  }

  /// At most, behind the prompt.
  std::size_t tokens_to_come() const {
    const std::size_t turns = prompt_->next_turn.empty() ? 1 : 2;
    return longest_later() + std::max(turns * options_.max_new_tokens + prompt_->next_turn.size(),
                                      prompt_->continuation.size());
  }

  Outcome whole() {
    Outcome out{.rows = prompt_->tokens.size() * shape_.layers * shape_.kv_heads};
    // As it was when the prompt was read.
    const auto take_back = [&] {
      llama_memory_seq_rm(llama_get_memory(whole_.get()), 0, static_cast<llama_pos>(prompt_->tokens.size()),
                          -1);
    };
    finish(whole_.get(), out, take_back);
    take_back();
    return out;
  }

  Outcome compressed(const Compression& how) {
    const std::size_t tokens = prompt_->tokens.size();
    const std::size_t rows = std::min(how.budget.value().resolve(tokens, window_of(how), shape_), tokens);
    const std::size_t cells =
        shape_.layers < all_.layers ? std::max(rows, model_->sliding_rows(tokens)) : rows;
    // With a second sequence there is room for a sliding window and what one copy reads and answers behind
    // it: what is then taken back has taken no cell of the window.
    const LlamaContext small = model_->make_context({.type = options_.kv_type,
                                                     .cells = cells + tokens_to_come(),
                                                     .sequences = prompt_->copies() > 1 ? 2U : 1U,
                                                     .batch = 32});
    const auto start = Clock::now();
    engine::PoolExecutor pool = model_->executor();
    const compresskv::AnyPlan plan(all_, how.method, settings_of(how));
    Sequence sequence = Sequence(plan, observer_, {.context = whole_.get()}, pool).copy_to(1);
    sequence.compress_into({.context = small.get()});
    Outcome out{.compress_ms = milliseconds_since(start)};
    count_kept(kept_by(sequence), tokens, shape_, out);
    finish(small.get(), out, [&] { sequence.truncate(tokens); });
    observer_.forget(sequence.place());
    return out;
  }

  /// Answers from sequence 0 of a context, or measures; between two copies `take_back` leaves what the first
  /// began with.
  void finish(llama_context* context, Outcome& out, const std::function<void()>& take_back) const {
    for (std::size_t copy = 0; copy < prompt_->copies(); ++copy) {
      if (copy > 0) {
        take_back();
      }
      std::span<const float> logits = first_logits_;
      if (!prompt_->later.empty()) {
        logits = read_more(context, prompt_->later[copy].tokens);
      }
      if (prompt_->measure == Measure::perplexity) {
        out.perplexity = perplexity(context, logits);
      } else {
        out.answers.push_back(answer(context, logits, copy));
      }
    }
  }

  std::span<const float> read_more(llama_context* context, std::span<const TokenId> tokens) const {
    model_->read(context, nullptr, tokens, [](std::size_t) {});
    return model_->logits(context);
  }

  std::string answer(llama_context* context, std::span<const float> logits, std::size_t copy) const {
    if (!prompt_->next_turn.empty()) {
      greedy(context, logits, [](const std::string&) { return false; });
      logits = read_more(context, prompt_->next_turn);
    }
    return greedy(context, logits, [&](const std::string& text) { return is_settled(*prompt_, text, copy); });
  }

  double perplexity(llama_context* context, std::span<const float> logits) const {
    const std::vector<TokenId>& text = prompt_->continuation;
    double sum = 0.0;
    for (std::size_t i = 0; i < text.size(); ++i) {
      sum += surprise(logits, text[i]);
      if (i + 1 < text.size()) {
        logits = model_->decode(context, text[i]);
      }
    }
    return std::exp(sum / static_cast<double>(text.size()));
  }

  /// Decodes until the text is `enough`, or the answer ends.
  std::string greedy(llama_context* context, std::span<const float> logits,
                     const std::function<bool(const std::string&)>& enough) const {
    std::string answer;
    LlamaText text{*model_};
    auto position = static_cast<std::size_t>(llama_memory_seq_pos_max(llama_get_memory(context), 0) + 1);
    for (std::size_t step = 0; step < options_.max_new_tokens; ++step) {
      const TokenId token = engine::greedy(logits);
      if (llama_vocab_is_eog(model_->vocabulary(), token)) {
        break;
      }
      answer += text.push(token);
      if (step + 1 == options_.max_new_tokens || position++ >= model_->context() || enough(answer)) {
        break;
      }
      logits = model_->decode(context, token);
    }
    return answer + text.finish();
  }

  const LlamaModel* model_;
  const TaskPrompt* prompt_;
  HoldOptions options_;
  compresskv::ModelShape all_;
  compresskv::ModelShape shape_;  // of the layers that are compressed
  Observer observer_;             // before the context that it observes
  LlamaContext whole_;
  std::vector<float> first_logits_;
  double prefill_ms_ = 0.0;
};

}  // namespace

std::unique_ptr<HeldPrompt> LlamaModel::hold(const TaskPrompt& prompt, const HoldOptions& options) const {
  return std::make_unique<HeldInLlamaCpp>(*this, prompt, options);
}

}  // namespace ckv
