#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <utility>
#include <vector>

#include "compresskv/core/error.hpp"
#include "compresskv/core/positions.hpp"
#include "compresskv/core/protection.hpp"
#include "compresskv/core/retained.hpp"
#include "compresskv/sequence/protected_tokens.hpp"
#include "compresskv/sequence/saved_bytes.hpp"

namespace compresskv::sequence {

/// What a sequence remembers, whatever method chooses: which token stands in which row of each layer, how
/// many tokens were announced, what each layer may keep, and the tokens that must stay.
///
/// A turn is prepared first, which may throw, and then started, which does not.
class State {
 public:
  /// Each layer has `capacities_a_layer`: 1, or one a KV head.
  State(std::size_t layers, std::size_t kv_heads, std::size_t capacities_a_layer = 1)
      : layers_(layers), kv_heads_(kv_heads), capacities_a_layer_(capacities_a_layer) {}

  std::size_t layers() const { return layers_.size(); }
  Retained& layer(std::size_t index) { return layers_[index]; }
  const Retained& layer(std::size_t index) const { return layers_[index]; }
  const ProtectedTokens& protected_tokens() const { return protected_; }

  /// [layer] or [layer][kv_head], rows that each may keep, window included; empty before the first turn.
  std::span<const std::size_t> capacities() const { return capacities_; }
  /// Those of a layer.
  std::span<const std::size_t> capacities_of(std::size_t index) const {
    return capacities().subspan(index * capacities_a_layer_, capacities_a_layer_);
  }
  /// Those of a call under way, to be written; `adopt_capacities` makes them what holds.
  std::span<std::size_t> next_capacities() { return next_capacities_; }
  std::span<const std::size_t> next_capacities() const { return next_capacities_; }
  void reset_next_capacities() { next_capacities_.assign(capacities_.begin(), capacities_.end()); }
  void adopt_capacities() noexcept { capacities_.assign(next_capacities_.begin(), next_capacities_.end()); }

  /// Checks what a turn of `tokens` tokens is told and makes room for it. `next_capacities` are then
  /// `tokens` each. Throws ArgumentError.
  void prepare(const char* name, std::size_t tokens, const Protection& protection) {
    detail::require(tokens > 0, name, " is 0: a prompt has at least one token");
    detail::require(tokens <= (std::numeric_limits<std::uint32_t>::max)(), name, " is ", tokens,
                    ", the most is ", (std::numeric_limits<std::uint32_t>::max)(),
                    ": positions are held in 32 bits");
    protected_.prepare(tokens, protection);
    next_capacities_.assign(layers_.size() * capacities_a_layer_, tokens);
    capacities_.reserve(next_capacities_.size());
  }

  /// As `prepare`, for a new sequence.
  void prepare_sequence(std::size_t tokens, const Protection& protection) {
    prepare("prompt_tokens", tokens, protection);
    for (Retained& layer : layers_) {
      layer.reserve_whole(tokens);
    }
  }

  /// As `prepare`, for one that goes on. Throws also where tokens that were seen are not counted.
  void prepare_turn(std::size_t tokens, const Protection& protection) {
    detail::require(!capacities_.empty(),
                    "begin() was not called: a sequence starts with begin(), not begin_turn()");
    check_same_position("begin_turn");
    for (std::size_t l = 0; l < layers_.size(); ++l) {
      const std::size_t known = layers_[l].next_position_;
      detail::require(tokens >= known, "total_tokens is ", tokens, ", layer ", l, " has seen ", known,
                      " tokens: count all tokens of the sequence; truncate() takes tokens back");
    }
    prepare("total_tokens", tokens, protection);
  }

  void start_sequence(std::size_t tokens, const Protection& protection) noexcept {
    start(tokens, protection);
    for (Retained& layer : layers_) {
      layer.assign_whole(tokens);
      layer.bytes_freed_ = 0;
    }
    turned_ = false;
  }

  void start_turn(std::size_t tokens, const Protection& protection) noexcept {
    start(tokens, protection);
    for (Retained& layer : layers_) {
      layer.announced_ = tokens;
    }
  }

  /// Takes back all tokens from `position` on. Throws ArgumentError for position 0.
  void truncate(std::size_t position) {
    check_layer(0);
    check_same_position("truncate");
    detail::require(position > 0,
                    "truncate position is 0: nothing would be left; begin() starts a new sequence");
    for (Retained& layer : layers_) {
      layer.truncate(position);
    }
  }

  Held held(std::size_t tokens) const {
    check_layer(0);
    check_same_position("held");
    return {layers_, tokens};
  }

  /// Makes room for `turn`, which then does not throw.
  void reserve_whole(std::size_t index, std::size_t rows) { layers_[index].reserve_whole(rows); }
  /// A layer's keys were turned to their row indices, `rows` in each KV head: it goes on at its row count.
  void turn(std::size_t index, std::size_t rows) {
    Retained& layer = layers_[index];
    const std::size_t unseen = layer.rows_before(layer.announced_) - rows;
    layer.assign_whole(rows);
    layer.announced_ += unseen;
    turned_ = true;
  }
  /// Whether keys of this sequence were turned: positions are no longer those of the tokens.
  bool turned() const { return turned_; }

  void check_layer(std::size_t index) const {
    detail::require(!capacities_.empty(), "begin() was not called: call it with the prompt's length first");
    detail::require(index < layers_.size(), "layer is ", index, ", the model has layers 0 to ",
                    layers_.size() - 1);
  }

  /// A layer holds the rows that the last compression left and those appended since, as many in each KV head
  /// and at most one a token announced. `rows_of(kv_head)` gives what is shown.
  template <class RowsOf>
  void check_rows(std::size_t index, RowsOf&& rows_of) const {
    const Retained& known = layers_[index];
    for (std::size_t head = 0; head < kv_heads_; ++head) {
      const std::size_t rows = rows_of(head);
      const std::size_t kept = known.rows(head);
      detail::require(rows >= kept, "layer ", index, " KV head ", head, " has ", rows,
                      " rows, expected at least ", kept,
                      ": view all rows of the prompt that begin() announced and those appended since");
      detail::require(rows - kept == rows_of(0) - known.rows(0), "layer ", index, " KV head ", head, " has ",
                      rows - kept, " rows appended, KV head 0 has ", rows_of(0) - known.rows(0),
                      ": append every token to all heads");
    }
    check_announced(index, rows_of);
  }

  /// The second half of it: what is shown by attention or scores alone may be of a cache that has evicted
  /// rows unseen.
  template <class RowsOf>
  void check_announced(std::size_t index, RowsOf&& rows_of) const {
    const Retained& known = layers_[index];
    const std::size_t open = known.announced_ - known.next_position_;
    for (std::size_t head = 0; head < kv_heads_; ++head) {
      const std::size_t most = known.rows(head) + open;
      detail::require(
          rows_of(head) <= most, "layer ", index, " KV head ", head, " has ", rows_of(head),
          " rows, expected at most ", most, ": it held ", known.rows(head), ", and ", open, " of the ",
          known.announced_,
          " tokens announced are still to come; shorten the cache to retained(layer).rows(kv_head) after "
          "each compression, and announce new tokens by begin_turn()");
    }
  }

  /// A layer that takes part in choosing for others holds all that was announced: its scores are those rows'.
  template <class RowsOf>
  void check_all_rows(std::size_t index, RowsOf&& rows_of) const {
    for (std::size_t head = 0; head < kv_heads_; ++head) {
      const std::size_t expected = layers_[index].rows_before(layers_[index].announced_, head);
      detail::require(rows_of(head) == expected, "layer ", index, " KV head ", head, " has ", rows_of(head),
                      " rows, expected the ", expected, " that it holds of the prompt: view all of them");
    }
  }

  /// Writes down all of it. A turn must have started.
  void save(SavedWriter& out) const {
    check_layer(0);
    out.number(turned_ ? 1 : 0, 1);
    protected_.save(out);
    for (std::size_t l = 0; l < layers_.size(); ++l) {
      const Retained& layer = layers_[l];
      for (const std::size_t capacity : capacities_of(l)) {
        out.number(capacity);
      }
      out.number(layer.announced_, 4);
      out.number(layer.next_position_, 4);
      out.number(layer.bytes_freed_);
      out.number(layer.shared() ? 1 : 0, 1);
      for (std::size_t list = 0; list < layer.lists_; ++list) {
        save(layer.sets_[list], out);
      }
    }
  }
  /// The state of the same model that was saved, checked: nothing that a sequence could not have come to.
  /// Throws FileError.
  State read(SavedReader& in) const {
    State read(layers_.size(), kv_heads_, capacities_a_layer_);
    read.turned_ = in.flag("rotation");
    read.protected_ = ProtectedTokens::read(in);
    read.capacities_.resize(layers_.size() * capacities_a_layer_);
    for (std::size_t l = 0; l < layers_.size(); ++l) {
      Retained& layer = read.layers_[l];
      for (std::size_t i = 0; i < capacities_a_layer_; ++i) {
        read.capacities_[l * capacities_a_layer_ + i] = in.number("capacities");
      }
      layer.announced_ = in.number("tokens", 4);
      layer.next_position_ = in.number("next position", 4);
      layer.bytes_freed_ = in.number("bytes freed");
      const bool shared = in.flag("shared positions");
      layer.lists_ = shared ? 1 : kv_heads_;
      require_saved(shared || kv_heads_ > 1, "layer ", l,
                    " has one KV head that shares its positions with none: it is damaged");
      require_saved(layer.next_position_ <= layer.announced_, "layer ", l, " has seen ", layer.next_position_,
                    " tokens of ", layer.announced_, ": it is damaged");
      require_saved(read.turned_ || layer.announced_ == read.layers_[0].announced_, "layer ", l, " has ",
                    layer.announced_, " tokens, layer 0 ", read.layers_[0].announced_, ": it is damaged");
      layer.sets_.resize(layer.lists_);
      for (PositionSet& set : layer.sets_) {
        set = positions(layer.next_position_, in);
      }
    }
    return read;
  }
  /// Becomes what was read; references to layers stay valid.
  void adopt(State&& read) noexcept {
    std::move(read.layers_.begin(), read.layers_.end(), layers_.begin());
    capacities_ = std::move(read.capacities_);
    protected_ = std::move(read.protected_);
    turned_ = read.turned_;
  }

  std::size_t memory_bytes() const {
    std::size_t total = protected_.memory_bytes();
    for (const Retained& layer : layers_) {
      total += layer.memory_bytes();
    }
    return total;
  }

 private:
  /// A set of positions as it is held, without what is empty behind its last member.
  static void save(const PositionSet& set, SavedWriter& out) {
    auto words = set.words();
    while (!words.empty() && words.back() == 0) {
      words = words.first(words.size() - 1);
    }
    out.number(words.size());
    for (const std::uint64_t word : words) {
      out.number(word);
    }
  }
  static PositionSet positions(std::size_t end, SavedReader& in) {
    std::vector<std::uint64_t> words(in.count("positions", 8));
    for (std::uint64_t& word : words) {
      word = in.number("positions");
    }
    require_saved(words.empty() || words.back() != 0, "its positions end in nothing: it is damaged");
    const std::size_t behind_last =
        words.empty() ? 0 : words.size() * 64 - static_cast<std::size_t>(std::countl_zero(words.back()));
    require_saved(behind_last <= end, "has a row at position ", behind_last - 1, ", the layer has seen ", end,
                  " tokens: it is damaged");
    PositionSet set;
    set.assign_words(std::move(words));
    return set;
  }

  void start(std::size_t tokens, const Protection& protection) noexcept {
    adopt_capacities();
    protected_.start(tokens, protection);
  }

  /// Layers that were not turned go on where the sequence does.
  void check_same_position(const char* call) const {
    for (std::size_t l = 1; l < layers_.size(); ++l) {
      const std::size_t position = layers_[l].announced_;
      detail::require(position == layers_[0].announced_, call, "() finds that layer ", l,
                      " goes on at position ", position, ", layer 0 at ", layers_[0].announced_,
                      " since rerotate(): turn all layers, each to equally many rows (a uniform budget)");
    }
  }

  std::vector<Retained> layers_;
  std::size_t kv_heads_;
  std::size_t capacities_a_layer_;
  std::vector<std::size_t> capacities_;
  std::vector<std::size_t> next_capacities_;
  ProtectedTokens protected_;
  bool turned_ = false;
};

}  // namespace compresskv::sequence
