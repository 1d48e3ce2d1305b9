#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "compresskv/core/error.hpp"
#include "compresskv/core/executor.hpp"
#include "compresskv/core/head_scores.hpp"
#include "compresskv/core/retained.hpp"
#include "compresskv/core/shape.hpp"
#include "compresskv/core/stretch.hpp"
#include "compresskv/core/workspace.hpp"
#include "compresskv/kernel/layer_input.hpp"
#include "compresskv/kernel/window_attention.hpp"
#include "compresskv/view/kv_view.hpp"
#include "compresskv/view/observation.hpp"
#include "compresskv/view/stretch_kv.hpp"

namespace compresskv::calibrate {

/// How well each KV head retrieves, whatever the text: KVzip's numbers for eviction that no context decides.
///
///     number[l][g] = largest  softmax(q K^T)[t]  of any head of group g, any query of the tokens that repeat
///                    t's stretch, and any token t of a calibration text behind its sinks;  mean over texts
///
/// The engine reads a text, begins it here, and then feeds it once more, stretch by stretch, as for
/// `score::KvZip`; `scores()` is for `budget::WholeHeads`. The authors take the largest over texts; the mean
/// tells heads apart that reach 1 somewhere in all of them. Paper: Kim et al., NeurIPS 2025
/// (arXiv 2505.23416). Cost: that of feeding the text once more, its attention twice.
class KvHeadScoreAccumulator {
 public:
  /// `sinks` first tokens are seen by every stretch and count for no head: all look at them. Throws
  /// ArgumentError for a shape that is none.
  explicit KvHeadScoreAccumulator(const ModelShape& shape, std::size_t sinks = 4)
      : shape_(shape), sinks_(sinks), runs_(shape.layers * shape.kv_heads) {
    shape_.validate();
  }

  /// The next text, all of whose `tokens` tokens are in the cache. Throws ArgumentError where nothing would
  /// be behind the sinks, or the text before was not repeated to its end.
  void begin_text(std::size_t tokens) {
    compresskv::detail::require(tokens > sinks_, "tokens is ", tokens, ", the first ", sinks_,
                                " count for no head: give a longer text");
    check_repeated();
    tokens_ = tokens;
    seen_.assign(shape_.layers, 0);
    for (std::vector<double>& runs : runs_) {
      runs.push_back(0.0);
    }
  }

  /// Takes the queries of tokens that repeat a stretch of the text: `kv` views all its rows and, behind them,
  /// those of the tokens fed since; `queries` are the last of these. Stretches come in order, each for every
  /// layer. Throws ArgumentError and ScoreError, and takes nothing.
  template <KvView V, QueryObservation O, Executor X = SerialExecutor>
  void observe(std::size_t layer, const V& kv, Stretch stretch, const O& queries, X&& executor = {}) {
    using compresskv::detail::require;
    require(layer < shape_.layers, "layer is ", layer, ", the model has layers 0 to ", shape_.layers - 1);
    require(!seen_.empty(), "begin_text() was not called: call it with the tokens of the text first");
    require(stretch.first < stretch.last && stretch.last <= tokens_, "stretch is ", stretch.first, " to ",
            stretch.last, ", must hold tokens of the text's ", tokens_);
    require(stretch.first <= seen_[layer], "stretch of layer ", layer, " begins at token ", stretch.first,
            ", tokens from ", seen_[layer],
            " on have not been repeated: stretches come in order, without gaps");
    compresskv::detail::check_view(kv, shape_);
    const std::size_t shown = queries.queries();
    for (std::size_t head = 0; head < shape_.kv_heads; ++head) {
      require(kv.rows(head) >= tokens_ + shown && kv.rows(head) == kv.rows(0), "layer ", layer, " KV head ",
              head, " has ", kv.rows(head), " rows, expected the ", tokens_,
              " of the text, and behind them one for each of the ", shown,
              " queries shown, in all heads alike");
    }
    const std::size_t before = (std::min)(sinks_, stretch.first);
    const std::vector<compresskv::detail::SomeRows> some(shape_.kv_heads,
                                                         {{{.first = 0, .last = before},
                                                           {.first = stretch.first, .last = stretch.last},
                                                           {.first = tokens_, .last = kv.rows(0)}}});
    const std::vector<std::size_t> rows(shape_.kv_heads,
                                        before + (stretch.last - stretch.first) + (kv.rows(0) - tokens_));
    const compresskv::detail::StretchKv<V> view(kv, some);
    compresskv::detail::check_observation(queries, shape_, rows[0], shown);
    const Retained whole;  // row == position
    const kernel::LayerInput<compresskv::detail::StretchKv<V>, O> in{.shape = shape_,
                                                                     .layer = layer,
                                                                     .rows = rows,
                                                                     .window = shown,
                                                                     .retained = whole,
                                                                     .kv = view,
                                                                     .observation = queries};
    // Behind the sinks, whether they stand before the stretch or begin it, and before what asks to repeat it.
    const std::size_t end = before + (stretch.last - stretch.first);
    std::vector<float> largest(shape_.kv_heads, 0.0F);
    kernel::for_all_heads(shape_, [&](std::span<const std::uint32_t> heads) {
      kernel::attention_maxima(in, heads, shown, workspace_, executor,
                               [&](std::uint32_t head, std::span<const float> maxima) {
                                 float& most = largest[head / shape_.group()];
                                 for (std::size_t t = sinks_; t < end; ++t) {
                                   most = most < maxima[t] ? maxima[t] : most;
                                 }
                               });
    });
    for (std::size_t head = 0; head < shape_.kv_heads; ++head) {
      double& number = runs_[layer * shape_.kv_heads + head].back();
      number = (std::max)(number, static_cast<double>(largest[head]));
    }
    seen_[layer] = (std::max)(seen_[layer], stretch.last);
  }

  /// A score for each KV head and text. Throws ArgumentError where no text was begun, or the last was not
  /// repeated to its end.
  HeadScores scores() const {
    compresskv::detail::require(!seen_.empty(), "no text was begun: there is nothing that heads looked at");
    check_repeated();
    return {shape_.layers, shape_.kv_heads, runs_};
  }

 private:
  void check_repeated() const {
    for (std::size_t layer = 0; layer < seen_.size(); ++layer) {
      compresskv::detail::require(seen_[layer] == tokens_, "layer ", layer, " was shown repeats of ",
                                  seen_[layer], " tokens, the text has ", tokens_,
                                  ": observe() every stretch in every layer");
    }
  }

  ModelShape shape_;
  std::size_t sinks_;
  std::vector<std::vector<double>> runs_;  // [layer * kv_heads + head], a number for each text
  std::size_t tokens_ = 0;                 // of the text at hand
  std::vector<std::size_t> seen_;          // [layer], of its tokens those that were repeated
  Workspace workspace_;
};

}  // namespace compresskv::calibrate
