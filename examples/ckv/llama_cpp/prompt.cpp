// One prompt read in llama.cpp, and its cache compressed in many ways.

#include <algorithm>
#include <cstddef>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "../compress.hpp"
#include "../run.hpp"
#include "engine/error.hpp"
#include "engine/sampler.hpp"
#include "load.hpp"
#include "model.hpp"

namespace ckv {
namespace {

using compresskv::llama_cpp::Observer;
using compresskv::llama_cpp::Sequence;

class ReadLlamaPrompt final : public LlamaPrompt {
 public:
  ReadLlamaPrompt(const LlamaModel& model, std::span<const TokenId> prompt, const ReadOptions& options)
      : model_(&model),
        options_(options),
        tokens_(prompt.size()),
        shape_(model.shape(options.kv_type)),
        observer_(shape_, options.window),
        whole_(model.make_context({.type = options.kv_type,
                                   .cells = prompt.size() + options.max_new_tokens,
                                   .sequences = 2,
                                   .observer = &observer_})) {
    const auto start = Clock::now();
    model.read(whole_.get(), &observer_, prompt, [&](std::size_t tokens) {
      options_.progress(static_cast<double>(tokens) / static_cast<double>(tokens_));
    });
    prefill_ms_ = milliseconds_since(start);
    const std::span<const float> logits = model.logits(whole_.get());
    first_logits_.assign(logits.begin(), logits.end());
  }

  double prefill_ms() const override { return prefill_ms_; }

  Answer answer(const Compression& how, const std::function<bool(const std::string&)>& enough) override {
    if (how.method == Method::full) {
      Answer out{.text = greedy(whole_.get(), enough)};
      // As it was when the prompt was read.
      llama_memory_seq_rm(llama_get_memory(whole_.get()), 0, static_cast<llama_pos>(tokens_), -1);
      return out;
    }
    const std::size_t rows = std::min(how.budget.value().resolve(tokens_, how.window, shape_), tokens_);
    const LlamaContext small = model_->make_context(
        {.type = options_.kv_type, .cells = rows + options_.max_new_tokens, .batch = 32});
    const auto start = Clock::now();
    engine::PoolExecutor pool = model_->executor();
    const compresskv::AnyPlan plan(shape_, how.method, settings_of(how));
    Sequence sequence = Sequence(plan, observer_, {.context = whole_.get()}, pool).copy_to(1);
    sequence.compress_into({.context = small.get()});
    Answer out{.text = {}, .kept = kept_by(sequence), .compress_ms = milliseconds_since(start)};
    out.text = greedy(small.get(), enough);
    observer_.forget(sequence.place());
    return out;
  }

 private:
  std::string greedy(llama_context* context, const std::function<bool(const std::string&)>& enough) const {
    std::string answer;
    LlamaText text{*model_};
    std::span<const float> logits = first_logits_;
    for (std::size_t step = 0; step < options_.max_new_tokens; ++step) {
      const TokenId token = engine::greedy(logits);
      if (llama_vocab_is_eog(model_->vocabulary(), token)) {
        break;
      }
      answer += text.push(token);
      if (step + 1 == options_.max_new_tokens || tokens_ + step >= model_->context() || enough(answer)) {
        break;
      }
      logits = model_->decode(context, token);
    }
    return answer + text.finish();
  }

  const LlamaModel* model_;
  ReadOptions options_;
  std::size_t tokens_;
  compresskv::ModelShape shape_;
  Observer observer_;  // before the context that it observes
  LlamaContext whole_;
  std::vector<float> first_logits_;
  double prefill_ms_ = 0.0;
};

}  // namespace

std::unique_ptr<LlamaPrompt> read_in_llama_cpp(const ModelEngine& model, std::span<const TokenId> prompt,
                                               const ReadOptions& options) {
  const auto* loaded = dynamic_cast<const LlamaModel*>(&model);
  if (loaded == nullptr) {
    throw engine::Error("read_in_llama_cpp: the model is loaded in another engine");
  }
  return std::make_unique<ReadLlamaPrompt>(*loaded, prompt, options);
}

}  // namespace ckv
