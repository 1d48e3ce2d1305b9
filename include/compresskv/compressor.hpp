#pragma once

#include <algorithm>
#include <cassert>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <numeric>
#include <span>
#include <utility>
#include <vector>

#include "compresskv/budget/allocator.hpp"
#include "compresskv/core/error.hpp"
#include "compresskv/core/executor.hpp"
#include "compresskv/core/policy.hpp"
#include "compresskv/core/positions.hpp"
#include "compresskv/core/protection.hpp"
#include "compresskv/core/retained.hpp"
#include "compresskv/core/scores.hpp"
#include "compresskv/core/selection.hpp"
#include "compresskv/core/shape.hpp"
#include "compresskv/core/workspace.hpp"
#include "compresskv/kernel/rotary.hpp"
#include "compresskv/kernel/row_moves.hpp"
#include "compresskv/kernel/window_attention.hpp"
#include "compresskv/score/scorer.hpp"
#include "compresskv/select/selector.hpp"
#include "compresskv/view/kv_view.hpp"
#include "compresskv/view/observation.hpp"

namespace compresskv {

/// What to do for a model: a scorer, a selector and an allocator, made once, immutable, shared by all
/// sequences and threads.
///
/// A selector that cannot use the scorer's granularity does not compile.
template <score::Scorer S, select::Selector T, budget::Allocator A>
class Plan {
 public:
  using scorer_type = S;
  using allocator_type = A;
  static constexpr Reach reach = furthest(S::reach, T::reach, A::reach);

  static_assert(T::accepts(S::granularity),
                "this selector cannot use scores of this scorer's granularity: a shared selector needs one "
                "row a layer, "
                "a per-head selector one row a KV head");

  /// Throws ArgumentError when a policy does not fit the model, or the budget cannot hold the window.
  Plan(const ModelShape& shape, S scorer, T selector, A allocator)
      : shape_(shape),
        scorer_(std::move(scorer)),
        selector_(std::move(selector)),
        allocator_(std::move(allocator)) {
    shape_.validate();
    scorer_.validate(shape_);
    allocator_.validate(shape_);
    allocator_.budget().validate(scorer_.window(), shape_);
  }

  const ModelShape& shape() const { return shape_; }
  const S& scorer() const { return scorer_; }
  const T& selector() const { return selector_; }
  const A& allocator() const { return allocator_; }

 private:
  ModelShape shape_;
  S scorer_;
  T selector_;
  A allocator_;
};

/// Stands for the keys or the observation where a scorer needs none.
struct NotGiven {};

/// Compresses the cache of one sequence, layer by layer, as each ends its prefill.
///
/// Belongs to one sequence and one thread at a time; copying it copies the sequence's state (beams). The plan
/// must outlive it. From the second sequence of the same shape on nothing is allocated.
///
/// Every call checks and computes everything before the first row moves: an exception leaves that layer as it
/// was.
template <class P, class X = SerialExecutor>
class Compressor {
  using S = typename P::scorer_type;

 public:
  static_assert(Executor<X>, "the executor is no Executor: it needs parallel_for(count, task)");
  static constexpr Granularity granularity = S::granularity;
  /// Whether scores travel from layer to layer: the scorer has `decay()`, what is left of them a layer later.
  static constexpr bool carries = requires(const S& scorer) { scorer.decay(); };
  /// Whether budgets of earlier layers shrink as later ones arrive.
  static constexpr bool cascades = P::allocator_type::reach != Reach::own_layer;
  static_assert(!carries || granularity == Granularity::layer,
                "carried scores are those of a layer, not of its KV heads");
  static_assert(!(carries && cascades),
                "scores and budgets cannot both go from layer to layer: choose budgets that are known before "
                "the first layer");

  explicit Compressor(const P& plan, X executor = X{})
      : plan_(&plan), executor_(std::move(executor)), layers_(plan.shape().layers) {}

  /// Starts a sequence whose prompt has `prompt_tokens` tokens: budgets resolve here. `protection` names
  /// tokens that stay whatever the scores. Throws ArgumentError when the budget cannot be met. Cost: a few
  /// operations a layer.
  void begin(std::size_t prompt_tokens, const Protection& protection = {}) {
    check_tokens(prompt_tokens);
    for (Retained& layer : layers_) {
      layer.reserve_whole(prompt_tokens);
    }
    resolve(prompt_tokens, protection);
    for (Retained& layer : layers_) {
      layer.assign_whole(prompt_tokens);
      layer.bytes_freed_ = 0;
    }
  }

  /// Goes on with the sequence: a new user turn, or the next chunk of a long prompt. `total_tokens` counts
  /// all its tokens so far, evicted ones too; budgets resolve anew. Each layer then holds the rows that were
  /// kept and those that the engine appended since. Throws as `begin`.
  void begin_turn(std::size_t total_tokens, const Protection& protection = {}) {
    detail::require(!capacities_.empty(),
                    "begin() was not called: a sequence starts with begin(), not begin_turn()");
    for (std::size_t layer = 0; layer < layers_.size(); ++layer) {
      const std::size_t known = layers_[layer].next_position_;
      detail::require(total_tokens >= known, "total_tokens is ", total_tokens, ", layer ", layer,
                      " has seen ", known,
                      " tokens: count all tokens of the sequence; truncate() takes tokens back");
    }
    check_tokens(total_tokens);
    resolve(total_tokens, protection);
  }

  /// Takes back all tokens from `position` on (rejected speculative tokens): the sequence goes on there.
  /// Their rows are the last of each KV head; `retained(layer)` says how many are left, and the engine
  /// shortens its cache. Throws ArgumentError for position 0. Cost: a pass over the positions.
  void truncate(std::size_t position) {
    check_layer(0);
    detail::require(position > 0,
                    "truncate position is 0: nothing would be left; begin() starts a new sequence");
    for (Retained& layer : layers_) {
      layer.truncate(position);
    }
  }

  /// Rows that each layer may keep, window included, as of `begin()` or `begin_turn()`.
  std::span<const std::size_t> capacities() const { return capacities_; }

  /// What a layer holds now.
  const Retained& retained(std::size_t layer) const {
    check_layer(layer);
    return layers_[layer];
  }

  /// Scores, selects and compacts one layer in place: the call at the end of that layer's prefill.
  ///
  /// `kv` views all rows of the layer, `observation` the last queries, the last of which belongs to the last
  /// row. `reduce` is called with the scores before anything is selected: in a tensor-parallel engine it adds
  /// the ranks' scores. Where no KV head has more rows than the capacity nothing is computed and nothing
  /// moves.
  ///
  /// Throws ArgumentError naming what does not fit, ScoreError when keys or queries hold NaN; the layer is
  /// then as it was. Cost: that of the scorer, plus moving at most `capacity` rows.
  template <class V, class O = NotGiven, class Reduce = NotGiven>
  const Retained& compress(std::size_t layer, const V& kv, const O& observation = {}, Reduce&& reduce = {}) {
    static_assert(
        P::reach == Reach::own_layer,
        "this composition must see more than one layer before it can shrink any: it needs arrive(), "
        "not compress()");
    check_view(layer, kv);
    set_rows(kv);
    if (stays_whole(layer)) {
      select_all();
    } else {
      select(layer, reduced_scores(layer, kv, observation, reduce));
    }
    return compact(layer, kv, selection_);
  }

  /// `compress` for compositions that reach over layers: layer `layer` has ended its prefill, and it and
  /// layers before it shrink to what they may keep now. Layers arrive in order, each once a turn.
  ///
  /// `views(l)` gives the view of any layer that has arrived. Returns the layers that shrank or were asked to
  /// for the first time, ascending; `retained(l)` says what each holds. Valid until the next call. Where the
  /// composition must see all layers first, none is returned and `finish` shrinks them.
  ///
  /// `reduce` as in `compress`; where scores are carried from layer to layer it gets this layer's part.
  ///
  /// Throws ArgumentError where a layer comes out of order, and as `compress`; the layer is then as it was,
  /// and has not arrived. Cost: that of the scorer and the allocator, plus the rows that move. A float is
  /// held for each token of the prompt where scores are carried, else for each row that may go later.
  template <class Views, class O = NotGiven, class Reduce = NotGiven>
  std::span<const std::size_t> arrive(std::size_t layer, Views&& views, const O& observation = {},
                                      Reduce&& reduce = {}) {
    static_assert(P::reach != Reach::own_layer,
                  "this composition shrinks each layer on its own: call compress(), not arrive()");
    check_layer(layer);
    detail::require(layer == arrived_, "layer ", layer, " arrives, expected layer ", arrived_,
                    ": layers arrive in order, each once");
    const auto& kv = views(layer);
    check_view(layer, kv);
    set_rows(kv);
    const std::size_t longest = *std::max_element(rows_.begin(), rows_.end());
    const Scores<granularity> scores = reduced_scores(layer, kv, observation, reduce);
    check_scores(layer, scores);
    if constexpr (carries) {
      add_carried(layer, scores);
    }
    changed_.clear();
    if (layer < waiting_layers()) {
      carry(layer, scores);
      ++arrived_;
      return changed_;
    }

    // What each may keep now: a layer that has been cut never grows again.
    pending_capacities_.assign(capacities_.begin(), capacities_.end());
    if constexpr (cascades) {
      share_out(layer, longest, kv, observation);
    }
    for (std::size_t l = 0; l < layer; ++l) {
      if (cascades ? pending_capacities_[l] < capacities_[l] : layer == waiting_layers()) {
        check_arrived(l, views(l));
        changed_.push_back(l);
      }
    }
    const std::size_t capacity = at_least_window(pending_capacities_[layer], longest);
    check_protected(layer, scores, capacity);
    carry(layer, scores);
    mark_protected(layer, scores);
    plan_->selector().select(scores, capacity, workspace_, selection_);
    if constexpr (cascades) {
      kept_scores_.append(layer, scores, selection_);
    }
    keep(layer, kv, kv, selection_);
    capacities_[layer] = pending_capacities_[layer];
    ++arrived_;
    for (const std::size_t l : changed_) {
      shrink_again(l, views(l), pending_capacities_[l]);
    }
    if constexpr (cascades) {
      kept_scores_.settle();
    }
    changed_.push_back(layer);
    return changed_;
  }

  /// Shrinks all layers of a composition that must see the whole model first, once each has arrived. Returns
  /// all layers.
  ///
  /// Throws ArgumentError naming a layer that has not arrived, or whose view is not what it was; nothing has
  /// moved then.
  template <class Views>
  std::span<const std::size_t> finish(Views&& views) {
    static_assert(P::reach == Reach::all_layers,
                  "this composition need not see the whole model: there is nothing to finish");
    const std::size_t layers = plan_->shape().layers;
    check_layer(0);
    detail::require(arrived_ == layers, "layer ", arrived_, " has not arrived: finish() wants all ", layers,
                    " layers of the model");
    changed_.clear();
    for (std::size_t l = 0; l < layers; ++l) {
      check_arrived(l, views(l));
      changed_.push_back(l);
    }
    for (std::size_t l = 0; l < layers; ++l) {
      shrink_again(l, views(l), capacities_[l]);
    }
    arrived_ = 0;
    return changed_;
  }

  /// The layer's scores alone; they live in the compressor until its next call and may be changed (reduced).
  /// Throws as `compress`.
  template <class V, class O = NotGiven>
  requires(!KeylessObservation<V>) Scores<granularity> score(std::size_t layer, const V& kv,
                                                             const O& observation = {}) {
    static_assert(!QueryObservation<V>, "queries need the keys: give the layer's view as well");
    check_view(layer, kv);
    set_rows(kv);
    return score_rows(layer, kv, observation);
  }

  /// The same from attention alone, for engines that keep their cache elsewhere.
  template <KeylessObservation O>
  Scores<granularity> score(std::size_t layer, const O& attention) {
    check_layer(layer);
    rows_.assign(plan_->shape().kv_heads, attention.tokens());
    return score_rows(layer, NotGiven{}, attention);
  }

  /// Rows to keep, from scores of this layer as `score` filled them or as ranks reduced them; protected
  /// tokens are marked in the scores. Valid until the next call. Throws ScoreError on a score that is NaN or
  /// infinite, naming layer, row and token, and ArgumentError on scores of another shape, or where the
  /// capacity cannot hold all that is protected.
  const Selection& select(std::size_t layer, const Scores<granularity>& scores) {
    check_layer(layer);
    select_within(layer, scores, capacity(layer, check_scores(layer, scores)));
    return selection_;
  }

  /// Rows to keep from attention alone, without any view: for engines whose cache lies on a device, and those
  /// that only append. Where no more rows than the capacity are shown, all stay. Throws as `score`.
  template <KeylessObservation O>
  const Selection& select(std::size_t layer, const O& attention) {
    check_layer(layer);
    rows_.assign(plan_->shape().kv_heads, attention.tokens());
    if (stays_whole(layer)) {
      select_all();
      return selection_;
    }
    return select(layer, score_rows(layer, NotGiven{}, attention));
  }

  /// Moves the selected rows of `kv` to its first rows, in order, and forgets the others. The selection may
  /// come from elsewhere (another rank, a file). Throws ArgumentError before anything moves.
  template <class V>
  const Retained& compact(std::size_t layer, const V& kv, const Selection& selection) {
    return keep(layer, kv, kv, selection);
  }

  /// As `compact`, to the first rows of another cache; `source` is not written, unless `target` shares memory
  /// with it. `target` must have room.
  template <class V, class W>
  const Retained& gather(std::size_t layer, const V& source, const Selection& selection, const W& target) {
    static_assert(models_kv_view<W>(),
                  "gather's target is no KvView: see compresskv/view/kv_view.hpp for its members");
    detail::check_view(target, plan_->shape());
    return keep(layer, source, target, selection);
  }

  /// For engines that need contiguous positions: turns the keys of a compressed layer from their true
  /// positions to their row indices; the sequence then goes on at the row count. By default nothing is turned
  /// and positions stay true.
  ///
  /// Throws ArgumentError where KV heads hold different rows counts, or `rotary` does not fit. Cost: every
  /// kept key is read, turned and rounded to its element type once. Quantised keys do not compile: rows are
  /// never re-quantised.
  template <class V>
  const Retained& rerotate(std::size_t layer, const V& kv, const kernel::Rotary& rotary) {
    static_assert(models_kv_view<V>(),
                  "the argument kv is no KvView: see compresskv/view/kv_view.hpp for its members");
    static_assert(Element<typename V::key_element>,
                  "only plain keys can be turned: quantised rows are never re-quantised");
    check_layer(layer);
    detail::check_view(kv, plan_->shape());
    check_rows(layer, kv);
    rotary.validate(kv.head_dim());
    for (std::size_t head = 0; head < kv.kv_heads(); ++head) {
      detail::require(kv.rows(head) == kv.rows(0), "KV head ", head, " has ", kv.rows(head),
                      " rows, KV head 0 ", kv.rows(0), ": contiguous positions need equal lengths");
      detail::check_writable(kv, head, 0, kv.rows(head));
    }
    Retained& retained = layers_[layer];
    retained.reserve_whole(kv.rows(0));
    const std::span<float> buffers =
        workspace_.take(Workspace::Slot::key_rows, kv.kv_heads() * kv.head_dim());
    executor_.parallel_for(kv.kv_heads(), [&](std::size_t head) {
      Retained::Cursor positions = retained.cursor(head);
      std::size_t row = 0;
      for (std::size_t i = 0; i < kv.run_count(head); ++i) {
        const auto run = kv.key_run(head, i);
        for (std::size_t r = 0; r < run.rows; ++r, ++row) {
          const std::size_t position = positions.seek(row);
          if (position != row) {
            kernel::rotate_row(run, r, kv.head_dim(), rotary,
                               static_cast<double>(row) - static_cast<double>(position),
                               buffers.data() + head * kv.head_dim());
          }
        }
      }
    });
    retained.assign_whole(kv.rows(0));
    return retained;
  }

  /// Bytes of scratch and of positions held by this compressor now.
  std::size_t memory_bytes() const {
    std::size_t total =
        workspace_.bytes() + selection_.memory_bytes() + protected_.capacity() * sizeof(std::uint32_t);
    for (const PositionSet& set : pending_) {
      total += set.memory_bytes();
    }
    for (const Retained& layer : layers_) {
      total += layer.memory_bytes();
    }
    return total + kept_scores_.memory_bytes() + by_position_.capacity() * sizeof(float);
  }

 private:
  void check_layer(std::size_t layer) const {
    detail::require(!capacities_.empty(), "begin() was not called: call it with the prompt's length first");
    detail::require(layer < layers_.size(), "layer is ", layer, ", the model has layers 0 to ",
                    layers_.size() - 1);
  }

  template <class V>
  void check_view(std::size_t layer, const V& kv) const {
    static_assert(models_kv_view<V>(),
                  "the argument kv is no KvView: see compresskv/view/kv_view.hpp for its members");
    check_layer(layer);
    detail::check_view(kv, plan_->shape());
    for (std::size_t head = 0; granularity == Granularity::layer && head < kv.kv_heads(); ++head) {
      detail::require(
          kv.rows(head) == kv.rows(0), "KV head ", head, " of layer ", layer, " has ", kv.rows(head),
          " rows, KV head 0 has ", kv.rows(0),
          ": one set of rows for all heads needs equal lengths; use a policy with scores a KV head");
    }
    check_rows(layer, kv);
  }

  /// The view must hold what the compressor knows of, and may hold rows that the engine appended since, the
  /// same number in each KV head.
  template <class V>
  void check_rows(std::size_t layer, const V& kv) const {
    const Retained& known = layers_[layer];
    for (std::size_t head = 0; head < kv.kv_heads(); ++head) {
      detail::require(kv.rows(head) >= known.rows(head), "layer ", layer, " KV head ", head, " has ",
                      kv.rows(head), " rows, expected at least ", known.rows(head),
                      ": view all rows of the prompt that begin() announced and those appended since");
      detail::require(kv.rows(head) - known.rows(head) == kv.rows(0) - known.rows(0), "layer ", layer,
                      " KV head ", head, " has ", kv.rows(head) - known.rows(head),
                      " rows appended, KV head 0 has ", kv.rows(0) - known.rows(0),
                      ": append every token to all heads");
    }
  }

  /// A layer that arrived earlier holds what it held then, or what was kept of it: its scores are those
  /// rows'.
  template <class V>
  void check_arrived(std::size_t layer, const V& kv) const {
    check_view(layer, kv);
    for (std::size_t head = 0; head < kv.kv_heads(); ++head) {
      const std::size_t expected = layers_[layer].rows_before(tokens_, head);
      detail::require(kv.rows(head) == expected, "layer ", layer, " KV head ", head, " has ", kv.rows(head),
                      " rows, expected the ", expected,
                      " that it holds of the prompt: append after the last layer has arrived");
    }
  }

  /// Layers that only look on until a later one arrives.
  std::size_t waiting_layers() const {
    if constexpr (P::reach == Reach::all_layers) {
      return plan_->shape().layers;
    } else if constexpr (requires { plan_->scorer().hold_layers(); }) {
      return std::min(plan_->scorer().hold_layers(), plan_->shape().layers - 1);
    } else {
      return 0;
    }
  }

  /// Turns a layer's own scores into those carried to it: what came before, decayed, and its own.
  void add_carried(std::size_t layer, const Scores<granularity>& scores) const {
    const std::span<float> own = scores.row(0);
    Retained::Cursor positions = layers_[layer].cursor();
    for (std::size_t t = 0; t < own.size(); ++t) {
      own[t] = std::fma(plan_->scorer().decay(), by_position_[positions.seek(t)], own[t]);
    }
  }

  /// Hands carried scores on to the next layer; nothing where scores are not carried.
  void carry(std::size_t layer, const Scores<granularity>& scores) {
    if constexpr (carries) {
      for (float& score : by_position_) {
        score *= plan_->scorer().decay();
      }
      Retained::Cursor positions = layers_[layer].cursor();
      const std::span<const float> now = scores.row(0);
      for (std::size_t t = 0; t < now.size(); ++t) {
        by_position_[positions.seek(t)] = now[t];
      }
    }
  }

  /// Capacities of the layers that have arrived with `layer`, into `pending_capacities_`.
  template <class V, class O>
  void share_out(std::size_t layer, std::size_t longest, const V& kv, const O& observation) {
    preferences_.resize(layer);
    preferences_.push_back(
        plan_->allocator().preference(input_of(layer, kv, observation), workspace_, executor_));
    pending_capacities_[layer] = longest;
    const auto arrived = std::span(pending_capacities_).first(layer + 1);
    most_.resize(arrived.size());
    plan_->allocator().cascade(preferences_, plan_->scorer().window(),
                               std::min(mean_ * plan_->shape().layers,
                                        std::accumulate(arrived.begin(), arrived.end(), std::size_t{0})),
                               arrived, most_);
  }

  /// Shrinks a layer that arrived before to `capacity`: by the scores carried so far, or those it arrived
  /// with.
  template <class V>
  void shrink_again(std::size_t layer, const V& kv, std::size_t capacity) {
    if constexpr (carries) {
      set_rows(kv);
      const std::size_t window = observing();
      score_ends_.assign(1, rows_[0] - window);
      const Scores<granularity> scores(workspace_.take(Workspace::Slot::scores, rows_[0] - window),
                                       score_ends_, window);
      Retained::Cursor positions = layers_[layer].cursor();
      const std::span<float> own = scores.row(0);
      for (std::size_t t = 0; t < own.size(); ++t) {
        own[t] = by_position_[positions.seek(t)];
      }
      select_within(layer, scores, at_least_window(capacity, rows_[0]));
      keep(layer, kv, kv, selection_);
    } else {
      plan_->selector().select(kept_scores_.template of<granularity>(layer), capacity, workspace_,
                               selection_);
      keep(layer, kv, kv, selection_);
      kept_scores_.keep(layer, selection_);
    }
    capacities_[layer] = capacity;
  }

  /// Scores that a cascade holds at most: of all that is kept, and of a layer that has just arrived.
  std::size_t cascade_scores(std::size_t tokens, std::size_t mean) const {
    const std::size_t rows = granularity == Granularity::layer ? 1 : plan_->shape().kv_heads;
    return (mean * plan_->shape().layers + tokens) * rows;
  }

  static void check_tokens(std::size_t tokens) {
    detail::require(tokens > 0, "prompt_tokens is 0: a prompt has at least one token");
    detail::require(tokens <= std::numeric_limits<std::uint32_t>::max(), "prompt_tokens is ", tokens,
                    ", positions are held in 32 bits");
  }

  void resolve(std::size_t tokens, const Protection& protection) {
    const auto listed = protection.positions;
    for (std::size_t i = 0; i < listed.size(); ++i) {
      detail::require(i == 0 || listed[i] > listed[i - 1], "protected position ", listed[i], " comes after ",
                      listed[i == 0 ? 0 : i - 1], ": positions must ascend, each once");
      detail::require(listed[i] < tokens, "protected position is ", listed[i],
                      ", the sequence has positions 0 to ", tokens - 1);
    }
    const std::size_t window = plan_->scorer().window();
    const std::size_t mean = plan_->allocator().budget().resolve(tokens, window, plan_->shape());
    if constexpr (cascades) {
      kept_scores_.reserve(cascade_scores(tokens, mean));
    }
    pending_capacities_.assign(plan_->shape().layers, tokens);
    if (mean < tokens) {
      plan_->allocator().allocate({.per_layer = mean, .window = window, .tokens = tokens},
                                  pending_capacities_);
    }
    protected_.assign(listed.begin(), listed.end());
    keep_first_ = protection.keep_first;
    keep_last_from_ = protection.keep_last == 0 ? std::numeric_limits<std::size_t>::max()
                                                : tokens - std::min(protection.keep_last, tokens);
    capacities_.assign(pending_capacities_.begin(), pending_capacities_.end());
    mean_ = mean;
    tokens_ = tokens;
    arrived_ = 0;
    if constexpr (carries) {
      by_position_.assign(tokens, 0.0F);
    }
  }

  /// A prompt shorter than the window has a capacity below it; once decoding has made the layer longer, the
  /// window still stays whole.
  std::size_t at_least_window(std::size_t capacity, std::size_t rows) const {
    return std::max(capacity, std::min(plan_->scorer().window(), rows));
  }
  std::size_t capacity(std::size_t layer, std::size_t rows) const {
    return at_least_window(capacities_[layer], rows);
  }

  /// Queries that must be shown beside the window's: where a scorer wants all, those of every row that no
  /// compression has seen.
  std::size_t unseen(std::size_t layer, std::size_t head) const {
    if (S::needs != Needs::all_queries) {
      return 0;
    }
    const Retained& known = layers_[layer];
    const bool whole = known.rows(head) == known.next_position();
    return rows_[head] - (whole ? 0 : known.rows(head));
  }

  bool stays_whole(std::size_t layer) const {
    const std::size_t longest = *std::max_element(rows_.begin(), rows_.end());
    return longest <= capacity(layer, longest);
  }

  template <class V>
  void set_rows(const V& kv) {
    rows_.resize(kv.kv_heads());
    for (std::size_t head = 0; head < kv.kv_heads(); ++head) {
      rows_[head] = kv.rows(head);
    }
  }

  void select_all() {
    const auto fill = [](std::span<std::uint32_t> list) { std::iota(list.begin(), list.end(), 0U); };
    if (std::all_of(rows_.begin(), rows_.end(), [&](std::size_t rows) { return rows == rows_[0]; })) {
      fill(selection_.assign_shared(rows_[0]));
      return;
    }
    selection_.assign_per_head(std::accumulate(rows_.begin(), rows_.end(), std::size_t{0}));
    for (const std::size_t rows : rows_) {
      fill(selection_.append_head(rows));
    }
  }

  /// Throws where scores do not fit the plan or are not finite; the rows of the longest KV head.
  std::size_t check_scores(std::size_t layer, const Scores<granularity>& scores) const {
    const std::size_t expected = granularity == Granularity::layer ? 1 : plan_->shape().kv_heads;
    detail::require(scores.rows() == expected, "scores of layer ", layer, " have ", scores.rows(),
                    " rows, this plan's have ", expected, ": give the scores that score() filled");
    std::size_t shortest = scores.tokens(0) + scores.window();
    std::size_t longest = shortest;
    for (std::size_t row = 1; row < scores.rows(); ++row) {
      shortest = std::min(shortest, scores.tokens(row) + scores.window());
      longest = std::max(longest, scores.tokens(row) + scores.window());
    }
    const std::size_t window = std::min(plan_->scorer().window(), shortest);
    detail::require(scores.window() == window, "scores of layer ", layer, " leave out a window of ",
                    scores.window(), " rows, the plan's window is ", window,
                    ": give the scores that score() filled");
    for (std::size_t row = 0; row < scores.rows(); ++row) {
      const auto values = scores.row(row);
      for (std::size_t token = 0; token < values.size(); ++token) {
        detail::require<ScoreError>(std::isfinite(values[token]), "score of layer ", layer, " row ", row,
                                    " token ", token, " is ", values[token],
                                    ": scores must be finite; nothing was changed");
      }
    }
    return longest;
  }

  /// Calls `visit(token)` for each protected token of a row of scores.
  template <class Visit>
  void for_each_protected(std::size_t layer, std::size_t row, std::size_t tokens, Visit&& visit) const {
    if (keep_first_ == 0 && protected_.empty() &&
        keep_last_from_ == std::numeric_limits<std::size_t>::max()) {
      return;  // the usual case costs nothing
    }
    Retained::Cursor positions = layers_[layer].cursor(row);
    for (std::size_t token = 0; token < tokens; ++token) {
      const std::size_t position = positions.seek(token);
      if (position < keep_first_ || position >= keep_last_from_ ||
          std::binary_search(protected_.begin(), protected_.end(), position)) {
        visit(token);
      }
    }
  }

  /// Throws where `capacity` cannot hold the protected tokens beside the window.
  void check_protected(std::size_t layer, const Scores<granularity>& scores, std::size_t capacity) const {
    const std::size_t room = capacity - scores.window();
    for (std::size_t row = 0; row < scores.rows(); ++row) {
      std::size_t count = 0;
      for_each_protected(layer, row, scores.tokens(row), [&](std::size_t) { ++count; });
      detail::require(count <= room, "layer ", layer, " has room for ", room, " tokens beside the window, ",
                      count, " are protected: raise the budget or its minimum, or protect fewer");
    }
  }

  /// Gives protected tokens the highest finite score, which no attention reaches: any selector then keeps
  /// them.
  void mark_protected(std::size_t layer, const Scores<granularity>& scores) const {
    for (std::size_t row = 0; row < scores.rows(); ++row) {
      for_each_protected(layer, row, scores.tokens(row), [&](std::size_t token) {
        scores.row(row)[token] = std::numeric_limits<float>::max();
      });
    }
  }

  void select_within(std::size_t layer, const Scores<granularity>& scores, std::size_t capacity) {
    check_protected(layer, scores, capacity);
    mark_protected(layer, scores);
    plan_->selector().select(scores, capacity, workspace_, selection_);
  }

  /// Queries of the window that observe the layer at hand: a short one has no more than its rows.
  std::size_t observing() const {
    return std::min(plan_->scorer().window(), *std::min_element(rows_.begin(), rows_.end()));
  }

  template <class V, class O>
  Scores<granularity> score_rows(std::size_t layer, const V& kv, const O& observation) {
    const ModelShape& shape = plan_->shape();
    const std::size_t window = observing();
    static_assert(S::needs != Needs::keys || KvView<V>,
                  "this scorer reads the keys: give it the layer's view");
    if constexpr (S::needs == Needs::window_attention || S::needs == Needs::all_queries) {
      static_assert(
          Observation<O>,
          "this scorer needs the window's attention: give it a QueryWindow, an AttentionMatrix or another "
          "Observation (compresskv/view/observation.hpp)");
      for (std::size_t head = 0; head < rows_.size(); ++head) {
        detail::check_observation(observation, shape, rows_[head], std::max(window, unseen(layer, head)));
      }
    }
    score_ends_.resize(granularity == Granularity::layer ? 1 : shape.kv_heads);
    std::size_t end = 0;
    for (std::size_t row = 0; row < score_ends_.size(); ++row) {
      end += rows_[row] - window;
      score_ends_[row] = end;
    }
    const Scores<granularity> scores(workspace_.take(Workspace::Slot::scores, end), score_ends_, window);
    plan_->scorer().score(input_of(layer, kv, observation), workspace_, executor_, scores);
    return scores;
  }

  template <class V, class O, class Reduce>
  Scores<granularity> reduced_scores(std::size_t layer, const V& kv, const O& observation, Reduce&& reduce) {
    const Scores<granularity> scores = score_rows(layer, kv, observation);
    if constexpr (!std::same_as<std::remove_cvref_t<Reduce>, NotGiven>) {
      reduce(scores.values());
    }
    return scores;
  }

  template <class V, class O>
  kernel::LayerInput<V, O> input_of(std::size_t layer, const V& kv, const O& observation) const {
    return {.shape = plan_->shape(),
            .layer = layer,
            .rows = rows_,
            .window = observing(),
            .retained = layers_[layer],
            .kv = kv,
            .observation = observation,
            .held_bytes = cascades ? cascade_scores(rows_[0], mean_) * sizeof(float) : 0};
  }

  template <class V, class W>
  const Retained& keep(std::size_t layer, const V& source, const W& target, const Selection& selection) {
    static_assert(models_kv_view<V>(),
                  "the argument kv is no KvView: see compresskv/view/kv_view.hpp for its members");
    static_assert(
        kernel::rows_fit<V, W>,
        "rows move as they are: the cache written needs the element types of the cache read, not const");
    check_layer(layer);
    detail::check_view(source, plan_->shape());
    check_rows(layer, source);
    const std::size_t kv_heads = source.kv_heads();
    selection.validate(kv_heads, [&](std::size_t head) { return source.rows(head); });
    const bool in_place = static_cast<const void*>(&source) == static_cast<const void*>(&target);
    std::size_t before = 0;
    std::size_t after = 0;
    for (std::size_t head = 0; head < kv_heads; ++head) {
      const auto rows = selection.rows(head);
      before += source.rows(head);
      after += rows.size();
      detail::require(rows.size() <= target.rows(head), "gather's target has ", target.rows(head),
                      " rows of KV head ", head, ", the selection keeps ", rows.size(), ": give it room");
      detail::check_writable(target, head, in_place ? detail::first_moved(rows) : 0, rows.size());
    }

    Retained& retained = layers_[layer];
    const std::size_t next_position = retained.next_position_ + source.rows(0) - retained.rows(0);
    const std::size_t lists = selection.shared() ? retained.lists_ : kv_heads;
    if (before != after) {
      compose_positions(retained, lists, selection);
      retained.sets_.resize(std::max(retained.sets_.size(), lists));
    }
    for (std::size_t list = 0; list < lists; ++list) {
      if (before != after) {
        retained.sets_[list].reserve_for(pending_[list]);
      } else if (list < retained.lists_) {
        retained.sets_[list].reserve(next_position);
      }
    }
    move_rows(source, target, selection);
    if (before != after) {
      std::copy_n(pending_.begin(), lists, retained.sets_.begin());
      retained.lists_ = lists;
    } else {
      for (std::size_t list = 0; list < retained.lists_; ++list) {
        retained.sets_[list].append(retained.next_position_, next_position);
      }
    }
    retained.next_position_ = next_position;
    retained.bytes_freed_ = (before - after) * kv_row_bytes(source);
    return retained;
  }

  /// Positions of the selected rows, into `pending_`.
  void compose_positions(const Retained& retained, std::size_t lists, const Selection& selection) {
    pending_.resize(std::max(pending_.size(), lists));
    for (std::size_t list = 0; list < lists; ++list) {
      Retained::Cursor positions = retained.cursor(list);
      pending_[list].clear();
      for (const std::uint32_t row : selection.rows(list)) {
        pending_[list].push_back(positions.seek(row));
      }
    }
  }

  template <class V, class W>
  void move_rows(const V& source, const W& target, const Selection& selection) noexcept {
    executor_.parallel_for(source.kv_heads(), [&](std::size_t head) {
      kernel::copy_rows(source, target, head, selection.rows(head));
    });
  }

  const P* plan_;
  X executor_;
  Workspace workspace_;
  std::vector<std::size_t> capacities_;          // [layer]
  std::vector<std::size_t> pending_capacities_;  // of a begin() under way
  std::vector<Retained> layers_;
  // Of compositions that reach over layers.
  std::size_t mean_ = 0;     // p
  std::size_t tokens_ = 0;   // of the sequence so far
  std::size_t arrived_ = 0;  // layers
  std::vector<std::size_t> changed_;
  std::vector<float> by_position_;  // scores carried from layer to layer
  std::vector<double> preferences_;
  std::vector<std::size_t> most_;
  detail::KeptScores kept_scores_;
  std::vector<std::size_t> rows_;        // [kv_head], of the layer at hand
  std::vector<std::size_t> score_ends_;  // [row of scores]
  std::vector<std::uint32_t> protected_;
  std::size_t keep_first_ = 0;
  std::size_t keep_last_from_ = std::numeric_limits<std::size_t>::max();
  Selection selection_;
  std::vector<PositionSet> pending_;  // positions of a compaction under way
};

template <class P>
Compressor(const P&) -> Compressor<P>;
template <class P, class X>
Compressor(const P&, X) -> Compressor<P, X>;

}  // namespace compresskv
