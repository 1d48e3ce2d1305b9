#pragma once

#include <algorithm>
#include <bit>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <span>
#include <vector>

#include "compresskv/core/error.hpp"
#include "compresskv/core/float_bits.hpp"
#include "compresskv/core/half.hpp"
#include "compresskv/core/policy.hpp"
#include "compresskv/core/retained.hpp"
#include "compresskv/core/scores.hpp"
#include "compresskv/core/selection.hpp"
#include "compresskv/core/stretch.hpp"
#include "compresskv/core/workspace.hpp"
#include "compresskv/kernel/layer_input.hpp"
#include "compresskv/select/whole_model.hpp"
#include "compresskv/sequence/cross_layer.hpp"
#include "compresskv/sequence/state.hpp"
#include "compresskv/view/kv_view.hpp"
#include "compresskv/view/observation.hpp"
#include "compresskv/view/stretch_kv.hpp"

namespace compresskv::sequence {

/// A scorer that is shown tokens which repeat the context, stretch by stretch: `Compressor::observe`.
template <class P>
concept ObservesRepeats = P::scorer_type::needs == Needs::repeats;

/// Scores of the whole model by repeats of its context (`score::KvZip`): the largest that any repeat gave a
/// row, held as half floats until all has been repeated and `finish` cuts all layers.
template <class P>
class RepeatScores {
  using Code = select::Score16;
  static constexpr bool whole_model = std::same_as<typename P::selector_type, select::WholeModel>;

 public:
  static_assert(P::scorer_type::granularity == Granularity::kv_head,
                "scores of repeats are those of KV heads");
  static_assert(P::allocator_type::reach == Reach::own_layer,
                "repeats are shown after the prefill: choose budgets that are known before it");

  explicit RepeatScores(const P& plan) : plan_(&plan) {}

  void prepare(const Turn& turn) {
    codes_.reserve(turn.layers * turn.score_rows * turn.tokens);
    seen_.reserve(turn.layers);
  }
  void start(const Turn& turn) noexcept {
    turn_ = turn;
    codes_.assign(turn.layers * turn.score_rows * turn.tokens, 0);
    seen_.assign(turn.layers, 0);
  }

  std::size_t held_bytes() const { return codes_.size() * sizeof(Code); }
  std::size_t waiting_layers() const { return turn_.layers; }

  /// Takes the queries of repeated tokens into a layer's scores. Throws before anything changes.
  template <KvView V, QueryObservation O, class Pass>
  void observe(std::size_t layer, const V& kv, Stretch stretch, const O& observation,
               std::span<const float> hidden_norms, const State& state, Pass& pass) {
    const Retained& known = state.layer(layer);
    const std::size_t heads = plan_->shape().kv_heads;
    detail::require(stretch.first < stretch.last && stretch.last <= turn_.tokens, "stretch is ",
                    stretch.first, " to ", stretch.last, ", must hold tokens of the ", turn_.tokens,
                    " announced: {.first = 0, .last = 2048} is the first 2048");
    detail::require(stretch.first <= seen_[layer], "stretch of layer ", layer, " begins at token ",
                    stretch.first, ", tokens from ", seen_[layer],
                    " on have not been repeated: stretches come in order, without gaps");
    detail::check_view(kv, plan_->shape());
    detail::require(detail::sliding_window(observation) == 0, "layer ", layer, " has a sliding window of ",
                    detail::sliding_window(observation),
                    ": its repeats do not see the context; compress such layers by another plan");
    const std::size_t queries = observation.queries();
    check_hidden_norms(layer, hidden_norms, queries);
    some_.resize(heads);
    rows_.resize(heads);
    ends_.resize(heads);
    windows_.assign(heads, queries);
    std::size_t end = 0;
    for (std::size_t head = 0; head < heads; ++head) {
      const std::size_t context = known.rows_before(turn_.tokens, head);
      detail::require(kv.rows(head) >= context + queries, "layer ", layer, " KV head ", head, " has ",
                      kv.rows(head), " rows, expected at least ", context + queries, ": the ", context,
                      " of the context, and behind them one for each of the ", queries, " queries shown");
      detail::require(kv.rows(head) - context == kv.rows(0) - known.rows_before(turn_.tokens, 0), "layer ",
                      layer, " KV head ", head, " has ", kv.rows(head) - context,
                      " rows behind the context, KV head 0 has ",
                      kv.rows(0) - known.rows_before(turn_.tokens, 0), ": append every token to all heads");
      const std::size_t first = known.rows_before(stretch.first, head);
      some_[head] = {
          {{.first = 0, .last = (std::min)(first, known.rows_before(plan_->scorer().sinks(), head))},
           {.first = first, .last = known.rows_before(stretch.last, head)},
           {.first = context, .last = kv.rows(head)}}};
      rows_[head] = some_[head][0].size() + some_[head][1].size() + some_[head][2].size();
      end += rows_[head] - queries;
      ends_[head] = end;
    }
    const detail::StretchKv<V> shown(kv, some_);
    detail::check_observation(observation, plan_->shape(), rows_[0], queries);
    const kernel::LayerInput<detail::StretchKv<V>, O> in{.shape = plan_->shape(),
                                                         .layer = layer,
                                                         .rows = rows_,
                                                         .window = queries,
                                                         .retained = known,
                                                         .kv = shown,
                                                         .observation = observation,
                                                         .held_bytes = held_bytes(),
                                                         .hidden_norms = hidden_norms};
    const Scores<Granularity::kv_head> scores{pass.workspace().take(Workspace::Slot::scores, end), ends_,
                                              windows_};
    plan_->scorer().score(in, pass.workspace(), pass.executor(), scores);

    for (std::size_t head = 0; head < heads; ++head) {
      const detail::RowRange& rows = some_[head][1];
      const std::span<const float> found = scores.row(head).subspan(some_[head][0].size(), rows.size());
      const std::span<Code> own = codes_of(codes_, layer, head).subspan(rows.first, rows.size());
      std::transform(own.begin(), own.end(), found.begin(), own.begin(),
                     [](Code code, float score) { return (std::max)(code, half(score).bits); });
    }
    seen_[layer] = (std::max)(seen_[layer], stretch.last);
  }

  /// What repeats gave a KV head's rows of the tokens announced so far, those of the window too; 0 where none
  /// did.
  std::vector<float> scores(std::size_t layer, std::size_t head, const State& state) const {
    const std::size_t rows = state.layer(layer).rows_before(turn_.tokens, head);
    const std::span<const Code> own = codes_of(codes_, layer, head).first(rows);
    float times = 1.0F;
    if constexpr (requires { P::scorer_type::held_times; }) {
      times = P::scorer_type::held_times;
    }
    std::vector<float> scores(rows);
    std::transform(own.begin(), own.end(), scores.begin(),
                   [&](Code code) { return static_cast<float>(std::bit_cast<half>(code)) / times; });
    return scores;
  }

  /// All has been repeated: sinks and what is protected are marked, and where the whole model is chosen from,
  /// where it is cut. Throws ArgumentError naming what was not repeated, or where the budget is too small.
  template <class Pass>
  void choose(const State& state, Pass& pass) {
    std::size_t most = 0;
    for (std::size_t layer = 0; layer < turn_.layers; ++layer) {
      detail::require(seen_[layer] == turn_.tokens, "layer ", layer, " was shown repeats of ", seen_[layer],
                      " tokens, the sequence has ", turn_.tokens,
                      ": observe() every stretch in every layer before finish()");
      most += (std::min)(state.next_capacities()[layer], turn_.tokens) * turn_.score_rows;
    }
    std::size_t windows = 0;
    std::size_t certain = 0;
    for (std::size_t layer = 0; layer < turn_.layers; ++layer) {
      mark(layer, state, pass);
      for (std::size_t head = 0; head < turn_.score_rows; ++head) {
        const auto own = scores_of(layer, head, state);
        certain += static_cast<std::size_t>(std::count(own.begin(), own.end(), select::certain16));
        windows += window_of(layer, head, state);
      }
    }
    if constexpr (whole_model) {
      detail::require(windows + certain <= most, "the model may keep ", most,
                      " rows in all its KV heads, their windows and protected tokens are ", windows + certain,
                      ": raise the budget, or protect fewer");
      cut_ = select::WholeModel::cut(most - windows, [&](auto&& visit) {
        for (std::size_t layer = 0; layer < turn_.layers; ++layer) {
          for (std::size_t head = 0; head < turn_.score_rows; ++head) {
            visit(std::span<const Code>(scores_of(layer, head, state)));
          }
        }
      });
    }
  }

  template <class Pass>
  void select_again(std::size_t layer, std::size_t capacity, const State& state, Pass& pass) {
    if constexpr (whole_model) {
      heads_.clear();
      windows_.clear();
      for (std::size_t head = 0; head < turn_.score_rows; ++head) {
        heads_.push_back(scores_of(layer, head, state));
        windows_.push_back(window_of(layer, head, state));
      }
      select::WholeModel::select(heads_, windows_, cut_, pass.workspace(), pass.selection());
    } else {
      const Scores<Granularity::kv_head> scores = pass.take_scores();
      for (std::size_t head = 0; head < turn_.score_rows; ++head) {
        const auto own = scores_of(layer, head, state);
        std::transform(own.begin(), own.end(), scores.row(head).begin(), [](Code code) {
          // Above all half floats, and below what is protected, which the pass marks.
          return code >= select::first16 ? 65536.0F : static_cast<float>(std::bit_cast<half>(code));
        });
      }
      pass.select(state, layer, scores, capacity);
    }
  }

  bool changes(std::size_t, std::size_t, const State&) const { return false; }
  void arrive(const auto& /*input*/, const auto& /*scores*/, auto&& /*reduce*/, State&, auto& /*pass*/) {}
  void reserve(std::size_t, const State&) {}
  void keep(std::size_t, const Selection&) noexcept {}
  void end_arrival(const auto& /*scores*/, const Selection&) noexcept {}
  void check_cut(std::size_t layer, const Arrivals& arrivals) const {
    detail::require(!arrivals.under_way(), "layer ", layer,
                    " is being repeated: finish() cuts it, change its rows after that");
  }
  void check_turn(std::size_t layer, const Arrivals& arrivals) const { check_cut(layer, arrivals); }
  void check_turned() const {}

  std::size_t memory_bytes() const {
    return codes_.capacity() * sizeof(Code) + some_.capacity() * sizeof(detail::SomeRows) +
           heads_.capacity() * sizeof(std::span<const Code>) +
           (seen_.capacity() + rows_.capacity() + ends_.capacity() + windows_.capacity()) *
               sizeof(std::size_t);
  }

 private:
  /// Other scorers do not look at them.
  static void check_hidden_norms([[maybe_unused]] std::size_t layer,
                                 [[maybe_unused]] std::span<const float> norms,
                                 [[maybe_unused]] std::size_t queries) {
    if constexpr (requires { requires P::scorer_type::needs_hidden_norms; }) {
      detail::require(
          !norms.empty(), "layer ", layer,
          " was shown no hidden_norms, by which this scorer divides attention: give the length of "
          "the hidden state of each of the ",
          queries, " queries shown");
      detail::require(norms.size() == queries, "layer ", layer, " was shown ", norms.size(),
                      " hidden_norms for ", queries, " queries: give one a query shown");
      for (std::size_t i = 0; i < norms.size(); ++i) {
        detail::require(detail::is_finite(norms[i]) && norms[i] > 0.0F, "hidden_norms[", i, "] of layer ",
                        layer, " is ", norms[i],
                        ", must be finite and above 0: the length of the hidden state that the layer's "
                        "attention was given");
      }
    }
  }

  /// Codes of all rows that a KV head can have.
  template <class Codes>
  auto codes_of(Codes& codes, std::size_t layer, std::size_t head) const {
    return std::span(codes).subspan((layer * turn_.score_rows + head) * turn_.tokens, turn_.tokens);
  }
  std::size_t window_of(std::size_t layer, std::size_t head, const State& state) const {
    return (std::min)(plan_->scorer().window(), state.layer(layer).rows_before(turn_.tokens, head));
  }
  /// Those of the rows before the window.
  std::span<Code> scores_of(std::size_t layer, std::size_t head, const State& state) {
    const std::size_t rows = state.layer(layer).rows_before(turn_.tokens, head);
    return codes_of(codes_, layer, head).first(rows - window_of(layer, head, state));
  }

  /// Protected tokens of a layer stay for sure, its sinks where there is room.
  template <class Pass>
  void mark(std::size_t layer, const State& state, Pass& pass) {
    rows_.resize(turn_.score_rows);
    ends_.resize(turn_.score_rows);
    windows_.resize(turn_.score_rows);
    std::size_t end = 0;
    for (std::size_t head = 0; head < turn_.score_rows; ++head) {
      windows_[head] = window_of(layer, head, state);
      end += scores_of(layer, head, state).size();
      ends_[head] = end;
    }
    const std::span<float> values = pass.workspace().take(Workspace::Slot::scores, end);
    std::fill(values.begin(), values.end(), 0.0F);
    const Scores<Granularity::kv_head> marks{values, ends_, windows_};
    state.protected_tokens().mark(layer, state.layer(layer), marks, turn_.tokens);
    for (std::size_t head = 0; head < turn_.score_rows; ++head) {
      const std::span<Code> own = scores_of(layer, head, state);
      const std::size_t sinks =
          (std::min)(own.size(), state.layer(layer).rows_before(plan_->scorer().sinks(), head));
      std::fill_n(own.begin(), sinks, select::first16);
      for (std::size_t t = 0; t < own.size(); ++t) {
        own[t] = marks.row(head)[t] > 0.0F ? select::certain16 : own[t];
      }
    }
  }

  const P* plan_;
  Turn turn_;
  std::vector<Code> codes_;        // [layer][kv_head][row], tokens rows each
  std::vector<std::size_t> seen_;  // [layer], tokens that were repeated
  select::WholeModel::Cut cut_;
  std::vector<detail::SomeRows> some_;  // [kv_head], as all below, of the layer at hand
  std::vector<std::size_t> rows_;
  std::vector<std::size_t> ends_;
  std::vector<std::size_t> windows_;
  std::vector<std::span<const Code>> heads_;
};

template <ObservesRepeats P>
struct CrossLayerOf<P> {
  using type = RepeatScores<P>;
};

}  // namespace compresskv::sequence
