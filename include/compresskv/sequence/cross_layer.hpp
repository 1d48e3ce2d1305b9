#pragma once

#include <concepts>
#include <cstddef>

#include "compresskv/core/error.hpp"
#include "compresskv/core/scores.hpp"
#include "compresskv/core/selection.hpp"
#include "compresskv/sequence/arrivals.hpp"
#include "compresskv/sequence/state.hpp"

namespace compresskv::sequence {

/// A turn that starts.
struct Turn {
  std::size_t tokens = 0;      ///< of the sequence by now
  std::size_t per_layer = 0;   ///< p, mean rows a layer
  std::size_t layers = 0;      ///< L
  std::size_t score_rows = 0;  ///< rows of a layer's scores
};

/// What travels between the layers of a turn: state that a composition holds, and what it does with each
/// layer that arrives. A new kind is one header of this folder: a class with these members, and the plans
/// that take it, a specialisation of `CrossLayerOf`.
///
/// | member | meaning |
/// | --- | --- |
/// | `prepare(turn)`, `start(turn)` | makes room for a turn, may throw; takes it up, does not |
/// | `held_bytes()` | bytes that it holds at most in this turn: they count towards the 1 % |
/// | `waiting_layers()` | the first layers that only look on, until the one after them has arrived |
/// | `arrive(input, scores, reduce, state, pass)` | a layer has arrived; may throw, and it then arrives again
/// | | `changes(layer, arriving, state)` | whether an earlier layer is cut (again) now | |
/// `select_again(layer, capacity, state, pass)` | chooses rows of an earlier layer, seen by `pass` | |
/// `reserve(layers, state)` | makes room for what `keep` and `end_arrival` write; may throw | | `keep(layer,
/// selection)` | an earlier layer was cut; does not throw | | `end_arrival(scores, selection)` | the arrival
/// holds, the new layer was cut; does not throw | | `check_cut(layer, arrivals)` | throws where the engine
/// must not yet change the rows of a layer | | `check_turn(layer, arrivals)` | throws where it must not yet
/// turn its keys | | `check_turned()` | throws where a turn needs true positions, which `rerotate` gave up |
///
/// `arrive` may change the scores and `state.next_capacities()`; scores that it makes itself it reduces.
/// `select_again` may take the memory of the scores that arrived: `end_arrival` of the same kind then does
/// not read them. A layer that waits is not cut.
template <class C>
concept CrossLayer = requires(C& over, const Turn& turn, State& state, const Arrivals& arrivals,
                              std::size_t layer, const Selection& rows) {
  over.prepare(turn);
  { over.start(turn) }
  noexcept;
  { over.held_bytes() } -> std::same_as<std::size_t>;
  { over.waiting_layers() } -> std::same_as<std::size_t>;
  { over.changes(layer, layer, state) } -> std::same_as<bool>;
  over.reserve(layer, state);
  { over.keep(layer, rows) }
  noexcept;
  over.check_cut(layer, arrivals);
  over.check_turn(layer, arrivals);
  over.check_turned();
  { over.memory_bytes() } -> std::same_as<std::size_t>;
};

/// Nothing travels: each layer is cut on its own.
struct OwnLayer {
  explicit OwnLayer(const auto& /*plan*/) {}
  void arrive(const auto& /*input*/, const auto& /*scores*/, auto&& /*reduce*/, State&, auto& /*pass*/) {}
  void select_again(std::size_t layer, std::size_t, const State&, auto& /*pass*/) {
    detail::fail<ArgumentError>("layer ", layer,
                                " has no scores to be chosen by again: a composition that must see "
                                "the whole model needs a scorer with decay()");
  }
  void end_arrival(const auto& /*scores*/, const Selection&) noexcept {}
  void prepare(const Turn&) {}
  void start(const Turn&) noexcept {}
  std::size_t held_bytes() const { return 0; }
  std::size_t waiting_layers() const { return 0; }
  bool changes(std::size_t, std::size_t, const State&) const { return false; }
  void reserve(std::size_t, const State&) {}
  void keep(std::size_t, const Selection&) noexcept {}
  void check_cut(std::size_t, const Arrivals&) const {}
  void check_turn(std::size_t, const Arrivals&) const {}
  void check_turned() const {}
  std::size_t memory_bytes() const { return 0; }
};
/// The kind that plan `P` takes.
template <class P>
struct CrossLayerOf {
  using type = OwnLayer;
};

}  // namespace compresskv::sequence
