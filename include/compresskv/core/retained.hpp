#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "compresskv/core/error.hpp"
#include "compresskv/core/selection.hpp"

namespace compresskv {

/// What a layer's cache holds now. Row is not position: kept keys carry the rotation of their true position,
/// and the sequence goes on at `next_position()`, not at the row count.
///
/// Rows that the engine appends later stand at `next_position()`, +1, ... Owned by the compressor; a
/// reference stays valid until the same layer changes.
class Retained {
 public:
  /// Rows of the layer now; throws ArgumentError where KV heads differ (ask `rows(kv_head)`).
  std::size_t rows() const {
    for (std::size_t head = 1; !whole_ && head < lists_.lists(); ++head) {
      detail::require(rows(head) == rows(0), "KV head ", head, " keeps ", rows(head), " rows, KV head 0 ",
                      rows(0), ": ask rows(kv_head)");
    }
    return rows(0);
  }
  std::size_t rows(std::size_t kv_head) const { return positions(kv_head).size(); }

  /// Whether KV heads share one list of positions.
  bool shared() const { return whole_ || lists_.shared(); }

  /// True positions of the rows, ascending.
  std::span<const std::uint32_t> positions(std::size_t kv_head = 0) const {
    return whole_ ? std::span(*all_positions_).first(whole_rows_) : lists_.rows(kv_head);
  }

  /// Position of a row; rows beyond `rows(kv_head)` are those that the engine appended since.
  std::size_t position(std::size_t row, std::size_t kv_head = 0) const {
    const auto known = positions(kv_head);
    return row < known.size() ? known[row] : next_position_ + (row - known.size());
  }

  /// Row of a position, or nothing where it was evicted or lies ahead.
  std::optional<std::size_t> row(std::size_t position, std::size_t kv_head = 0) const {
    const auto known = positions(kv_head);
    const auto found = std::lower_bound(known.begin(), known.end(), position);
    if (found == known.end() || *found != position) {
      return std::nullopt;
    }
    return static_cast<std::size_t>(found - known.begin());
  }

  /// Position of the token that comes next.
  std::size_t next_position() const { return next_position_; }

  /// Bytes of keys and values that the last compression left unused behind the rows; the engine frees them.
  std::size_t bytes_freed() const { return bytes_freed_; }

 private:
  template <class, class>
  friend class Compressor;

  void truncate(std::size_t position) {
    if (position < next_position_) {
      whole_rows_ = std::min(whole_rows_, position);
      lists_.truncate(static_cast<std::uint32_t>(position));
      next_position_ = position;
    }
  }

  // Layers left whole share one list 0, 1, 2, ...: thirty lists of a long prompt would exceed the memory
  // promise.
  bool whole_ = true;
  std::size_t whole_rows_ = 0;
  std::shared_ptr<const std::vector<std::uint32_t>> all_positions_ =
      std::make_shared<const std::vector<std::uint32_t>>();
  HeadLists lists_;
  std::size_t next_position_ = 0;
  std::size_t bytes_freed_ = 0;
};

}  // namespace compresskv
