// What ckv evaluate does to one prompt, in either engine: one prefill, a compressed copy of the cache for
// each method and budget, and what each copy then answers, or loses.
#pragma once

#include <compresskv/core/shape.hpp>
#include <compresskv/view/query_window.hpp>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "compress.hpp"
#include "engine/sequence.hpp"
#include "method.hpp"
#include "run.hpp"
#include "tasks.hpp"

namespace ckv {

/// Whether an answer holds all that is expected, and follows the rule; `copy`: which of the questions that
/// come later it answers.
bool is_right(const TaskPrompt& prompt, std::string_view answer, std::size_t copy = 0);

/// Whether a recall of a long text is said as it stands there.
bool is_right(const Recall& recall, std::string_view said);

/// Whether nothing that an answer goes on with changes whether it is right.
bool is_settled(const TaskPrompt& prompt, std::string_view answer, std::size_t copy = 0);

/// What a long text that was decoded on a budget shows.
struct LongAnswer {
  double loss = 0.0;                   ///< nats a token
  std::vector<std::string> said = {};  ///< [recall], the likeliest tokens up to the first that is wrong
  std::size_t rows = 0;                ///< at its end, over all layers and KV heads
  std::size_t steps = 0;               ///< tokens that were fed
  double cut_ms = 0.0;                 ///< all cuts together
  std::optional<double> decode_ms = std::nullopt;  ///< the steps without the cuts, by those decoded alone
};

/// What became of a prompt under one method at one budget.
struct Outcome {
  std::vector<std::string> answers = {};  ///< one a copy, where it asks
  std::optional<double> perplexity = std::nullopt;
  std::optional<LongAnswer> long_answer = std::nullopt;
  std::vector<double> errors = {};                  ///< [layer], where they are measured
  std::vector<std::vector<std::size_t>> kept = {};  ///< [layer][stretch of the prompt], rows of all KV heads
  std::size_t rows = 0;                             ///< over all layers and KV heads
  double compress_ms = 0.0;
};

inline constexpr std::size_t stretches = 64;  ///< of a prompt, in which kept rows are counted

/// Fills what the outcome says of rows. `kept`: as RunResult::kept; rows of each KV head count, also where
/// all share one list.
void count_kept(const std::vector<std::vector<std::vector<std::uint32_t>>>& kept, std::size_t tokens,
                const compresskv::ModelShape& shape, Outcome& outcome);

/// By how much a token surprises: minus the natural logarithm of the probability that these logits give it.
double surprise(std::span<const float> logits, TokenId token);

/// How a prompt is read that is then compressed in many ways.
struct HoldOptions {
  engine::KvType kv_type = engine::KvType::f32;
  std::size_t window = 8;      ///< queries of each layer that methods may look at; 0: all
  bool hidden_states = false;  ///< whether methods may look at what goes into each layer's attention
  std::size_t max_new_tokens = 32;
  /// Compressed copies that answer as one batch, in bytes of their caches: what is more answers afterwards.
  std::size_t batch_bytes = std::size_t{4} << 30U;
  /// Where a long text is decoded on a budget: each cache decodes every fourth token alone, in turn, and is
  /// timed. Nothing else depends on it.
  bool alone = false;
  std::function<void(double share)> progress = [](double) {};
};

/// A task's prompt that was read once.
class HeldPrompt {
 public:
  HeldPrompt() = default;
  HeldPrompt(const HeldPrompt&) = delete;
  HeldPrompt& operator=(const HeldPrompt&) = delete;
  virtual ~HeldPrompt() = default;

  virtual double prefill_ms() const = 0;

  /// What comes of a copy of its cache that is compressed in each of these ways, `full` for one that is not:
  /// answers up to where they are settled, or what the task measures. Where questions come later, each is
  /// read behind a copy of the copy. `progress` hears what is under way.
  virtual std::vector<Outcome> outcomes(
      std::span<const Compression* const> ways,
      const std::function<void(double share, std::string_view what)>& progress) = 0;
};

// ---- in the small engine ----

/// A prompt that was read, with the queries that methods want to see.
struct ReadPrompt {
  engine::Sequence sequence;
  std::size_t window = 0;                           ///< queries kept
  std::vector<std::vector<float>> queries = {};     ///< [layer][head][window][head_dim]
  std::vector<std::vector<float>> sums = {};        ///< [layer][head][token], once asked for
  std::optional<HeldStates> states = std::nullopt;  ///< where they were asked for
  double prefill_ms = 0.0;
  double sums_ms = 0.0;
  double repeat_ms = 0.0;
};

class Evaluation {
 public:
  Evaluation(const LoadedModel& loaded, engine::KvType type, std::size_t max_new_tokens);

  const compresskv::ModelShape& shape() const { return shape_; }

  /// `window` queries a layer are kept; 0 stands for all.
  ReadPrompt read(std::span<const TokenId> prompt, std::size_t window,
                  const std::function<void(double)>& progress, bool hidden_states = false) const;

  /// For each way the compressor of a method that has the context repeated, by one second pass for all of
  /// them; none for the others. The pass's time is counted as each one's.
  std::vector<std::unique_ptr<PromptCompressor>> repeat(ReadPrompt& prompt, std::span<const TokenId> context,
                                                        std::span<const Compression* const> ways) const;

  /// A copy of the prompt's cache that holds what the method keeps, by `repeated` where that has seen the
  /// context's repeats; `beside`: the whole cache, with what the
  /// method keeps as its shadow. `goes_on` is given the compressor, to compress the copy again.
  std::pair<engine::Sequence, Outcome> compress(ReadPrompt& prompt, const Compression& how,
                                                bool beside = false,
                                                std::unique_ptr<PromptCompressor> repeated = nullptr,
                                                std::unique_ptr<PromptCompressor>* goes_on = nullptr) const;

  std::size_t rows_of(const engine::Sequence& sequence) const;

  // Where questions come later, `sequences` hold a cache `prompt.copies()` times, and then the next.

  /// Answers to the prompt, up to where they are settled; of a prompt of several turns, to its last question.
  std::vector<std::string> answer(const TaskPrompt& prompt,
                                  std::span<engine::Sequence* const> sequences) const;

  /// Perplexity of each sequence over what the text goes on with.
  std::vector<double> perplexities(const TaskPrompt& prompt,
                                   std::span<engine::Sequence* const> sequences) const;

  /// Decodes what the text goes on with, where each sequence's compressor, if it has one, cuts the cache to
  /// its budget again after every `decode_step` tokens. `progress` hears the share that is done.
  std::vector<LongAnswer> decode_on_budgets(const TaskPrompt& prompt,
                                            std::span<engine::Sequence* const> sequences,
                                            std::span<const std::unique_ptr<PromptCompressor>> compressors,
                                            bool alone, const std::function<void(double)>& progress) const;

  /// || full - kept || / || full || of each layer's attention output, mean over what the text goes on with.
  std::vector<double> attention_errors(const TaskPrompt& prompt, engine::Sequence& sequence) const;

 private:
  compresskv::QueryWindow<float> queries_of(const ReadPrompt& prompt, std::size_t layer) const;
  void read_later(const TaskPrompt& prompt, std::span<engine::Sequence* const> sequences) const;
  std::vector<std::string> greedy(
      std::span<engine::Sequence* const> sequences,
      const std::function<bool(std::size_t sequence, const std::string& text)>& enough) const;
  void feed(const TaskPrompt& prompt, std::span<engine::Sequence* const> sequences,
            const std::function<void(TokenId)>& before) const;

  const LoadedModel* loaded_;
  engine::KvType type_;
  compresskv::ModelShape shape_;
  std::size_t max_new_tokens_;
};

}  // namespace ckv
