#pragma once

#include <algorithm>
#include <cstddef>
#include <span>
#include <vector>

#include "compresskv/core/error.hpp"
#include "compresskv/core/float_mode.hpp"
#include "compresskv/core/policy.hpp"
#include "compresskv/core/retained.hpp"
#include "compresskv/core/scores.hpp"
#include "compresskv/core/strict_float_begin.hpp"
#include "compresskv/kernel/fused.hpp"
#include "compresskv/sequence/cross_layer.hpp"
#include "compresskv/sequence/own_share.hpp"

namespace compresskv::sequence {

/// A scorer whose scores go on to the layers after it: `decay()` is what is left of them one layer later.
template <class P>
concept CarriesScores = requires(const P& plan) {
  plan.scorer().decay();
};

/// One of those that keeps a share of each layer's rows by the layer's own scores: `shared()` makes those
/// that go on.
template <class P>
concept BlendsScores = CarriesScores<P> && requires(const P& plan) {
  plan.scorer().shared();
};

/// Scores that travel from layer to layer by position: `score::Carried`, `score::ModelWide` and their blends.
/// A layer's own become `decay * what came + own`, and go on. Two floats are held for each token of the
/// sequence, and of a blend the numbers of the rows that layers may keep: those that wait, and one more.
///
/// Layers that wait (the first `hold_layers()` of the scorer, or all where it must see the whole model) are
/// chosen by what has been carried when they are cut.
template <class P>
class CarriedScores {
  using S = typename P::scorer_type;

 public:
  static_assert(S::granularity == Granularity::layer,
                "carried scores are those of a layer, not of its KV heads");
  static_assert(P::allocator_type::reach == Reach::own_layer,
                "scores and budgets cannot both go from layer to layer: choose budgets that are known before "
                "the first layer");

  explicit CarriedScores(const P& plan) : plan_(&plan) {}

  void prepare(const Turn& turn) {
    by_position_.reserve(turn.tokens);
    next_.reserve(turn.tokens);
    if constexpr (BlendsScores<P>) {
      own_share_.prepare(rows_held(turn), places(), turn.tokens);
    }
  }
  void start(const Turn& turn) noexcept {
    by_position_.assign(turn.tokens, 0.0F);
    next_.assign(turn.tokens, 0.0F);
    rows_held_ = rows_held(turn);
    own_share_.start(turn.tokens);
  }

  std::size_t held_bytes() const {
    return 2 * by_position_.size() * sizeof(float) + own_share_.bytes(rows_held_);
  }
  std::size_t waiting_layers() const {
    const std::size_t layers = plan_->shape().layers;
    if constexpr (P::reach == Reach::all_layers) {
      return layers;
    } else if constexpr (requires { plan_->scorer().hold_layers(); }) {
      return (std::min)(plan_->scorer().hold_layers(), layers - 1);
    } else {
      return 0;
    }
  }

  template <class Input, class Reduce, class Pass>
  void arrive(const Input& in, const Scores<Granularity::layer>& scores, Reduce&& reduce, State& state,
              Pass& pass) {
    const std::size_t capacity = pass.at_least_window(state.next_capacities()[in.layer], pass.longest());
    if constexpr (BlendsScores<P>) {
      own_share_.hold(place_of(in.layer), scores.row(0),
                      (std::min)(capacity - scores.window(), scores.tokens()), pass.workspace());
      plan_->scorer().shared().score(in, pass.workspace(), pass.executor(), scores);
      pass.reduce(scores, reduce);
      pass.check_scores(state, in.layer, scores);
    }
    const detail::PlainFloats plain;
    const float decay = plan_->scorer().decay();
    std::transform(by_position_.begin(), by_position_.end(), next_.begin(),
                   [&](float score) { return decay * score; });
    const std::span<float> own = scores.row(0);
    Retained::Cursor positions = in.retained.cursor();
    for (std::size_t t = 0; t < own.size(); ++t) {
      const std::size_t position = positions.seek(t);
      own[t] = kernel::fused(decay, by_position_[position], own[t]);
      next_[position] = own[t];
    }
    if (in.layer >= waiting_layers()) {
      mix(in.layer, scores, capacity, state, pass);
    }
  }

  /// Those that wait are cut when the first that does not has come.
  bool changes(std::size_t /*layer*/, std::size_t arriving, const State& /*state*/) const {
    return arriving == waiting_layers();
  }

  template <class Pass>
  void select_again(std::size_t layer, std::size_t capacity, const State& state, Pass& pass) {
    const Scores<Granularity::layer> scores = pass.take_scores();
    const std::span<float> own = scores.row(0);
    Retained::Cursor positions = state.layer(layer).cursor();
    for (std::size_t t = 0; t < own.size(); ++t) {
      own[t] = next_[positions.seek(t)];
    }
    mix(layer, scores, capacity, state, pass);
    pass.select(state, layer, scores, capacity);
  }

  void reserve(std::size_t /*layers*/, const State& /*state*/) {}
  void keep(std::size_t /*layer*/, const Selection& /*selection*/) noexcept {}
  void end_arrival(const Scores<Granularity::layer>& /*scores*/, const Selection& /*selection*/) noexcept {
    std::copy(next_.begin(), next_.end(), by_position_.begin());
  }

  void check_cut(std::size_t /*layer*/, const Arrivals& /*arrivals*/) const {}
  void check_turn(std::size_t layer, const Arrivals& arrivals) const {
    const bool chosen = layer < arrivals.arrived() && arrivals.arrived() > waiting_layers();
    detail::require(chosen || !arrivals.under_way(), "layer ", layer,
                    " is still to be chosen from by position: rerotate() it after the last layer");
  }
  void check_turned() const {
    detail::fail<ArgumentError>(
        "scores are carried from layer to layer by true positions, which rerotate() gave up: begin() starts "
        "a new sequence");
  }

  std::size_t memory_bytes() const {
    return (by_position_.capacity() + next_.capacity()) * sizeof(float) + own_share_.memory_bytes();
  }

 private:
  /// Where a blend holds a layer's own share: layers that do not wait share the last place.
  std::size_t place_of(std::size_t layer) const { return (std::min)(layer, waiting_layers()); }
  std::size_t places() const { return place_of(plan_->shape().layers - 1) + 1; }
  std::size_t rows_held(const Turn& turn) const {
    return BlendsScores<P> ? (std::min)(turn.per_layer, turn.tokens) * places() : 0;
  }

  /// A blend's share of the layer's own.
  template <class Pass>
  void mix(std::size_t layer, const Scores<Granularity::layer>& scores, std::size_t capacity,
           const State& state, Pass& pass) {
    if constexpr (BlendsScores<P>) {
      const auto& shares = plan_->scorer().shares();
      own_share_.mix(layer, place_of(layer), scores, capacity, shares.sinks, shares.model_share, state,
                     pass.workspace());
    }
  }

  const P* plan_;
  std::vector<float> by_position_;  // of the layers that have arrived
  std::vector<float> next_;         // and of one that arrives; the same between calls that went through
  OwnShare own_share_;              // of a blend
  std::size_t rows_held_ = 0;
};

template <CarriesScores P>
struct CrossLayerOf<P> {
  using type = CarriedScores<P>;
};

}  // namespace compresskv::sequence

#include "compresskv/core/strict_float_end.hpp"
