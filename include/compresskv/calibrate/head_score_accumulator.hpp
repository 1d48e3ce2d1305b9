#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <unordered_map>
#include <utility>
#include <vector>

#include "compresskv/calibrate/answer_span.hpp"
#include "compresskv/core/error.hpp"
#include "compresskv/core/head_scores.hpp"

namespace compresskv::calibrate {

/// How often a decode step counts whose token is one of the answer's.
enum class TokenCounting {
  once_per_occurrence,  ///< once for each place of the span that holds the token: the released code
  once_per_step,        ///< once: the paper's indicator
};

/// Finds the semantic retrieval heads of a model: scores each query head by its attention to the whole answer
/// span while the model writes the answer (Eq. 5 of arXiv 2606.24467),
///
///     score(h) = sum over steps t whose token is in A of  sum over j in A of  attention(h, t, j)
///
/// for a needle prompt whose answer span is A; the mean over the runs that counted ranks the heads. Unlike
/// the score of Wu et al. (ICLR 2025) it does not ask that the largest weight fall on the very token that is
/// written.
///
/// An engine feeds it, with a full cache and greedy decoding, in this order:
///
///     begin_run(prompt, span)
///       add_attention(layer, head, row)   every head of every layer: the last prompt token's attention
///       add_token(t1)                     what its logits gave
///       add_attention(layer, head, row)   the attention of t1, and so on, to the end token or 50 tokens
///       add_token(t2) ...
///     end_run(answered(response, needle))
///
/// The default counting is that of the released code, which made the published rankings. Not safe to share
/// between threads without a lock. Cost: the span's length a row; memory: one double a head and counted run.
class HeadScoreAccumulator {
 public:
  struct Options {
    TokenCounting counting = TokenCounting::once_per_occurrence;
  };

  /// Throws ArgumentError when there is no layer or no head.
  HeadScoreAccumulator(std::size_t layers, std::size_t query_heads, Options options)
      : layers_(layers), heads_(query_heads), options_(options) {
    compresskv::detail::require(layers > 0 && query_heads > 0,
                                "head score accumulator needs at least one layer and one head, got ", layers,
                                " layers of ", query_heads, " heads");
    runs_.resize(layers * query_heads);
  }

  HeadScoreAccumulator(std::size_t layers, std::size_t query_heads)
      : HeadScoreAccumulator(layers, query_heads, Options{}) {}

  /// Starts a needle prompt. `answer` is the needle's place in `prompt`, which is read only during the call.
  /// Throws ArgumentError when a run is open already, or the span is empty or not within the prompt.
  void begin_run(std::span<const TokenId> prompt, TokenSpan answer) {
    using compresskv::detail::require;
    require(!open_, "begin_run within a run: call end_run first");
    require(answer.first < answer.last && answer.last <= prompt.size(), "answer span is [", answer.first,
            ", ", answer.last, "), must be within the ", prompt.size(),
            " tokens of the prompt and not empty: give the needle's place");
    occurrences_.clear();
    for (std::size_t position = answer.first; position < answer.last; ++position) {
      ++occurrences_[prompt[position]];
    }
    answer_ = answer;
    prompt_tokens_ = prompt.size();
    steps_ = 0;
    scores_.assign(layers_ * heads_, 0.0);
    begin_step();
    open_ = true;
  }

  /// Takes one head's attention of the query whose logits give the step's token: probabilities
  /// `row[position]` over the prompt and the tokens that were generated before. Every head of every layer
  /// once a step, any order. Throws ArgumentError when no run is open, layer or head does not exist or was
  /// given already in this step, the row is not as long as the full cache, or a weight within the span is not
  /// a probability.
  void add_attention(std::size_t layer, std::size_t head, std::span<const float> row) {
    using compresskv::detail::require;
    require(open_, "add_attention outside a run: call begin_run first");
    require(layer < layers_, "layer is ", layer, ", the model has layers 0 to ", layers_ - 1);
    require(head < heads_, "head is ", head, ", the model has query heads 0 to ", heads_ - 1);
    require(row.size() == prompt_tokens_ + steps_, "attention row of layer ", layer, " head ", head, " has ",
            row.size(), " weights, the full cache has ", prompt_tokens_ + steps_, " tokens at step ", steps_,
            ": give the whole row of an uncompressed cache, and add_token after each step");
    const std::size_t index = layer * heads_ + head;
    require(!seen_[index], "attention of layer ", layer, " head ", head, " came twice in step ", steps_,
            ": call add_token between two steps");
    double mass = 0.0;
    for (std::size_t position = answer_.first; position < answer_.last; ++position) {
      const float weight = row[position];
      // Rounding in half precision may pass 1 by a little; logits, and NaN, do not get through.
      require(weight >= 0.0F && weight <= 1.01F, "attention weight of layer ", layer, " head ", head,
              " at position ", position, " is ", weight, ": give probabilities, after the softmax");
      mass += static_cast<double>(weight);
    }
    mass_[index] = mass;
    seen_[index] = true;
    ++rows_;
  }

  /// Ends a step with the token that the model chose in it.
  /// Throws ArgumentError when no run is open or a head's attention of this step is missing.
  void add_token(TokenId generated) {
    using compresskv::detail::require;
    require(open_, "add_token outside a run: call begin_run first");
    if (rows_ != seen_.size()) {
      const auto missing =
          static_cast<std::size_t>(std::find(seen_.begin(), seen_.end(), false) - seen_.begin());
      compresskv::detail::fail<ArgumentError>("add_token at step ", steps_,
                                              " without the attention of layer ", missing / heads_, " head ",
                                              missing % heads_, " (", rows_, " of ", seen_.size(),
                                              " heads came): call add_attention for every head first");
    }
    if (const auto found = occurrences_.find(generated); found != occurrences_.end()) {
      const double times =
          options_.counting == TokenCounting::once_per_step ? 1.0 : static_cast<double>(found->second);
      for (std::size_t i = 0; i < scores_.size(); ++i) {
        scores_[i] += times * mass_[i];
      }
    }
    ++steps_;
    begin_step();
  }

  /// Ends the run; `counted` says whether it answered (see `answered`), otherwise it is forgotten. Attention
  /// that no token followed is dropped. Throws ArgumentError when no run is open, or one counts that had no
  /// step.
  void end_run(bool counted) {
    using compresskv::detail::require;
    require(open_, "end_run outside a run: call begin_run first");
    require(!counted || steps_ > 0,
            "a run without a step cannot count: feed add_attention and add_token first");
    if (counted) {
      for (std::size_t i = 0; i < scores_.size(); ++i) {
        runs_[i].push_back(scores_[i]);
      }
      ++counted_runs_;
    }
    ++ended_runs_;
    open_ = false;
  }

  /// Runs that counted, and all that ended.
  std::size_t counted_runs() const { return counted_runs_; }
  std::size_t ended_runs() const { return ended_runs_; }

  /// The scores of the runs that counted so far; a run that is open is not in them.
  /// Throws Error when no run counted.
  HeadScores scores() const {
    compresskv::detail::require<Error>(counted_runs_ > 0, "no run counted of the ", ended_runs_,
                                       " that ended: the model must answer at least one needle prompt; use "
                                       "shorter prompts, easier needles or "
                                       "the model's chat template");
    return HeadScores(layers_, heads_, runs_);
  }

 private:
  void begin_step() {
    mass_.assign(layers_ * heads_, 0.0);
    seen_.assign(layers_ * heads_, false);
    rows_ = 0;
  }

  std::size_t layers_;
  std::size_t heads_;
  Options options_;
  std::vector<std::vector<double>> runs_;  // [layer * heads + head][counted run]
  std::size_t counted_runs_ = 0;
  std::size_t ended_runs_ = 0;

  // The open run.
  bool open_ = false;
  TokenSpan answer_;
  std::size_t prompt_tokens_ = 0;
  std::size_t steps_ = 0;
  std::unordered_map<TokenId, std::size_t> occurrences_;  // of each token of the span, within it
  std::vector<double> scores_;                            // [layer * heads + head]

  // The open step.
  std::vector<double> mass_;  // [layer * heads + head], attention on the span
  std::vector<bool> seen_;
  std::size_t rows_ = 0;
};

}  // namespace compresskv::calibrate
