#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <map>
#include <span>
#include <utility>
#include <vector>

#include "compresskv/calibrate/answer_span.hpp"
#include "compresskv/core/error.hpp"
#include "compresskv/core/executor.hpp"
#include "compresskv/core/float_bits.hpp"
#include "compresskv/core/float_mode.hpp"
#include "compresskv/core/head_scores.hpp"
#include "compresskv/core/retained.hpp"
#include "compresskv/core/shape.hpp"
#include "compresskv/core/strict_float_begin.hpp"
#include "compresskv/core/workspace.hpp"
#include "compresskv/kernel/window_attention.hpp"
#include "compresskv/view/kv_view.hpp"
#include "compresskv/view/observation.hpp"

namespace compresskv::calibrate {

/// How a head scores in a run.
enum class HeadScoreKind {
  /// Eq. 5, a step counting once for each place of the answer span that holds its token: the released code,
  /// which made the published rankings.
  once_per_occurrence,
  /// Eq. 5, a step counting once: the paper's indicator.
  once_per_step,
  /// The score of Wu et al. (ICLR 2025), for comparison: steps at which the head's largest weight lies on a
  /// place of the span that holds the step's token, divided by the span's length.
  classic,
};

/// What one needle prompt says about every head: what a process hands to another, or writes down.
struct HeadRun {
  std::size_t run = 0;   ///< the prompt's number
  bool counted = false;  ///< whether the model answered; a run that did not has no scores
  std::vector<double> once_per_occurrence = {};  ///< [layer * heads + head], as are the others
  std::vector<double> once_per_step = {};
  std::vector<double> classic = {};

  const std::vector<double>& scores(HeadScoreKind kind) const {
    return kind == HeadScoreKind::classic         ? classic
           : kind == HeadScoreKind::once_per_step ? once_per_step
                                                  : once_per_occurrence;
  }
  friend bool operator==(const HeadRun&, const HeadRun&) = default;
};

/// Finds the semantic retrieval heads of a model: scores each query head by its attention to the whole answer
/// span while the model writes the answer (Eq. 5 of arXiv 2606.24467),
///
///     score(h) = sum over steps t whose token is in A of  sum over j in A of  attention(h, t, j)
///
/// for a needle prompt whose answer span is A; the mean over the runs that counted ranks the heads. Unlike
/// the classic retrieval score it does not ask that the largest weight fall on the very token that is
/// written. All kinds of `HeadScoreKind` are counted at once.
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
/// Where attention rows never exist (fused kernels), `add_queries(layer, kv, queries)` takes the place of
/// `add_attention`.
///
/// Processes that share the prompts number them, `begin_run(number, ...)`, and `merge`: means are taken over
/// runs in the order of their numbers, so that the result is the same to the last bit as one process's. Not
/// safe to share between threads without a lock. Cost: the row's length a row; memory: three doubles a head
/// and counted run.
class HeadScoreAccumulator {
 public:
  /// Throws ArgumentError when there is no layer or no head.
  HeadScoreAccumulator(std::size_t layers, std::size_t query_heads) : layers_(layers), heads_(query_heads) {
    compresskv::detail::require(layers > 0 && query_heads > 0,
                                "head score accumulator needs at least one layer and one head, got ", layers,
                                " layers of ", query_heads, " heads");
  }

  /// Starts the needle prompt that follows those so far. `answer` is the needle's place in `prompt`. Throws
  /// ArgumentError when a run is open already, or the span is empty or not within the prompt.
  void begin_run(std::span<const TokenId> prompt, TokenSpan answer) {
    begin_run(runs_.empty() ? 0 : runs_.rbegin()->first + 1, prompt, answer);
  }

  /// The same for the prompt of this number. Throws ArgumentError when it came already, too.
  void begin_run(std::size_t run, std::span<const TokenId> prompt, TokenSpan answer) {
    using compresskv::detail::require;
    require(!open_, "begin_run within a run: call end_run first");
    check_new(run);
    require(answer.first < answer.last && answer.last <= prompt.size(), "answer span is [", answer.first,
            ", ", answer.last, "), must be within the ", prompt.size(),
            " tokens of the prompt and not empty: give the needle's place");
    answer_tokens_.assign(prompt.begin() + static_cast<std::ptrdiff_t>(answer.first),
                          prompt.begin() + static_cast<std::ptrdiff_t>(answer.last));
    answer_ = answer;
    prompt_tokens_ = prompt.size();
    steps_ = 0;
    scores_ = {.run = run, .counted = true};
    for (auto* scores : {&scores_.once_per_occurrence, &scores_.once_per_step, &scores_.classic}) {
      scores->assign(layers_ * heads_, 0.0);
    }
    begin_step();
    open_ = true;
  }

  /// Takes one head's attention of the query whose logits give the step's token: probabilities
  /// `row[position]` over the prompt and the tokens that were generated before. Every head of every layer
  /// once a step, any order. Throws ArgumentError when no run is open, layer or head does not exist or was
  /// given already in this step, the row is not as long as the full cache, or a weight within the span is not
  /// a probability. Of equal largest weights the first counts.
  void add_attention(std::size_t layer, std::size_t head, std::span<const float> row) {
    using compresskv::detail::require;
    check_row(layer, head, row.size());
    const compresskv::detail::PlainFloats plain;
    const std::size_t index = layer * heads_ + head;
    double mass = 0.0;
    for (std::size_t position = answer_.first; position < answer_.last; ++position) {
      const float& weight = row[position];
      // Rounding in half precision may pass 1 by a little; logits, and NaN, do not get through.
      require(compresskv::detail::is_finite(weight) && weight >= 0.0F && weight <= 1.01F,
              "attention weight of layer ", layer, " head ", head, " at position ", position, " is ", weight,
              ": give probabilities, after the softmax");
      mass += static_cast<double>(weight);
    }
    mass_[index] = mass;
    const auto below = [](const float& a, const float& b) {
      return compresskv::detail::ordered(a) < compresskv::detail::ordered(b);
    };
    largest_[index] = static_cast<std::size_t>(std::max_element(row.begin(), row.end(), below) - row.begin());
    seen_[index] = true;
    ++rows_;
  }

  /// `add_attention` for every head of a layer, from the step's queries and the keys: the last query of
  /// `queries` gives the step's token and belongs to the last row of `kv`, the layer's whole cache. Scale,
  /// soft cap, sliding window and sinks are those of `queries`; weights are float32.
  ///
  /// Throws ArgumentError, and takes nothing, where the shapes do not fit the model or each other, and as
  /// `add_attention`; ScoreError when a logit is NaN or +inf: heads may then be missing, and the run can only
  /// end as one that does not count. Cost: keys of a KV head are read once for as many of its heads as 1 % of
  /// the model's cache has room for.
  template <KvView V, QueryObservation O>
  void add_queries(std::size_t layer, const V& kv, const O& queries) {
    const ModelShape shape{
        .layers = layers_, .query_heads = heads_, .kv_heads = kv.kv_heads(), .head_dim = kv.head_dim()};
    shape.validate();
    compresskv::detail::require(
        queries.queries() > 0 && queries.query_heads() == heads_ && queries.head_dim() == shape.head_dim,
        "layer ", layer, " shows ", queries.queries(), " queries of ", queries.query_heads(), " heads of ",
        queries.head_dim(), " elements, the model has ", heads_, " query heads and keys of ", shape.head_dim,
        " elements: give the query of every head whose logits give the step's token");
    for (std::size_t head = 0; head < heads_; ++head) {
      check_row(layer, head, kv.rows(head / shape.group()));
    }
    // No window: each row is evictable, so that none is left out of what one query looks at.
    const std::vector<std::size_t> rows(shape.kv_heads, prompt_tokens_ + steps_);
    const Retained whole;
    const kernel::LayerInput<V, O> input{.shape = shape,
                                         .layer = layer,
                                         .rows = rows,
                                         .window = 0,
                                         .retained = whole,
                                         .kv = kv,
                                         .observation = queries};
    SerialExecutor executor;
    kernel::attention_sums_of_all_heads(
        input, 1, workspace_, executor,
        [&](std::size_t head, std::span<const float> row) { add_attention(layer, head, row); });
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
    const compresskv::detail::PlainFloats plain;
    const auto times = std::count(answer_tokens_.begin(), answer_tokens_.end(), generated);
    for (std::size_t i = 0; times > 0 && i < mass_.size(); ++i) {
      scores_.once_per_occurrence[i] += static_cast<double>(times) * mass_[i];
      scores_.once_per_step[i] += mass_[i];
      if (largest_[i] >= answer_.first && largest_[i] < answer_.last &&
          answer_tokens_[largest_[i] - answer_.first] == generated) {
        scores_.classic[i] += 1.0 / static_cast<double>(answer_.size());
      }
    }
    ++steps_;
    begin_step();
  }

  /// Ends the run; `counted` says whether it answered (see `answered`), otherwise it has no scores. Attention
  /// that no token followed is dropped. Throws ArgumentError when no run is open, or one counts that had no
  /// step.
  void end_run(bool counted) {
    using compresskv::detail::require;
    require(open_, "end_run outside a run: call begin_run first");
    require(!counted || steps_ > 0,
            "a run without a step cannot count: feed add_attention and add_token first");
    add_run(counted ? std::move(scores_) : HeadRun{.run = scores_.run});
    open_ = false;
  }

  /// Takes a run that another accumulator has ended. Throws ArgumentError, and takes nothing, when its number
  /// came already, its scores are not one a head, or one is not finite.
  void add_run(HeadRun run) {
    using compresskv::detail::require;
    check_new(run.run);
    const std::size_t expected = run.counted ? layers_ * heads_ : 0;
    for (const auto* scores : {&run.once_per_occurrence, &run.once_per_step, &run.classic}) {
      require(scores->size() == expected, "run ", run.run, " has ", scores->size(), " scores, must have ",
              expected, run.counted ? ": one a head of every layer" : ", as it did not count");
      for (std::size_t i = 0; i < scores->size(); ++i) {
        require(compresskv::detail::is_finite((*scores)[i]), "run ", run.run, " has the score ", (*scores)[i],
                " of layer ", i / heads_, " head ", i % heads_, ": every score must be finite");
      }
    }
    counted_runs_ += run.counted ? 1U : 0U;
    runs_.emplace(run.run, std::move(run));
  }

  /// Takes all runs of another accumulator, say another process's. Throws ArgumentError, and takes nothing,
  /// when it is of another model shape, one of the two has a run open, or a run is in both.
  void merge(const HeadScoreAccumulator& other) {
    using compresskv::detail::require;
    require(other.layers_ == layers_ && other.heads_ == heads_, "cannot merge scores of ", other.layers_,
            " layers of ", other.heads_, " heads into those of ", layers_, " layers of ", heads_,
            " heads: all must be of one model");
    require(!open_ && !other.open_, "merge within a run: call end_run first");
    for (const auto& [number, run] : other.runs_) {
      require(!runs_.contains(number), "run ", number, " is in both: a prompt is given to one process alone");
    }
    runs_.insert(other.runs_.begin(), other.runs_.end());
    counted_runs_ += other.counted_runs_;
  }

  /// All runs that ended, by their numbers.
  const std::map<std::size_t, HeadRun>& runs() const { return runs_; }

  /// Runs that counted, and all that ended.
  std::size_t counted_runs() const { return counted_runs_; }
  std::size_t ended_runs() const { return runs_.size(); }

  /// The scores of the runs that counted so far, in the order of their numbers; a run that is open is not in
  /// them. The default is that of the released code, which made the published rankings. Throws Error when no
  /// run counted.
  HeadScores scores(HeadScoreKind kind = HeadScoreKind::once_per_occurrence) const {
    return scores_of([](std::size_t) { return true; }, kind);
  }

  /// The scores of the runs whose number `wanted` says yes to: how stable a ranking is.
  template <class Wanted>
  HeadScores scores_of(const Wanted& wanted, HeadScoreKind kind = HeadScoreKind::once_per_occurrence) const {
    std::vector<std::vector<double>> scores(layers_ * heads_);
    std::size_t ended = 0;
    for (const auto& [number, run] : runs_) {
      if (!wanted(number)) {
        continue;
      }
      ++ended;
      for (std::size_t i = 0; run.counted && i < scores.size(); ++i) {
        scores[i].push_back(run.scores(kind)[i]);
      }
    }
    compresskv::detail::require<Error>(!scores.front().empty(), "no run counted of the ", ended,
                                       " that ended: the model must answer at least one needle prompt; use "
                                       "shorter prompts, easier needles or "
                                       "the model's chat template");
    return HeadScores(layers_, heads_, std::move(scores));
  }

 private:
  void check_new(std::size_t run) const {
    compresskv::detail::require(!runs_.contains(run), "run ", run,
                                " came already: each prompt has a number of its own");
  }

  void check_row(std::size_t layer, std::size_t head, std::size_t weights) const {
    using compresskv::detail::require;
    require(open_, "attention outside a run: call begin_run first");
    require(layer < layers_, "layer is ", layer, ", the model has layers 0 to ", layers_ - 1);
    require(head < heads_, "head is ", head, ", the model has query heads 0 to ", heads_ - 1);
    require(weights == prompt_tokens_ + steps_, "attention row of layer ", layer, " head ", head, " has ",
            weights, " weights, the full cache has ", prompt_tokens_ + steps_, " tokens at step ", steps_,
            ": give the whole row of an uncompressed cache, and add_token after each step");
    require(!seen_[layer * heads_ + head], "attention of layer ", layer, " head ", head,
            " came twice in step ", steps_, ": call add_token between two steps");
  }

  void begin_step() {
    mass_.assign(layers_ * heads_, 0.0);
    largest_.assign(layers_ * heads_, 0);
    seen_.assign(layers_ * heads_, false);
    rows_ = 0;
  }

  std::size_t layers_;
  std::size_t heads_;
  std::map<std::size_t, HeadRun> runs_;  // by number
  std::size_t counted_runs_ = 0;

  // The open run.
  bool open_ = false;
  TokenSpan answer_;
  std::vector<TokenId> answer_tokens_;
  std::size_t prompt_tokens_ = 0;
  std::size_t steps_ = 0;
  HeadRun scores_;

  // The open step.
  std::vector<double> mass_;          // [layer * heads + head], attention on the span
  std::vector<std::size_t> largest_;  // position of the largest weight
  std::vector<bool> seen_;
  std::size_t rows_ = 0;
  Workspace workspace_;
};

}  // namespace compresskv::calibrate

#include "compresskv/core/strict_float_end.hpp"
