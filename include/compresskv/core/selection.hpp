#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "compresskv/core/error.hpp"

namespace compresskv {

namespace detail {

/// Rows before it stay where they are when a cache is compacted in place.
inline std::size_t first_moved(std::span<const std::uint32_t> rows) {
  std::size_t first = 0;
  while (first < rows.size() && rows[first] == first) {
    ++first;
  }
  return first;
}

}  // namespace detail

/// Which rows of a layer's cache stay. A value: it may come from another rank, another engine or a file, and
/// be given to `Compressor::compact`.
class Selection {
 public:
  Selection() = default;

  /// The same rows for every KV head.
  static Selection shared_by_heads(std::span<const std::uint32_t> rows) {
    Selection selection;
    const auto list = selection.assign_shared(rows.size());
    std::copy(rows.begin(), rows.end(), list.begin());
    return selection;
  }

  /// One list for each KV head; lengths may differ.
  static Selection per_head(std::span<const std::vector<std::uint32_t>> heads) {
    Selection selection;
    selection.assign_per_head(0);
    for (const auto& rows : heads) {
      const auto list = selection.append_head(rows.size());
      std::copy(rows.begin(), rows.end(), list.begin());
    }
    return selection;
  }

  /// Throws ArgumentError unless every list ascends, keeps at least one row, and stays below the rows of its
  /// KV head, which `rows_of(kv_head)` gives.
  template <class RowsOf>
  void validate(std::size_t kv_heads, RowsOf&& rows_of) const {
    detail::require(shared() || lists() == kv_heads, "selection has lists for ", lists(),
                    " KV heads, the layer has ", kv_heads, ": give one shared list or one a head");
    for (std::size_t head = 0; head < kv_heads; ++head) {
      const auto list = rows(head);
      const std::size_t available = rows_of(head);
      detail::require(!list.empty(), "selection keeps no row of KV head ", head, ": keep at least one");
      for (std::size_t i = 1; i < list.size(); ++i) {
        detail::require(list[i] > list[i - 1], "selection of KV head ", head, " has row ", list[i],
                        " after row ", list[i - 1], ": rows must ascend, each once");
      }
      detail::require(list.back() < available, "selection of KV head ", head, " keeps row ", list.back(),
                      ", the cache has rows 0 to ", available - 1, ": select from the cache as it stands");
    }
  }

  /// Whether one list serves all KV heads.
  bool shared() const { return shared_; }
  /// Lists held: 1 when shared, else one a KV head.
  std::size_t lists() const { return ends_.size(); }

  /// The list of one KV head.
  std::span<const std::uint32_t> rows(std::size_t kv_head = 0) const {
    const std::size_t list = shared_ ? 0 : kv_head;
    const std::size_t begin = list == 0 ? 0 : ends_[list - 1];
    return std::span(values_).subspan(begin, ends_[list] - begin);
  }

  /// Makes this one shared list of `count` rows, to be filled ascending by the caller. Keeps its memory.
  std::span<std::uint32_t> assign_shared(std::size_t count) {
    shared_ = true;
    ends_.assign(1, count);
    values_.resize(count);
    return values_;
  }

  /// Makes this an empty set of lists, one for each KV head, to be filled by `append_head`, with room for
  /// `total` rows in all. Keeps its memory.
  void assign_per_head(std::size_t total) {
    shared_ = false;
    ends_.clear();
    values_.clear();
    values_.reserve(total);
  }

  /// Adds the next KV head's list of `count` rows, to be filled ascending by the caller.
  std::span<std::uint32_t> append_head(std::size_t count) {
    const std::size_t begin = values_.size();
    values_.resize(begin + count);
    ends_.push_back(values_.size());
    return std::span(values_).subspan(begin);
  }

  /// Makes room for `total` rows in `lists` lists, so that filling them does not allocate.
  void reserve(std::size_t total, std::size_t lists) {
    values_.reserve(total);
    ends_.reserve(lists);
  }

  std::size_t memory_bytes() const {
    return values_.capacity() * sizeof(std::uint32_t) + ends_.capacity() * sizeof(std::size_t);
  }

  friend bool operator==(const Selection&, const Selection&) = default;

 private:
  bool shared_ = true;
  std::vector<std::uint32_t> values_;
  std::vector<std::size_t> ends_ = {0};  // [list], where each list ends in values_
};

}  // namespace compresskv
