#pragma once

#include <cstddef>
#include <span>

#include "compresskv/core/policy.hpp"

namespace compresskv {

/// Scores of one layer, float32 `[row][token]`: a row is the layer or a KV head, a token one evictable row of
/// the cache (all rows but the window). Higher means keep. A view of the compressor's memory, valid until its
/// next call.
///
/// Writable on purpose: tensor-parallel ranks add their values here before they select.
template <Granularity G>
class Scores {
 public:
  static constexpr Granularity granularity = G;

  Scores(std::span<float> values, std::size_t rows, std::size_t window)
      : values_(values), rows_(rows), window_(window) {}

  /// All values, `rows() * tokens()` of them.
  std::span<float> values() const { return values_; }
  std::span<float> row(std::size_t index) const { return values_.subspan(index * tokens(), tokens()); }
  std::size_t rows() const { return rows_; }
  /// Evictable tokens, S - w.
  std::size_t tokens() const { return values_.size() / rows_; }
  /// Rows of the cache behind the evictable ones, which are kept whatever the scores.
  std::size_t window() const { return window_; }

 private:
  std::span<float> values_;
  std::size_t rows_;
  std::size_t window_;
};

}  // namespace compresskv
