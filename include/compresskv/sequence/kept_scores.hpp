#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "compresskv/core/scores.hpp"
#include "compresskv/core/selection.hpp"

namespace compresskv::sequence {

/// Scores of the evictable rows that each layer still holds, for when it must shrink again: one array for all
/// layers, as what a layer held when it arrived is much more than what it holds in the end.
class KeptScores {
 public:
  /// Makes room for `count` scores of `layers` layers of `rows` rows each, so that adding them neither
  /// allocates nor holds an old array beside a new one.
  void reserve(std::size_t count, std::size_t layers, std::size_t rows) {
    values_.reserve(count);
    layers_.reserve(layers);
    ends_.reserve(layers * rows);
    windows_.reserve(layers * rows);
  }

  /// Forgets all layers. Keeps its memory.
  void clear() {
    values_.clear();
    layers_.clear();
    ends_.clear();
    windows_.clear();
  }

  /// Adds the next layer: those of `scores` whose rows `selection` keeps. Does not throw where room was made.
  template <Granularity G>
  void append(const Scores<G>& scores, const Selection& selection) {
    const std::size_t begin = values_.size();
    layers_.push_back({.begin = begin, .first_row = ends_.size(), .rows = scores.rows()});
    for (std::size_t row = 0; row < scores.rows(); ++row) {
      for (const std::uint32_t kept : selection.rows(row)) {
        if (kept < scores.tokens(row)) {
          values_.push_back(scores.row(row)[kept]);
        }
      }
      ends_.push_back(values_.size() - begin);
      windows_.push_back(scores.window(row));
    }
  }

  /// A layer's scores, valid until the next change.
  template <Granularity G>
  Scores<G> of(std::size_t layer) {
    const Layer& own = layers_[layer];
    const std::span<const std::size_t> ends = std::span(ends_).subspan(own.first_row, own.rows);
    return {std::span(values_).subspan(own.begin, ends.back()), ends,
            std::span(windows_).subspan(own.first_row, own.rows)};
  }

  /// Drops those of a layer whose rows `selection` does not keep. `settle` closes the gaps.
  void keep(std::size_t layer, const Selection& selection) {
    const Layer& own = layers_[layer];
    std::size_t out = own.begin;
    std::size_t begin = 0;
    for (std::size_t row = 0; row < own.rows; ++row) {
      std::size_t& end = ends_[own.first_row + row];
      for (const std::uint32_t kept : selection.rows(row)) {
        if (begin + kept < end) {
          values_[out++] = values_[own.begin + begin + kept];
        }
      }
      begin = end;
      end = out - own.begin;
    }
  }

  void settle() {
    std::size_t out = 0;
    for (Layer& layer : layers_) {
      const std::size_t count = ends_[layer.first_row + layer.rows - 1];
      std::copy_n(values_.begin() + static_cast<std::ptrdiff_t>(layer.begin), count,
                  values_.begin() + static_cast<std::ptrdiff_t>(out));
      layer.begin = out;
      out += count;
    }
    values_.resize(out);
  }

  std::size_t memory_bytes() const {
    return values_.capacity() * sizeof(float) +
           (ends_.capacity() + windows_.capacity()) * sizeof(std::size_t) +
           layers_.capacity() * sizeof(Layer);
  }

 private:
  struct Layer {
    std::size_t begin = 0;      // of its scores in values_
    std::size_t first_row = 0;  // in ends_ and windows_
    std::size_t rows = 0;       // of scores
  };

  std::vector<float> values_;
  std::vector<Layer> layers_;
  std::vector<std::size_t> ends_;     // [layer][row of scores], where each row ends behind the layer's begin
  std::vector<std::size_t> windows_;  // [layer][row of scores]
};

}  // namespace compresskv::sequence
