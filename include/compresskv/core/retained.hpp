#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "compresskv/core/error.hpp"
#include "compresskv/core/positions.hpp"

namespace compresskv {

namespace sequence {
class State;
class Compaction;
}  // namespace sequence

/// What a layer's cache held when it was last compressed (or begun, or truncated). Row is not position: kept
/// keys carry the rotation of their true position, and the sequence went on at `next_position()`, not at the
/// row count.
///
/// Rows that the engine has appended since stand at `next_position()`, +1, ... and are not counted here:
/// `Compressor::held(tokens)` counts them. Owned by the compressor; a reference stays valid until the same
/// layer changes.
class Retained {
 public:
  /// Rows that the last compression left; throws ArgumentError where KV heads differ (ask `rows(kv_head)`).
  std::size_t rows() const {
    for (std::size_t head = 1; head < lists_; ++head) {
      detail::require(rows(head) == rows(0), "KV head ", head, " keeps ", rows(head), " rows, KV head 0 ",
                      rows(0), ": ask rows(kv_head)");
    }
    return rows(0);
  }
  std::size_t rows(std::size_t kv_head) const { return positions(kv_head).size(); }

  /// Whether KV heads share one set of positions.
  bool shared() const { return lists_ == 1; }
  /// Sets of positions: 1 where KV heads share one, else one a KV head.
  std::size_t lists() const { return lists_; }

  /// True positions of the rows, ascending: `for (std::uint32_t position : kept.positions(kv_head))`.
  /// Throws ArgumentError for a KV head that is not there.
  const PositionSet& positions(std::size_t kv_head = 0) const {
    detail::require(shared() || kv_head < lists_, "kv_head is ", kv_head, ", the layer has KV heads 0 to ",
                    lists_ - 1);
    return sets_[shared() ? 0 : kv_head];
  }

  /// Position of a row; rows beyond `rows(kv_head)` are those that the engine appended since.
  std::size_t position(std::size_t row, std::size_t kv_head = 0) const {
    const PositionSet& known = positions(kv_head);
    return row < known.size() ? known[row] : next_position_ + (row - known.size());
  }

  /// Row of a position, or nothing where it was evicted or lies ahead.
  std::optional<std::size_t> row(std::size_t position, std::size_t kv_head = 0) const {
    return positions(kv_head).row(position);
  }

  /// Rows at positions below `position`, those appended since included: the row that a token at `position`
  /// has or would have.
  std::size_t rows_before(std::size_t position, std::size_t kv_head = 0) const {
    return positions(kv_head).rows_before(position) +
           (position > next_position_ ? position - next_position_ : 0);
  }

  /// Positions of rows asked for in ascending order, each step as cheap as the rows passed.
  class Cursor {
   public:
    /// Position of `row`, which is not below the row asked before.
    std::size_t seek(std::size_t row) {
      if (row >= known_) {
        return next_position_ + (row - known_);
      }
      at_.seek(row);
      return *at_;
    }

   private:
    friend class Retained;
    Cursor(const PositionSet& set, std::size_t next_position)
        : at_(set.begin()), known_(set.size()), next_position_(next_position) {}
    PositionSet::Iterator at_;
    std::size_t known_;
    std::size_t next_position_;
  };
  Cursor cursor(std::size_t kv_head = 0) const { return {positions(kv_head), next_position_}; }

  /// Position of the token that came next when the layer was last compressed.
  std::size_t next_position() const { return next_position_; }

  /// Bytes of keys and values that the last compression left unused behind the rows; the engine frees them.
  std::size_t bytes_freed() const { return bytes_freed_; }

 private:
  friend class sequence::State;
  friend class sequence::Compaction;

  /// All of positions 0 .. `tokens` - 1; does not throw after `reserve_whole(tokens)`.
  void assign_whole(std::size_t tokens) {
    lists_ = 1;
    sets_[0].clear();
    sets_[0].append(0, tokens);
    next_position_ = tokens;
    announced_ = tokens;
  }
  void reserve_whole(std::size_t tokens) { sets_[0].reserve(tokens); }

  void truncate(std::size_t position) {
    if (position < next_position_) {
      for (std::size_t list = 0; list < lists_; ++list) {
        sets_[list].truncate(position);
      }
      next_position_ = position;
    }
    announced_ = (std::min)(announced_, position);
  }

  std::size_t memory_bytes() const {
    std::size_t total = sets_.capacity() * sizeof(PositionSet);
    for (const PositionSet& set : sets_) {
      total += set.memory_bytes();
    }
    return total;
  }

  std::vector<PositionSet> sets_ = std::vector<PositionSet>(1);  // the first lists_ are in use
  std::size_t lists_ = 1;                                        // 1: shared by all KV heads, else one a head
  std::size_t next_position_ = 0;
  std::size_t announced_ =
      0;  // tokens that begin() or begin_turn() told of: the engine may append up to here
  std::size_t bytes_freed_ = 0;
};

/// What the cache holds when the sequence has `tokens` tokens, those that the engine appended since the last
/// compression included: what an engine shortens its cache to. Valid until the compressor changes.
class Held {
 public:
  Held(std::span<const Retained> layers, std::size_t tokens) : layers_(layers), tokens_(tokens) {}

  /// Rows of a layer; throws ArgumentError where KV heads differ (ask `rows(layer, kv_head)`).
  std::size_t rows(std::size_t layer) const {
    for (std::size_t head = 1; head < at(layer).lists(); ++head) {
      detail::require(rows(layer, head) == rows(layer, 0), "KV head ", head, " of layer ", layer, " holds ",
                      rows(layer, head), " rows, KV head 0 ", rows(layer, 0), ": ask rows(layer, kv_head)");
    }
    return rows(layer, 0);
  }
  std::size_t rows(std::size_t layer, std::size_t kv_head) const {
    return at(layer).rows_before(tokens_, kv_head);
  }

  /// Where the sequence goes on: position of the token that comes next.
  std::size_t next_position() const { return tokens_; }

 private:
  const Retained& at(std::size_t layer) const {
    detail::require(layer < layers_.size(), "layer is ", layer, ", the model has layers 0 to ",
                    layers_.size() - 1);
    return layers_[layer];
  }

  std::span<const Retained> layers_;
  std::size_t tokens_;
};

}  // namespace compresskv
