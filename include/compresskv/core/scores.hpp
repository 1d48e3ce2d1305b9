#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "compresskv/core/policy.hpp"
#include "compresskv/core/selection.hpp"

namespace compresskv {

/// Scores of one layer, float32 `[row][token]`: a row is the layer or a KV head, a token one evictable row of
/// the cache (all rows but the window). Higher means keep. A view of the compressor's memory, valid until its
/// next call.
///
/// Rows differ in length where KV heads hold different numbers of rows.
/// Writable on purpose: tensor-parallel ranks add their values here before they select.
template <Granularity G>
class Scores {
 public:
  static constexpr Granularity granularity = G;

  /// `ends[row]` is where a row ends in `values`.
  Scores(std::span<float> values, std::span<const std::size_t> ends, std::size_t window)
      : values_(values), ends_(ends), window_(window) {}

  /// All values, row after row.
  std::span<float> values() const { return values_; }
  std::span<float> row(std::size_t index) const {
    const std::size_t begin = index == 0 ? 0 : ends_[index - 1];
    return values_.subspan(begin, ends_[index] - begin);
  }
  std::size_t rows() const { return ends_.size(); }
  /// Evictable tokens of a row, S - w.
  std::size_t tokens(std::size_t index = 0) const { return row(index).size(); }
  /// Rows of the cache behind the evictable ones, which are kept whatever the scores.
  std::size_t window() const { return window_; }

 private:
  std::span<float> values_;
  std::span<const std::size_t> ends_;
  std::size_t window_;
};

namespace detail {

/// Scores of the evictable rows that a layer still holds, for when it must shrink again.
struct KeptScores {
  std::vector<float> values;
  std::vector<std::size_t> ends;  // [row of scores]
  std::size_t window = 0;

  /// Those of `scores` whose rows `selection` keeps.
  template <Granularity G>
  void assign_selected(const Scores<G>& scores, const Selection& selection) {
    window = scores.window();
    ends.clear();
    values.clear();
    for (std::size_t row = 0; row < scores.rows(); ++row) {
      for (const std::uint32_t kept : selection.rows(row)) {
        if (kept < scores.tokens(row)) {
          values.push_back(scores.row(row)[kept]);
        }
      }
      ends.push_back(values.size());
    }
  }

  /// Drops those whose rows `selection` does not keep.
  void keep_selected(const Selection& selection) {
    std::size_t out = 0;
    std::size_t begin = 0;
    for (std::size_t row = 0; row < ends.size(); ++row) {
      const std::size_t end = ends[row];
      for (const std::uint32_t kept : selection.rows(row)) {
        if (begin + kept < end) {
          values[out++] = values[begin + kept];
        }
      }
      begin = end;
      ends[row] = out;
    }
    values.resize(out);
  }

  std::size_t memory_bytes() const {
    return values.capacity() * sizeof(float) + ends.capacity() * sizeof(std::size_t);
  }
};

}  // namespace detail
}  // namespace compresskv
