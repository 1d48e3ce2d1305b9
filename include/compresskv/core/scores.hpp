#pragma once

#include <cstddef>
#include <span>

#include "compresskv/core/policy.hpp"

namespace compresskv {

/// Scores of one layer, float32 `[row][token]`: a row is the layer or a KV head, a token one evictable row of
/// the cache (all rows but the window). Higher means keep. A view of the compressor's memory, valid until its
/// next call.
///
/// Rows differ in length where KV heads hold different numbers of rows; a head with fewer rows than the
/// window has no evictable token, and its window is as short as it is. Writable on purpose: tensor-parallel
/// ranks add their values here before they select.
template <Granularity G>
class Scores {
 public:
  static constexpr Granularity granularity = G;

  /// `ends[row]` is where a row ends in `values`, `windows[row]` what `window(row)` says.
  Scores(std::span<float> values, std::span<const std::size_t> ends, std::span<const std::size_t> windows)
      : values_(values), ends_(ends), windows_(windows) {}

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
  std::size_t window(std::size_t index = 0) const { return windows_[index]; }
  /// Rows of the cache that a row of scores stands for, S.
  std::size_t cached(std::size_t index = 0) const { return tokens(index) + window(index); }

  /// The same scores where the granularity is known only when the program runs.
  template <Granularity F>
  Scores<F> as() const {
    return {values_, ends_, windows_};
  }

 private:
  std::span<float> values_;
  std::span<const std::size_t> ends_;
  std::span<const std::size_t> windows_;
};

}  // namespace compresskv
