#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <numeric>
#include <span>
#include <utility>
#include <vector>

#include "compresskv/core/error.hpp"
#include "compresskv/core/executor.hpp"
#include "compresskv/core/float_bits.hpp"
#include "compresskv/core/float_mode.hpp"
#include "compresskv/core/policy.hpp"
#include "compresskv/core/positions.hpp"
#include "compresskv/core/protection.hpp"
#include "compresskv/core/retained.hpp"
#include "compresskv/core/scores.hpp"
#include "compresskv/core/selection.hpp"
#include "compresskv/core/shape.hpp"
#include "compresskv/core/workspace.hpp"
#include "compresskv/kernel/fused.hpp"
#include "compresskv/kernel/rotary.hpp"
#include "compresskv/kernel/row_moves.hpp"
#include "compresskv/kernel/window_attention.hpp"
#include "compresskv/plan.hpp"
#include "compresskv/view/held_views.hpp"
#include "compresskv/view/kv_view.hpp"
#include "compresskv/view/observation.hpp"

namespace compresskv {

/// Stands for the keys or the observation where a scorer needs none.
struct NotGiven {};

/// Compresses the cache of one sequence, layer by layer, as each ends its prefill.
///
/// Belongs to one sequence and one thread at a time; copying it copies the sequence's state (beams). The plan
/// must outlive it. From the second sequence of the same shape on nothing is allocated.
///
/// **Tokens are announced.** `begin` tells how many tokens the sequence has, `begin_turn` how many it has by
/// now. A view may hold the rows that the last compression left and those appended since, at most one for
/// each token announced: more is an error, as the engine then forgot to shorten its cache, to call
/// `begin_turn`, or compresses twice. Tokens decoded between two compressions are announced by the next
/// `begin_turn`.
///
/// **All or nothing.** Every call checks and computes everything before the first row moves: an exception
/// leaves the cache of all layers and this object as they were, and the call may be made again. From the
/// first row that moves on nothing fails: `key_run`, `value_run` and `rows` of a view do not throw.
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
      : plan_(&plan),
        executor_(std::move(executor)),
        layers_(plan.shape().layers),
        pending_(P::reach == Reach::own_layer ? 1 : plan.shape().layers) {}
  explicit Compressor(const P&&, X = X{}) = delete;  // the plan must outlive the compressor: give it a name

  /// Starts a sequence whose prompt has `prompt_tokens` tokens: budgets resolve here. `protection` names
  /// tokens that stay whatever the scores. Throws ArgumentError when the budget cannot be met. Cost: a few
  /// operations a layer.
  void begin(std::size_t prompt_tokens, const Protection& protection = {}) {
    check_tokens("prompt_tokens", prompt_tokens);
    for (Retained& layer : layers_) {
      layer.reserve_whole(prompt_tokens);
    }
    const std::size_t mean = prepare(prompt_tokens, protection);
    start_turn(prompt_tokens, mean, protection);
    for (Retained& layer : layers_) {
      layer.assign_whole(prompt_tokens);
      layer.bytes_freed_ = 0;
    }
    turned_ = false;
  }

  /// Goes on with the sequence: a new user turn, or the next chunk of a long prompt. `total_tokens` counts
  /// all its tokens so far, evicted ones too; budgets resolve anew. Each layer then holds the rows that were
  /// kept and those that the engine appended since. Throws as `begin`; after `rerotate` see there.
  void begin_turn(std::size_t total_tokens, const Protection& protection = {}) {
    detail::require(!capacities_.empty(),
                    "begin() was not called: a sequence starts with begin(), not begin_turn()");
    check_same_position("begin_turn");
    detail::require(
        !(carries && turned_),
        "scores are carried from layer to layer by true positions, which rerotate() gave up: begin() "
        "starts a new sequence");
    for (std::size_t layer = 0; layer < layers_.size(); ++layer) {
      const std::size_t known = layers_[layer].next_position_;
      detail::require(total_tokens >= known, "total_tokens is ", total_tokens, ", layer ", layer,
                      " has seen ", known,
                      " tokens: count all tokens of the sequence; truncate() takes tokens back");
    }
    check_tokens("total_tokens", total_tokens);
    const std::size_t mean = prepare(total_tokens, protection);
    start_turn(total_tokens, mean, protection);
    for (Retained& layer : layers_) {
      layer.announced_ = total_tokens;
    }
  }

  /// Takes back all tokens from `position` on (rejected speculative tokens): the sequence goes on there.
  /// Their rows are the last of each KV head. `position` is at most the tokens of the sequence, those decoded
  /// since the last compression included. Returns what is left of them: the engine shortens its cache to
  /// `rows(layer)` of it. Ends a turn whose layers are still arriving. Throws ArgumentError for position 0;
  /// after `rerotate` see there. Cost: a pass over the positions.
  Held truncate(std::size_t position) {
    check_layer(0);
    check_same_position("truncate");
    detail::require(position > 0,
                    "truncate position is 0: nothing would be left; begin() starts a new sequence");
    for (Retained& layer : layers_) {
      layer.truncate(position);
    }
    turn_over_ = turn_over_ || under_way();
    return held(position);
  }

  /// What the cache holds when the sequence has `tokens` tokens: the rows that were kept of those before
  /// `tokens`, and those that the engine appended since. After `rerotate` see there.
  Held held(std::size_t tokens) const {
    check_layer(0);
    check_same_position("held");
    return {layers_, tokens};
  }

  /// Rows that each layer may keep, window included, as of `begin()` or `begin_turn()`.
  std::span<const std::size_t> capacities() const { return capacities_; }

  /// What the last compression left of a layer; `held(tokens)` also counts the rows appended since.
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
  /// `views(l)` gives the view of any layer that has arrived, with all rows announced; it is asked once a
  /// layer, and what a view points to stays valid until the call returns. Returns the layers that shrank or
  /// were asked to for the first time, ascending; `retained(l)` says what each holds. Valid until the next
  /// call. Where the composition must see all layers first, none is returned and `finish` shrinks them.
  ///
  /// `reduce` as in `compress`; where scores are carried from layer to layer it gets this layer's part.
  ///
  /// Throws ArgumentError where a layer comes out of order, and as `compress`; the layer is then as it was,
  /// and has not arrived. Cost: that of the scorer and the allocator, plus the rows that move. Two
  /// floats are held for each token of the prompt where scores are carried, else one for each row that may go
  /// later.
  template <class Views, class O = NotGiven, class Reduce = NotGiven>
  std::span<const std::size_t> arrive(std::size_t layer, Views&& views, const O& observation = {},
                                      Reduce&& reduce = {}) {
    static_assert(P::reach != Reach::own_layer,
                  "this composition shrinks each layer on its own: call compress(), not arrive()");
    check_layer(layer);
    check_turn();
    detail::require(layer == arrived_, "layer ", layer, " arrives, expected layer ", arrived_,
                    ": layers arrive in order, each once");
    detail::HeldViews<std::remove_cvref_t<decltype(views(layer))>> held_views(workspace_, layer + 1);
    const auto& kv = held_views.add(views(layer));
    check_arrived(layer, kv);
    set_rows(kv);
    staged_rows_ = 0;
    const std::size_t longest = *std::max_element(rows_.begin(), rows_.end());
    const Scores<granularity> scores = reduced_scores(layer, kv, observation, reduce);
    check_scores(layer, scores);
    changed_.clear();
    changed_.reserve(layers_.size());
    if constexpr (carries) {
      carry(layer, scores);
    }
    if (layer < waiting_layers()) {
      end_arrival();
      return changed_;
    }

    // What each may keep now: a layer that has been cut never grows again.
    pending_capacities_.assign(capacities_.begin(), capacities_.end());
    if constexpr (cascades) {
      share_out(layer, longest, scores, kv, observation);
    }
    for (std::size_t l = 0; l < layer; ++l) {
      if (cascades ? pending_capacities_[l] < capacities_[l] : layer == waiting_layers()) {
        check_arrived(l, held_views.add(views(l)));
        changed_.push_back(l);
      }
    }
    select_within(layer, scores, at_least_window(pending_capacities_[layer], longest));
    stage(layer, kv, kv, selection_, pending_[layer]);
    stage_changed(held_views.last(changed_.size()), pending_by_position_);
    selection_.reserve(staged_rows_, kv.kv_heads());
    if constexpr (cascades) {
      const auto kept = std::span(pending_capacities_).first(layer + 1);
      kept_scores_.reserve(std::accumulate(kept.begin(), kept.end(), std::size_t{0}) * scores.rows(),
                           layer + 1, scores.rows());
    }

    // From here on nothing fails.
    commit_changed(held_views.last(changed_.size()));
    commit_staged(layer, kv);
    if constexpr (cascades) {
      kept_scores_.append(scores, selection_);
    }
    capacities_.assign(pending_capacities_.begin(), pending_capacities_.end());
    end_arrival();
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
    check_layer(0);
    check_turn();
    const std::size_t layers = layers_.size();
    detail::require(arrived_ == layers, "layer ", arrived_, " has not arrived: finish() wants all ", layers,
                    " layers of the model");
    detail::HeldViews<std::remove_cvref_t<decltype(views(0))>> held_views(workspace_, layers);
    changed_.clear();
    changed_.reserve(layers);
    for (std::size_t l = 0; l < layers; ++l) {
      check_arrived(l, held_views.add(views(l)));
      changed_.push_back(l);
    }
    pending_capacities_.assign(capacities_.begin(), capacities_.end());
    staged_rows_ = 0;
    stage_changed(held_views.last(layers), by_position_);
    selection_.reserve(staged_rows_, plan_->shape().kv_heads);

    // From here on nothing fails.
    commit_changed(held_views.last(layers));
    turn_over_ = true;
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
    set_rows(layer, attention);
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
    set_rows(layer, attention);
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
    check_settled(layer);
    return keep(layer, kv, kv, selection);
  }

  /// As `compact`, to the first rows of another cache; `source` is not written, unless `target` shares memory
  /// with it. `target` must have room.
  template <class V, class W>
  const Retained& gather(std::size_t layer, const V& source, const Selection& selection, const W& target) {
    static_assert(models_kv_view<W>(),
                  "gather's target is no KvView: see compresskv/view/kv_view.hpp for its members");
    detail::check_view(target, plan_->shape());
    check_settled(layer);
    return keep(layer, source, target, selection);
  }

  /// For engines that need contiguous positions: turns the keys of a compressed layer from their true
  /// positions to their row indices; the layer then goes on at its row count. By default nothing is turned
  /// and positions stay true.
  ///
  /// From there on positions, totals of `begin_turn` and protected tokens count the rows that were left.
  /// Layers left with unequal rows go on at different positions: a sequence of theirs can be decoded, but
  /// `begin_turn`, `truncate` and `held` throw. So does `begin_turn` where scores travel from layer to layer.
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
    check_rows(layer, [&](std::size_t head) { return kv.rows(head); });
    rotary.validate(kv.head_dim());
    detail::require(!carries || !under_way() || (layer < arrived_ && arrived_ > waiting_layers()), "layer ",
                    layer, " is still to be chosen from by position: rerotate() it after the last layer");
    for (std::size_t head = 0; head < kv.kv_heads(); ++head) {
      detail::require(kv.rows(head) == kv.rows(0), "KV head ", head, " has ", kv.rows(head),
                      " rows, KV head 0 ", kv.rows(0), ": contiguous positions need equal lengths");
      detail::check_writable(kv, head, 0, kv.rows(head));
    }
    Retained& retained = layers_[layer];
    retained.reserve_whole(kv.rows(0));
    const std::span<float> buffers =
        workspace_.take(Workspace::Slot::key_rows, kv.kv_heads() * kv.head_dim());
    detail::run_all(executor_, workspace_.take_counts(kv.kv_heads()), [&](std::size_t head) {
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
    const std::size_t unseen = retained.rows_before(retained.announced_) - kv.rows(0);
    retained.assign_whole(kv.rows(0));
    retained.announced_ += unseen;
    turned_ = true;
    return retained;
  }

  /// Bytes of scratch and of positions held by this compressor now.
  std::size_t memory_bytes() const {
    std::size_t total = workspace_.bytes() + selection_.memory_bytes() + kept_scores_.memory_bytes();
    total += (protected_.capacity() + pending_protected_.capacity()) * sizeof(std::uint32_t);
    total += (by_position_.capacity() + pending_by_position_.capacity()) * sizeof(float);
    for (const Retained& layer : layers_) {
      total += layer.memory_bytes();
    }
    for (const Retained& layer : pending_) {
      total += layer.memory_bytes();
    }
    return total;
  }

 private:
  void check_layer(std::size_t layer) const {
    detail::require(!capacities_.empty(), "begin() was not called: call it with the prompt's length first");
    detail::require(layer < layers_.size(), "layer is ", layer, ", the model has layers 0 to ",
                    layers_.size() - 1);
  }

  /// Layers that were not turned go on where the sequence does.
  void check_same_position(const char* call) const {
    for (std::size_t layer = 1; layer < layers_.size(); ++layer) {
      const std::size_t position = layers_[layer].announced_;
      detail::require(position == layers_[0].announced_, call, "() finds that layer ", layer,
                      " goes on at position ", position, ", layer 0 at ", layers_[0].announced_,
                      " since rerotate(): turn all layers, each to equally many rows (a uniform budget)");
    }
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
    check_rows(layer, [&](std::size_t head) { return kv.rows(head); });
  }

  /// A layer holds the rows that the last compression left and those appended since, as many in each KV head
  /// and at most one a token announced. `rows_of(kv_head)` gives what is shown.
  template <class RowsOf>
  void check_rows(std::size_t layer, RowsOf&& rows_of) const {
    const Retained& known = layers_[layer];
    for (std::size_t head = 0; head < plan_->shape().kv_heads; ++head) {
      const std::size_t rows = rows_of(head);
      const std::size_t kept = known.rows(head);
      detail::require(rows >= kept, "layer ", layer, " KV head ", head, " has ", rows,
                      " rows, expected at least ", kept,
                      ": view all rows of the prompt that begin() announced and those appended since");
      detail::require(rows - kept == rows_of(0) - known.rows(0), "layer ", layer, " KV head ", head, " has ",
                      rows - kept, " rows appended, KV head 0 has ", rows_of(0) - known.rows(0),
                      ": append every token to all heads");
    }
    check_announced(layer, rows_of);
  }

  /// The second half of it: what is shown by attention or scores alone may be of a cache that has evicted
  /// rows unseen.
  template <class RowsOf>
  void check_announced(std::size_t layer, RowsOf&& rows_of) const {
    const Retained& known = layers_[layer];
    const std::size_t open = known.announced_ - known.next_position_;
    for (std::size_t head = 0; head < plan_->shape().kv_heads; ++head) {
      const std::size_t most = known.rows(head) + open;
      detail::require(
          rows_of(head) <= most, "layer ", layer, " KV head ", head, " has ", rows_of(head),
          " rows, expected at most ", most, ": it held ", known.rows(head), ", and ", open, " of the ",
          known.announced_,
          " tokens announced are still to come; shorten the cache to retained(layer).rows(kv_head) after "
          "each compression, and announce new tokens by begin_turn()");
    }
  }

  /// A layer that takes part in choosing for others holds all that was announced: its scores are those rows'.
  template <class V>
  void check_arrived(std::size_t layer, const V& kv) const {
    check_view(layer, kv);
    for (std::size_t head = 0; head < kv.kv_heads(); ++head) {
      const std::size_t expected = layers_[layer].rows_before(layers_[layer].announced_, head);
      detail::require(kv.rows(head) == expected, "layer ", layer, " KV head ", head, " has ", kv.rows(head),
                      " rows, expected the ", expected, " that it holds of the prompt: view all of them");
    }
  }

  void check_turn() const {
    detail::require(
        !turn_over_,
        "the layers of this turn have all arrived: begin_turn() starts the next turn, begin() the "
        "next sequence");
  }

  /// Whether some layers have arrived and others are awaited.
  bool under_way() const { return arrived_ > 0 && !turn_over_; }

  /// Throws where a cascade may shrink the layer again, by the scores of the rows that it holds.
  void check_settled(std::size_t layer) const {
    detail::require(!cascades || !under_way() || layer >= arrived_, "layer ", layer,
                    " may shrink again as later layers arrive: change its rows after the last one");
  }

  /// Layers that only look on until a later one arrives.
  std::size_t waiting_layers() const {
    if constexpr (P::reach == Reach::all_layers) {
      return layers_.size();
    } else if constexpr (requires { plan_->scorer().hold_layers(); }) {
      return (std::min)(plan_->scorer().hold_layers(), layers_.size() - 1);
    } else {
      return 0;
    }
  }

  /// Makes of a layer's own scores those carried to it, what came before decayed and its own; and what is
  /// carried on from it, into `pending_by_position_`.
  void carry(std::size_t layer, const Scores<granularity>& scores) {
    const detail::PlainFloats plain;
    const float decay = plan_->scorer().decay();
    pending_by_position_.resize(by_position_.size());
    std::transform(by_position_.begin(), by_position_.end(), pending_by_position_.begin(),
                   [&](float score) { return decay * score; });
    const std::span<float> own = scores.row(0);
    Retained::Cursor positions = layers_[layer].cursor();
    for (std::size_t t = 0; t < own.size(); ++t) {
      const std::size_t position = positions.seek(t);
      own[t] = kernel::fused(decay, by_position_[position], own[t]);
      pending_by_position_[position] = own[t];
    }
  }

  void end_arrival() noexcept {
    if constexpr (carries) {
      by_position_.swap(pending_by_position_);
    }
    ++arrived_;
    turn_over_ = P::reach == Reach::earlier_layers && arrived_ == layers_.size();
  }

  /// Capacities of the layers that have arrived with `layer`, into `pending_capacities_`.
  template <class V, class O>
  void share_out(std::size_t layer, std::size_t longest, const Scores<granularity>& scores, const V& kv,
                 const O& observation) {
    preferences_.resize(layer);
    preferences_.push_back(
        plan_->allocator().preference(input_of(layer, kv, observation), workspace_, executor_));
    least_.resize(layer);
    least_.push_back(0);
    for (std::size_t row = 0; row < scores.rows(); ++row) {
      least_.back() = (std::max)(least_.back(), scores.window(row) + count_protected(layer, row, scores));
    }
    pending_capacities_[layer] = longest;
    const auto arrived = std::span(pending_capacities_).first(layer + 1);
    most_.resize(arrived.size());
    plan_->allocator().cascade(
        preferences_, least_,
        (std::min)(mean_ * layers_.size(), std::accumulate(arrived.begin(), arrived.end(), std::size_t{0})),
        arrived, most_);
  }

  /// What a layer that arrived before keeps now, into `selection_`: by the scores that have been carried, or
  /// those it arrived with.
  template <class V>
  void select_again(std::size_t layer, const V& kv, std::span<const float> by_position) {
    const std::size_t capacity = pending_capacities_[layer];
    if constexpr (carries) {
      set_rows(kv);
      const Scores<granularity> scores = take_scores();
      Retained::Cursor positions = layers_[layer].cursor();
      const std::span<float> own = scores.row(0);
      for (std::size_t t = 0; t < own.size(); ++t) {
        own[t] = by_position[positions.seek(t)];
      }
      select_within(layer, scores, at_least_window(capacity, rows_[0]));
    } else {
      plan_->selector().select(kept_scores_.template of<granularity>(layer), capacity, workspace_,
                               selection_);
    }
  }

  /// Selects and stages the layers of `changed_`, whose views are given.
  template <class V>
  void stage_changed(std::span<const V> views, std::span<const float> by_position) {
    for (std::size_t i = 0; i < views.size(); ++i) {
      select_again(changed_[i], views[i], by_position);
      stage(changed_[i], views[i], views[i], selection_, pending_[changed_[i]]);
    }
  }

  template <class V>
  void commit_changed(std::span<const V> views) noexcept {
    for (std::size_t i = 0; i < views.size(); ++i) {
      commit_staged(changed_[i], views[i]);
      if constexpr (cascades) {
        kept_scores_.keep(changed_[i], selection_);
      }
    }
    if constexpr (cascades) {
      kept_scores_.settle();
    }
  }

  /// Scores that a cascade holds at most: of all rows that are kept.
  std::size_t cascade_scores(std::size_t mean) const { return mean * layers_.size() * score_rows_of_layer(); }
  std::size_t score_rows_of_layer() const {
    return granularity == Granularity::layer ? 1 : plan_->shape().kv_heads;
  }

  static void check_tokens(const char* name, std::size_t tokens) {
    detail::require(tokens > 0, name, " is 0: a prompt has at least one token");
    detail::require(tokens <= (std::numeric_limits<std::uint32_t>::max)(), name, " is ", tokens,
                    ", the most is ", (std::numeric_limits<std::uint32_t>::max)(),
                    ": positions are held in 32 bits");
  }

  /// Resolves budgets and protection and makes room for a turn; changes nothing that other calls look at.
  /// Returns the mean rows a layer.
  std::size_t prepare(std::size_t tokens, const Protection& protection) {
    const auto listed = protection.positions;
    for (std::size_t i = 0; i < listed.size(); ++i) {
      detail::require(i == 0 || listed[i] > listed[i - 1], "protected position ", listed[i], " comes after ",
                      listed[i == 0 ? 0 : i - 1], ": positions must ascend, each once");
      detail::require(listed[i] < tokens, "protected position is ", listed[i],
                      ", the sequence has positions 0 to ", tokens - 1);
    }
    const std::size_t window = plan_->scorer().window();
    const std::size_t mean = plan_->allocator().budget().resolve(tokens, window, plan_->shape());
    pending_capacities_.assign(layers_.size(), tokens);
    if (mean < tokens) {
      plan_->allocator().allocate({.per_layer = mean, .window = window, .tokens = tokens},
                                  pending_capacities_);
    }
    pending_protected_.assign(listed.begin(), listed.end());
    protected_.reserve(listed.size());
    capacities_.reserve(layers_.size());
    if constexpr (cascades) {
      kept_scores_.reserve(cascade_scores(mean), layers_.size(), score_rows_of_layer());
    }
    if constexpr (carries) {
      by_position_.reserve(tokens);
      pending_by_position_.reserve(tokens);
    }
    return mean;
  }

  /// Takes over what `prepare` made.
  void start_turn(std::size_t tokens, std::size_t mean, const Protection& protection) noexcept {
    capacities_.assign(pending_capacities_.begin(), pending_capacities_.end());
    protected_.assign(pending_protected_.begin(), pending_protected_.end());
    keep_first_ = protection.keep_first;
    keep_last_from_ = protection.keep_last == 0 ? (std::numeric_limits<std::size_t>::max)()
                                                : tokens - (std::min)(protection.keep_last, tokens);
    mean_ = mean;
    arrived_ = 0;
    turn_over_ = false;
    if constexpr (cascades) {
      kept_scores_.clear();
    }
    if constexpr (carries) {
      by_position_.assign(tokens, 0.0F);
    }
  }

  /// Whatever an allocator of the engine's own says, the window stays whole.
  std::size_t at_least_window(std::size_t capacity, std::size_t rows) const {
    return (std::max)(capacity, (std::min)(plan_->scorer().window(), rows));
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

  template <KeylessObservation O>
  void set_rows(std::size_t layer, const O& attention) {
    check_layer(layer);
    check_announced(layer, [&](std::size_t) { return attention.tokens(); });
    rows_.assign(plan_->shape().kv_heads, attention.tokens());
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

  /// Throws where scores do not fit the plan or the layer, or are not finite; the rows of the longest KV
  /// head.
  std::size_t check_scores(std::size_t layer, const Scores<granularity>& scores) const {
    const std::size_t expected = score_rows_of_layer();
    detail::require(scores.rows() == expected, "scores of layer ", layer, " have ", scores.rows(),
                    " rows, this plan's have ", expected, ": give the scores that score() filled");
    std::size_t longest = 0;
    for (std::size_t row = 0; row < scores.rows(); ++row) {
      longest = (std::max)(longest, scores.cached(row));
      const std::size_t window = (std::min)(plan_->scorer().window(), scores.cached(row));
      detail::require(scores.window(row) == window, "scores of layer ", layer, " leave out a window of ",
                      scores.window(row), " rows, the plan's window is ", window,
                      ": give the scores that score() filled");
    }
    check_announced(
        layer, [&](std::size_t head) { return scores.cached(granularity == Granularity::layer ? 0 : head); });
    for (std::size_t row = 0; row < scores.rows(); ++row) {
      const auto values = scores.row(row);
      for (std::size_t token = 0; token < values.size(); ++token) {
        detail::require<ScoreError>(detail::is_finite(values[token]), "score of layer ", layer, " row ", row,
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
        keep_last_from_ == (std::numeric_limits<std::size_t>::max)()) {
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

  std::size_t count_protected(std::size_t layer, std::size_t row, const Scores<granularity>& scores) const {
    std::size_t count = 0;
    for_each_protected(layer, row, scores.tokens(row), [&](std::size_t) { ++count; });
    return count;
  }

  /// Throws where `capacity` cannot hold the protected tokens beside the window.
  void check_protected(std::size_t layer, const Scores<granularity>& scores, std::size_t capacity) const {
    for (std::size_t row = 0; row < scores.rows(); ++row) {
      const std::size_t count = count_protected(layer, row, scores);
      const std::size_t room = capacity - scores.window(row);
      detail::require(count <= room, "layer ", layer, " has room for ", room, " tokens beside the window, ",
                      count, " are protected: raise the budget or its minimum, or protect fewer");
    }
  }

  /// Gives protected tokens the highest finite score, which no attention reaches: any selector then keeps
  /// them.
  void mark_protected(std::size_t layer, const Scores<granularity>& scores) const {
    for (std::size_t row = 0; row < scores.rows(); ++row) {
      for_each_protected(layer, row, scores.tokens(row), [&](std::size_t token) {
        scores.row(row)[token] = (std::numeric_limits<float>::max)();
      });
    }
  }

  void select_within(std::size_t layer, const Scores<granularity>& scores, std::size_t capacity) {
    check_protected(layer, scores, capacity);
    mark_protected(layer, scores);
    plan_->selector().select(scores, capacity, workspace_, selection_);
  }

  /// Scores of `rows_`, their values unspecified.
  Scores<granularity> take_scores() {
    score_ends_.resize(score_rows_of_layer());
    score_windows_.resize(score_ends_.size());
    std::size_t end = 0;
    for (std::size_t row = 0; row < score_ends_.size(); ++row) {
      score_windows_[row] = (std::min)(plan_->scorer().window(), rows_[row]);
      end += rows_[row] - score_windows_[row];
      score_ends_[row] = end;
    }
    return {workspace_.take(Workspace::Slot::scores, end), score_ends_, score_windows_};
  }

  template <class V, class O>
  Scores<granularity> score_rows(std::size_t layer, const V& kv, const O& observation) {
    static_assert(S::needs != Needs::keys || KvView<V>,
                  "this scorer reads the keys: give it the layer's view");
    if constexpr (S::needs == Needs::window_attention || S::needs == Needs::all_queries) {
      static_assert(
          Observation<O>,
          "this scorer needs the window's attention: give it a QueryWindow, an AttentionMatrix or another "
          "Observation (compresskv/view/observation.hpp)");
      for (std::size_t head = 0; head < rows_.size(); ++head) {
        const std::size_t window = (std::min)(plan_->scorer().window(), rows_[head]);
        detail::check_observation(observation, plan_->shape(), rows_[head],
                                  (std::max)(window, unseen(layer, head)));
      }
    }
    const Scores<granularity> scores = take_scores();
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
    // Positions of what each layer is to keep are held until all are known: 1.1 bits each.
    const std::size_t longest = *std::max_element(rows_.begin(), rows_.end());
    const std::size_t staged = (pending_.size() - 1) * score_rows_of_layer() * longest * 11 / 80;
    return {.shape = plan_->shape(),
            .layer = layer,
            .rows = rows_,
            .window = plan_->scorer().window(),
            .retained = layers_[layer],
            .kv = kv,
            .observation = observation,
            .held_bytes = staged + 2 * by_position_.size() * sizeof(float) +
                          (cascades ? cascade_scores(mean_) * sizeof(float) : 0)};
  }

  Retained& pending(std::size_t layer) { return pending_[P::reach == Reach::own_layer ? 0 : layer]; }

  template <class V, class W>
  const Retained& keep(std::size_t layer, const V& source, const W& target, const Selection& selection) {
    check_layer(layer);
    stage(layer, source, target, selection, pending(layer));
    commit(layer, source, target, selection, pending(layer));
    return layers_[layer];
  }

  /// Checks all that a move asks for, says what the layer will hold in `next`, and makes room for it.
  template <class V, class W>
  void stage(std::size_t layer, const V& source, const W& target, const Selection& selection,
             Retained& next) {
    static_assert(models_kv_view<V>(),
                  "the argument kv is no KvView: see compresskv/view/kv_view.hpp for its members");
    static_assert(
        kernel::rows_fit<V, W>,
        "rows move as they are: the cache written needs the element types of the cache read, not const");
    detail::check_view(source, plan_->shape());
    check_rows(layer, [&](std::size_t head) { return source.rows(head); });
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

    Retained& now = layers_[layer];
    next.next_position_ = now.next_position_ + source.rows(0) - now.rows(0);
    next.bytes_freed_ = (before - after) * kv_row_bytes(source);
    next.lists_ = before == after || selection.shared() ? now.lists_ : kv_heads;
    now.sets_.resize((std::max)(now.sets_.size(), next.lists_));
    next.sets_.resize((std::max)(next.sets_.size(), next.lists_));
    std::size_t values = 0;
    for (std::size_t list = 0; list < next.lists_; ++list) {
      if (before == after) {
        now.sets_[list].reserve(next.next_position_);
        continue;
      }
      Retained::Cursor positions = now.cursor(list);
      next.sets_[list].clear();
      next.sets_[list].reserve(next.next_position_);
      for (const std::uint32_t row : selection.rows(list)) {
        next.sets_[list].push_back(positions.seek(row));
      }
      now.sets_[list].reserve_for(next.sets_[list]);
      values += next.sets_[list].size();
    }
    workspace_.take_counts(kv_heads);
    staged_rows_ = (std::max)(staged_rows_, before == after ? before : values);
  }

  /// Moves what was staged. `take_counts` and all that grows here has its memory.
  template <class V, class W>
  void commit(std::size_t layer, const V& source, const W& target, const Selection& selection,
              const Retained& next) noexcept {
    detail::run_all(executor_, workspace_.take_counts(source.kv_heads()),
                    [&](std::size_t head) { kernel::copy_rows(source, target, head, selection.rows(head)); });
    Retained& now = layers_[layer];
    if (next.bytes_freed_ > 0) {
      std::copy_n(next.sets_.begin(), next.lists_, now.sets_.begin());
      now.lists_ = next.lists_;
    } else {
      for (std::size_t list = 0; list < now.lists_; ++list) {
        now.sets_[list].append(now.next_position_, next.next_position_);
      }
    }
    now.next_position_ = next.next_position_;
    now.bytes_freed_ = next.bytes_freed_;
  }

  /// `commit` in place for a layer staged before others: its selection, which `selection_` no longer holds,
  /// is found again from the positions.
  template <class V>
  void commit_staged(std::size_t layer, const V& kv) noexcept {
    const Retained& now = layers_[layer];
    const Retained& next = pending_[layer];
    if (next.bytes_freed_ == 0) {
      set_rows(kv);
      select_all();
    } else {
      const auto fill = [&](std::size_t list, std::span<std::uint32_t> rows) {
        const PositionSet& kept = next.sets_[list];
        std::transform(kept.begin(), kept.end(), rows.begin(), [&](std::size_t position) {
          return static_cast<std::uint32_t>(now.rows_before(position, list));
        });
      };
      if (next.shared()) {
        fill(0, selection_.assign_shared(next.rows(0)));
      } else {
        selection_.assign_per_head(0);
        for (std::size_t list = 0; list < next.lists_; ++list) {
          fill(list, selection_.append_head(next.rows(list)));
        }
      }
    }
    commit(layer, kv, kv, selection_, next);
  }

  const P* plan_;
  X executor_;
  Workspace workspace_;
  std::vector<std::size_t> capacities_;          // [layer]
  std::vector<std::size_t> pending_capacities_;  // of a call under way
  std::vector<Retained> layers_;
  std::vector<Retained> pending_;  // what layers are to hold: the one at hand, or all that change at once
  // Of compositions that reach over layers.
  std::size_t mean_ = 0;     // p
  std::size_t arrived_ = 0;  // layers
  bool turned_ = false;      // keys of this sequence: positions are no longer true
  bool turn_over_ = false;   // no layer is awaited until the next turn
  std::vector<std::size_t> changed_;
  std::size_t staged_rows_ = 0;             // most rows that a selection of a layer staged has
  std::vector<float> by_position_;          // scores carried from layer to layer
  std::vector<float> pending_by_position_;  // those of an arrival under way
  std::vector<double> preferences_;
  std::vector<std::size_t> least_;  // [layer that has arrived], rows of its window and of what is protected
  std::vector<std::size_t> most_;
  detail::KeptScores kept_scores_;
  std::vector<std::size_t> rows_;           // [kv_head], of the layer at hand
  std::vector<std::size_t> score_ends_;     // [row of scores]
  std::vector<std::size_t> score_windows_;  // [row of scores]
  std::vector<std::uint32_t> protected_;
  std::vector<std::uint32_t> pending_protected_;
  std::size_t keep_first_ = 0;
  std::size_t keep_last_from_ = (std::numeric_limits<std::size_t>::max)();
  Selection selection_;
};

template <class P>
Compressor(const P&) -> Compressor<P>;
template <class P, class X>
Compressor(const P&, X) -> Compressor<P, X>;

}  // namespace compresskv
