#pragma once

#include <concepts>
#include <cstddef>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "compresskv/core/executor.hpp"
#include "compresskv/core/made_with.hpp"
#include "compresskv/core/policy.hpp"
#include "compresskv/core/protection.hpp"
#include "compresskv/core/retained.hpp"
#include "compresskv/core/scores.hpp"
#include "compresskv/core/selection.hpp"
#include "compresskv/core/stretch.hpp"
#include "compresskv/kernel/rotary.hpp"
#include "compresskv/plan.hpp"
#include "compresskv/sequence/arrivals.hpp"
#include "compresskv/sequence/call.hpp"
#include "compresskv/sequence/carried_scores.hpp"
#include "compresskv/sequence/cascade.hpp"
#include "compresskv/sequence/compaction.hpp"
#include "compresskv/sequence/cross_layer.hpp"
#include "compresskv/sequence/layer_pass.hpp"
#include "compresskv/sequence/repeat_scores.hpp"
#include "compresskv/sequence/rotation.hpp"
#include "compresskv/sequence/saved_bytes.hpp"
#include "compresskv/sequence/saving.hpp"
#include "compresskv/sequence/state.hpp"
#include "compresskv/view/held_views.hpp"
#include "compresskv/view/kv_view.hpp"
#include "compresskv/view/observation.hpp"

namespace compresskv {

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
 public:
  static_assert(call::runs<X>, "the executor is no Executor: it needs parallel_for(count, task)");
  static constexpr Granularity granularity = P::scorer_type::granularity;

  explicit Compressor(const P& plan, X executor = X{})
      : state_(plan.shape().layers, plan.shape().kv_heads,
               P::capacity_granularity == Granularity::kv_head ? plan.shape().kv_heads : 1),
        pass_(plan, std::move(executor)),
        over_layers_(plan),
        compaction_(P::reach == Reach::own_layer ? 1 : plan.shape().layers) {}
  explicit Compressor(const P&&, X = X{}) = delete;  // the plan must outlive the compressor: give it a name

  /// Starts a sequence whose prompt has `prompt_tokens` tokens: the budget resolves here. `protection` names
  /// tokens that stay whatever the scores. Throws ArgumentError when the budget cannot be met. Cost: a few
  /// operations a layer.
  void begin(std::size_t prompt_tokens, const Protection& protection = {}) {
    state_.prepare_sequence(prompt_tokens, protection);
    const sequence::Turn turn = prepare(prompt_tokens);
    state_.start_sequence(prompt_tokens, protection);
    over_layers_.start(turn);
    arrivals_.start();
  }

  /// Goes on with the sequence: a new user turn, or the next chunk of a long prompt. `total_tokens` counts
  /// all its tokens so far, evicted ones too; the budget resolves anew. Each layer then holds the rows that
  /// were kept and those that the engine appended since. Throws as `begin`; after `rerotate` see there.
  void begin_turn(std::size_t total_tokens, const Protection& protection = {}) {
    state_.prepare_turn(total_tokens, protection);
    if (state_.turned()) {
      over_layers_.check_turned();
    }
    const sequence::Turn turn = prepare(total_tokens);
    state_.start_turn(total_tokens, protection);
    over_layers_.start(turn);
    arrivals_.start();
  }

  /// Takes back all tokens from `position` on (rejected speculative tokens): the sequence goes on there.
  /// Their rows are the last of each KV head. `position` is at most the tokens of the sequence, those decoded
  /// since the last compression included. Returns what is left of them: the engine shortens its cache to
  /// `rows(layer)` of it. Ends a turn whose layers are still arriving. Throws ArgumentError for position 0;
  /// after `rerotate` see there. Cost: a pass over the positions.
  Held truncate(std::size_t position) {
    state_.truncate(position);
    if (arrivals_.under_way()) {
      arrivals_.end();
    }
    return held(position);
  }

  /// What the cache holds when the sequence has `tokens` tokens: the rows kept of those before `tokens`, and
  /// those that the engine appended since. After `rerotate` see there.
  Held held(std::size_t tokens) const { return state_.held(tokens); }

  /// Rows that each layer may keep, window included, as of `begin()` or `begin_turn()`: `[layer]`, or
  /// `[layer][kv_head]` where the allocator gives each KV head its own.
  std::span<const std::size_t> capacities() const { return state_.capacities(); }

  /// What the last compression left of a layer; `held(tokens)` also counts the rows appended since.
  const Retained& retained(std::size_t layer) const {
    state_.check_layer(layer);
    return state_.layer(layer);
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
    if constexpr (call::fits<call::compress<P, V, O, Reduce>>()) {
      pass_.see(state_, layer, kv);
      if (pass_.stays_whole(state_, layer)) {
        pass_.select_all();
      } else {
        select(layer, scores(layer, kv, observation, reduce));
      }
      keep(layer, kv, kv, pass_.selection());
    }
    return state_.layer(layer);
  }

  /// `compress` for compositions that reach over layers: layer `layer` has ended its prefill, and it and
  /// layers before it shrink to what they may keep now. Layers arrive in order, each once a turn.
  ///
  /// `views(l)` gives the view of any layer that has arrived, with all rows announced; it is asked once a
  /// layer, and what a view points to stays valid until the call returns. Returns the layers that shrank or
  /// were asked to for the first time, ascending; `retained(l)` says what each holds. Valid until the next
  /// call. Where the composition must see all layers first, none is returned and `finish` shrinks them.
  ///
  /// `reduce` as in `compress`; where scores are carried from layer to layer it gets this layer's part, of a
  /// blend first the layer's own scores, then those that are carried.
  ///
  /// Throws as `compress`, and where a layer comes out of order; it has then not arrived. Cost: that of the
  /// scorer and the allocator, and the rows that move; a float for each row kept, or two for each token.
  template <class Views, class O = NotGiven, class Reduce = NotGiven>
  std::span<const std::size_t> arrive(std::size_t layer, Views&& views, const O& observation = {},
                                      Reduce&& reduce = {}) {
    if constexpr (call::fits<call::arrive<P, Views, O, Reduce>>()) {
      state_.check_layer(layer);
      arrivals_.check_next(layer);
      detail::HeldViews<std::remove_cvref_t<decltype(views(layer))>> held_views(pass_.workspace(), layer + 1);
      const auto& kv = held_views.add(views(layer));
      pass_.see_all_rows(state_, layer, kv);
      const Scores<granularity> scores = this->scores(layer, kv, observation, reduce);
      const std::size_t longest = pass_.check_scores(state_, layer, scores);
      changed_.clear();
      changed_.reserve(state_.layers());
      state_.reset_next_capacities();
      over_layers_.arrive(pass_.input(state_, layer, kv, observation, held_bytes()), scores, reduce, state_,
                          pass_);
      if (layer < over_layers_.waiting_layers()) {
        end_arrival(scores);
        return changed_;
      }

      for (std::size_t l = 0; l < layer; ++l) {
        if (over_layers_.changes(l, layer, state_)) {
          pass_.see_all_rows(state_, l, held_views.add(views(l)));
          changed_.push_back(l);
        }
      }
      compaction_.start();
      pass_.select(state_, layer, scores, pass_.at_least_window(state_.next_capacities()[layer], longest));
      stage(layer, kv, kv, pass_.selection());
      const auto earlier = held_views.last(changed_.size());
      stage_changed(earlier);
      over_layers_.reserve(layer + 1, state_);

      // From here on nothing fails.
      commit_changed(earlier);
      commit_staged(layer, kv);
      state_.adopt_capacities();
      end_arrival(scores);
      changed_.push_back(layer);
    }
    return changed_;
  }

  /// Shows tokens that repeat a stretch of the context, for compositions that score it so (`score::KvZip`):
  /// after the prefill, for each stretch in order and each layer, before `finish`.
  ///
  /// `kv` views all rows announced and, behind them, those of the tokens fed since: a request to repeat the
  /// stretch, and its tokens once more. `queries` are the last of these. The engine takes them back before it
  /// feeds the next stretch; one that is fed in parts is shown in parts. May be called again for a stretch.
  /// `hidden_norms` has one number a query, for `score::KvZipPlus`: the length of the hidden state that the
  /// layer's attention was given for it, after the norm before attention.
  ///
  /// Throws as `compress`; the scores are then as they were. Cost: that of the scorer.
  template <class V, class O>
  void observe(std::size_t layer, const V& kv, Stretch stretch, const O& queries,
               std::span<const float> hidden_norms = {}) {
    if constexpr (call::fits<call::observe<P, V, O>>()) {
      state_.check_layer(layer);
      arrivals_.check_turn();
      over_layers_.observe(layer, kv, stretch, queries, hidden_norms, state_, pass_);
      arrivals_.look_on();
    }
  }

  /// Shrinks all layers of a composition that must see the whole model first, once each has arrived, or was
  /// shown repeats of the whole context. Returns all layers.
  ///
  /// Throws ArgumentError naming a layer that has not arrived, or whose view is not what it was.
  template <class Views>
  std::span<const std::size_t> finish(Views&& views) {
    if constexpr (call::fits<call::finish<P, Views>>()) {
      state_.check_layer(0);
      const std::size_t layers = state_.layers();
      if constexpr (sequence::ObservesRepeats<P>) {
        arrivals_.check_turn();
      } else {
        arrivals_.check_all(layers);
      }
      detail::HeldViews<std::remove_cvref_t<decltype(views(0))>> held_views(pass_.workspace(), layers);
      changed_.clear();
      changed_.reserve(layers);
      for (std::size_t l = 0; l < layers; ++l) {
        pass_.see_all_rows(state_, l, held_views.add(views(l)));
        changed_.push_back(l);
      }
      state_.reset_next_capacities();
      if constexpr (sequence::ObservesRepeats<P>) {
        over_layers_.choose(state_, pass_);
      }
      compaction_.start();
      stage_changed(held_views.last(layers));

      // From here on nothing fails.
      commit_changed(held_views.last(layers));
      arrivals_.end();
    }
    return changed_;
  }

  /// The layer's scores alone; they live in the compressor until its next call and may be changed (reduced).
  /// Throws as `compress`.
  template <class V, class O = NotGiven>
  requires(!KeylessObservation<V> ||
           !std::same_as<O, NotGiven>) Scores<granularity> score(std::size_t layer, const V& kv,
                                                                 const O& observation = {}) {
    if constexpr (call::fits<call::score<P, V, O>>()) {
      pass_.see(state_, layer, kv);
      return scores(layer, kv, observation, NotGiven{});
    }
    return {{}, {}, {}};
  }

  /// The same from attention alone, for engines that keep their cache elsewhere.
  template <KeylessObservation O>
  Scores<granularity> score(std::size_t layer, const O& attention) {
    if constexpr (call::fits<call::attention<P, O>>()) {
      pass_.see_attention(state_, layer, attention.tokens());
      return scores(layer, NotGiven{}, attention, NotGiven{});
    }
    return {{}, {}, {}};
  }

  /// Rows to keep, from scores of this layer as `score` filled them or as ranks reduced them; protected
  /// tokens are marked in the scores. Valid until the next call. Throws ScoreError on a score that is NaN or
  /// infinite, naming layer, row and token, and ArgumentError on scores of another shape, or where the
  /// capacity cannot hold all that is protected.
  const Selection& select(std::size_t layer, const Scores<granularity>& scores) {
    state_.check_layer(layer);
    const std::size_t longest = pass_.check_scores(state_, layer, scores);
    if constexpr (P::capacity_granularity == Granularity::kv_head) {
      pass_.select_by_head(state_, layer, scores);
    } else {
      pass_.select(state_, layer, scores, pass_.at_least_window(state_.capacities()[layer], longest));
    }
    return pass_.selection();
  }

  /// Rows to keep from attention alone, without any view: for engines whose cache lies on a device, and those
  /// that only append. Where no more rows than the capacity are shown, all stay. Throws as `score`.
  template <class O>
  requires(!std::convertible_to<const O&, Scores<granularity>>) const Selection& select(std::size_t layer,
                                                                                        const O& attention) {
    if constexpr (call::fits<call::attention<P, O>>()) {
      pass_.see_attention(state_, layer, attention.tokens());
      if (pass_.stays_whole(state_, layer)) {
        pass_.select_all();
      } else {
        select(layer, scores(layer, NotGiven{}, attention, NotGiven{}));
      }
    }
    return pass_.selection();
  }

  /// Moves the selected rows of `kv` to its first rows, in order, and forgets the others. The selection may
  /// come from elsewhere (another rank, a file). Throws ArgumentError before anything moves.
  template <class V, class R = Selection>
  const Retained& compact(std::size_t layer, const V& kv, const R& selection) {
    if constexpr (call::fits<call::compact<V, R>>()) {
      keep(layer, kv, kv, selection);
    }
    return state_.layer(layer);
  }

  /// As `compact`, to the first rows of another cache that has room; `source` is written only by what it
  /// shares.
  template <class V, class W, class R = Selection>
  const Retained& gather(std::size_t layer, const V& source, const R& selection, const W& target) {
    if constexpr (call::fits<call::gather<V, R, W>>()) {
      detail::check_view(target, plan().shape());
      keep(layer, source, target, selection);
    }
    return state_.layer(layer);
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
  /// kept key is read, turned and rounded to its element type once. Quantised keys are refused.
  template <class V, class R = kernel::Rotary>
  const Retained& rerotate(std::size_t layer, const V& kv, const R& rotary) {
    if constexpr (call::fits<call::rerotate<V, R>>()) {
      state_.check_layer(layer);
      detail::check_view(kv, plan().shape());
      state_.check_rows(layer, [&](std::size_t head) { return kv.rows(head); });
      over_layers_.check_turn(layer, arrivals_);
      sequence::turn_to_rows(state_, layer, kv, rotary, pass_.workspace(), pass_.executor());
    }
    return state_.layer(layer);
  }

  /// Writes what the sequence remembers to a stream, a `std::ostream` in binary: positions, tokens announced,
  /// capacities, protected tokens, and what tells it from the sequences of other plans: model shape, window,
  /// budget and `made`, whose method must not be empty. The engine saves the rows beside it, in order.
  ///
  /// Throws ArgumentError where `begin` was not called, and where a composition that reaches over layers is
  /// in the middle of a turn; FileError where the stream does not take it. Cost: 1.1 bits a position.
  template <class Out>
  void save(Out& out, const MadeWith& made) const {
    const sequence::Fingerprint fingerprint(plan().shape(), plan().scorer().window(),
                                            plan().allocator().budget(), made);
    state_.check_layer(0);
    if constexpr (P::reach != Reach::own_layer) {
      arrivals_.check_save(made.method);
    }
    sequence::SavedWriter saved;
    fingerprint.save(saved);
    state_.save(saved);
    sequence::write_saved(out, saved);
  }

  /// Takes up a sequence that was saved, in place of the one at hand: from here on every call gives what it
  /// would have given to the compressor that saved it, bit for bit. Reads its bytes of the stream, a
  /// `std::istream` in binary, and no more.
  ///
  /// Throws ArgumentError that says what differs where the sequence is that of another model, window, budget
  /// or `made`, FileError where its bytes are damaged, cut off or of another version. This object is then as
  /// it was. No more memory is taken than the stream holds, whatever its numbers say.
  template <class In>
  void load(In& in, const MadeWith& made) {
    const sequence::Fingerprint fingerprint(plan().shape(), plan().scorer().window(),
                                            plan().allocator().budget(), made);
    const std::string bytes = sequence::read_saved(in);
    sequence::SavedReader saved(bytes);
    fingerprint.check(saved);
    sequence::State state = state_.read(saved);
    saved.end();
    state_.adopt(std::move(state));
    arrivals_.end();
  }

  /// Bytes of scratch and of positions held by this compressor now.
  std::size_t memory_bytes() const {
    return state_.memory_bytes() + pass_.memory_bytes() + over_layers_.memory_bytes() +
           compaction_.memory_bytes();
  }

 private:
  const P& plan() const { return pass_.plan(); }

  /// Resolves the budget of a turn into `next_capacities`, and makes room for what travels.
  sequence::Turn prepare(std::size_t tokens) {
    const sequence::Turn turn{.tokens = tokens,
                              .per_layer = plan().resolve(tokens, state_.next_capacities()),
                              .layers = state_.layers(),
                              .score_rows = pass_.score_rows()};
    over_layers_.prepare(turn);
    return turn;
  }

  /// Bytes of the sequence beside the positions that every composition holds.
  std::size_t held_bytes() const {
    return over_layers_.held_bytes() + compaction_.held_bytes(pass_.score_rows(), pass_.longest());
  }

  template <class V, class O, class Reduce>
  Scores<granularity> scores(std::size_t layer, const V& kv, const O& observation, Reduce&& reduce) {
    const Scores<granularity> scores =
        pass_.score(state_, pass_.input(state_, layer, kv, observation, held_bytes()));
    pass_.reduce(scores, reduce);
    return scores;
  }

  template <class V, class W>
  void keep(std::size_t layer, const V& source, const W& target, const Selection& selection) {
    state_.check_layer(layer);
    over_layers_.check_cut(layer, arrivals_);
    stage(layer, source, target, selection);
    compaction_.commit(state_, layer, source, target, selection, pass_.workspace(), pass_.executor());
  }

  template <class V, class W>
  void stage(std::size_t layer, const V& source, const W& target, const Selection& selection) {
    compaction_.stage(state_, plan().shape(), layer, source, target, selection, pass_.workspace());
  }

  /// Selects and stages the layers of `changed_`, whose views are given, and makes room for the selections.
  template <class V>
  void stage_changed(std::span<const V> views) {
    for (std::size_t i = 0; i < views.size(); ++i) {
      const std::size_t layer = changed_[i];
      pass_.take_rows(views[i]);
      const std::size_t capacity = pass_.at_least_window(state_.next_capacities()[layer], pass_.longest());
      over_layers_.select_again(layer, capacity, state_, pass_);
      stage(layer, views[i], views[i], pass_.selection());
    }
    compaction_.reserve(pass_.selection(), plan().shape().kv_heads);
  }

  template <class V>
  void commit_changed(std::span<const V> views) noexcept {
    for (std::size_t i = 0; i < views.size(); ++i) {
      commit_staged(changed_[i], views[i]);
      over_layers_.keep(changed_[i], pass_.selection());
    }
  }

  template <class V>
  void commit_staged(std::size_t layer, const V& kv) noexcept {
    compaction_.commit_staged(state_, layer, kv, pass_.rows(), pass_.selection(), pass_.workspace(),
                              pass_.executor());
  }

  void end_arrival(const Scores<granularity>& scores) noexcept {
    over_layers_.end_arrival(scores, pass_.selection());
    arrivals_.add(P::reach == Reach::earlier_layers ? state_.layers() : state_.layers() + 1);
  }

  sequence::State state_;
  sequence::LayerPass<P, X> pass_;
  typename sequence::CrossLayerOf<P>::type over_layers_;
  sequence::Compaction compaction_;
  sequence::Arrivals arrivals_;
  std::vector<std::size_t> changed_;
};

template <class P, class X = SerialExecutor>
Compressor(const P&, X = X{}) -> Compressor<P, X>;

}  // namespace compresskv
