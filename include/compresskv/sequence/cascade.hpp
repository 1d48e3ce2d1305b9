#pragma once

#include <algorithm>
#include <cstddef>
#include <numeric>
#include <span>
#include <vector>

#include "compresskv/core/error.hpp"
#include "compresskv/core/policy.hpp"
#include "compresskv/core/scores.hpp"
#include "compresskv/core/selection.hpp"
#include "compresskv/sequence/carried_scores.hpp"
#include "compresskv/sequence/cross_layer.hpp"
#include "compresskv/sequence/kept_scores.hpp"

namespace compresskv::sequence {

/// An allocator that shares rows out among the layers that have arrived: `preference(input, workspace,
/// executor)` weighs a layer, `cascade(preferences, least, total, capacities, most)` shares.
template <class P>
concept SharesAsLayersArrive = P::allocator_type::reach != Reach::own_layer;

/// Capacities of earlier layers shrink as later ones arrive (CAKE, `budget::Cake`): each layer's preference,
/// and the scores of the rows that it still holds. A layer that has been cut never grows again.
template <class P>
class Cascade {
  static constexpr Granularity granularity = P::scorer_type::granularity;

 public:
  explicit Cascade(const P& plan) : plan_(&plan) {}

  void prepare(const Turn& turn) {
    kept_scores_.reserve(scores_held(turn), turn.layers, turn.score_rows);
    preferences_.reserve(turn.layers);
    least_.reserve(turn.layers);
    most_.reserve(turn.layers);
  }
  void start(const Turn& turn) noexcept {
    turn_ = turn;
    kept_scores_.clear();
  }

  std::size_t held_bytes() const { return scores_held(turn_) * sizeof(float); }
  std::size_t waiting_layers() const { return 0; }

  /// Shares the rows out among the layers that have arrived, this one among them.
  template <class Input, class Reduce, class Pass>
  void arrive(const Input& in, const Scores<granularity>& scores, Reduce&& /*reduce*/, State& state,
              Pass& pass) {
    preferences_.resize(in.layer);
    preferences_.push_back(plan_->allocator().preference(in, pass.workspace(), pass.executor()));
    least_.resize(in.layer);
    least_.push_back(0);
    for (std::size_t row = 0; row < scores.rows(); ++row) {
      least_.back() = (std::max)(
          least_.back(), scores.window(row) + state.protected_tokens().count(in.retained, scores, row));
    }
    state.next_capacities()[in.layer] = pass.longest();
    const auto arrived = state.next_capacities().first(in.layer + 1);
    most_.resize(arrived.size());
    plan_->allocator().cascade(preferences_, least_,
                               (std::min)(turn_.per_layer * turn_.layers,
                                          std::accumulate(arrived.begin(), arrived.end(), std::size_t{0})),
                               arrived, most_);
  }

  bool changes(std::size_t layer, std::size_t /*arriving*/, const State& state) const {
    return state.next_capacities()[layer] < state.capacities()[layer];
  }

  /// What is protected was marked in the scores when the layer arrived.
  template <class Pass>
  void select_again(std::size_t layer, std::size_t capacity, const State& /*state*/, Pass& pass) {
    pass.select_by(kept_scores_.template of<granularity>(layer), capacity);
  }

  void reserve(std::size_t layers, const State& state) {
    const auto kept = state.next_capacities().first(layers);
    kept_scores_.reserve(std::accumulate(kept.begin(), kept.end(), std::size_t{0}) * turn_.score_rows, layers,
                         turn_.score_rows);
  }
  void keep(std::size_t layer, const Selection& selection) noexcept { kept_scores_.keep(layer, selection); }
  void end_arrival(const Scores<granularity>& scores, const Selection& selection) noexcept {
    kept_scores_.settle();
    kept_scores_.append(scores, selection);
  }

  void check_cut(std::size_t layer, const Arrivals& arrivals) const {
    detail::require(!arrivals.under_way() || layer >= arrivals.arrived(), "layer ", layer,
                    " may shrink again as later layers arrive: change its rows after the last one");
  }
  void check_turn(std::size_t /*layer*/, const Arrivals& /*arrivals*/) const {}
  void check_turned() const {}

  std::size_t memory_bytes() const { return kept_scores_.memory_bytes(); }

 private:
  /// Scores of all rows that are kept.
  static std::size_t scores_held(const Turn& turn) { return turn.per_layer * turn.layers * turn.score_rows; }

  const P* plan_;
  Turn turn_;
  std::vector<double> preferences_;  // [layer that has arrived]
  std::vector<std::size_t> least_;   // the same, rows of its window and of what is protected
  std::vector<std::size_t> most_;
  KeptScores kept_scores_;
};

template <class P>
requires(SharesAsLayersArrive<P> && !CarriesScores<P>) struct CrossLayerOf<P> {
  using type = Cascade<P>;
};

}  // namespace compresskv::sequence
