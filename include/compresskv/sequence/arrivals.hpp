#pragma once

#include <cstddef>
#include <string_view>

#include "compresskv/core/error.hpp"

namespace compresskv::sequence {

/// Which layers of a turn have arrived: they do so in order, each once.
class Arrivals {
 public:
  void start() noexcept {
    arrived_ = 0;
    over_ = false;
  }
  /// No layer is awaited until the next turn.
  void end() noexcept { over_ = true; }
  /// Layers are shown, none of which arrives: `finish` is awaited.
  void look_on() noexcept { arrived_ = 1; }
  /// One more; with the `last`-th none is awaited any more.
  void add(std::size_t last) noexcept {
    ++arrived_;
    over_ = arrived_ == last;
  }

  std::size_t arrived() const { return arrived_; }
  /// Whether some layers have arrived and others, or `finish`, are awaited.
  bool under_way() const { return arrived_ > 0 && !over_; }

  void check_turn() const {
    detail::require(
        !over_,
        "the layers of this turn have all arrived: begin_turn() starts the next turn, begin() the "
        "next sequence");
  }
  /// Between turns alone, where nothing travels.
  void check_save(std::string_view method) const {
    detail::require(over_, "method ", method,
                    " is in the middle of a turn: save() comes once the last layer has arrived, or after "
                    "finish()");
  }
  void check_next(std::size_t layer) const {
    check_turn();
    detail::require(layer == arrived_, "layer ", layer, " arrives, expected layer ", arrived_,
                    ": layers arrive in order, each once");
  }
  void check_all(std::size_t layers) const {
    check_turn();
    detail::require(arrived_ == layers, "layer ", arrived_, " has not arrived: finish() wants all ", layers,
                    " layers of the model");
  }

 private:
  std::size_t arrived_ = 0;
  bool over_ = false;
};

}  // namespace compresskv::sequence
