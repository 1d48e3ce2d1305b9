#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "compresskv/core/policy.hpp"
#include "compresskv/core/retained.hpp"
#include "compresskv/core/scores.hpp"
#include "compresskv/core/workspace.hpp"
#include "compresskv/kernel/top_k.hpp"
#include "compresskv/sequence/state.hpp"

namespace compresskv::sequence {

/// What each layer's own scores would keep, best first, held until the layer is cut by them and by scores of
/// other layers (`score::BlendedRetrieval`): more rows than the layer may keep are never asked for, so no
/// scores are held. Layers that are cut as they arrive take one place in turn, those that wait one each.
class OwnShare {
 public:
  /// Makes room for `rows` rows in `places` places, of layers of at most `tokens` rows.
  void prepare(std::size_t rows, std::size_t places, std::size_t tokens) {
    units_.reserve(rows * units_of(tokens));
    best_.reserve(rows / places + 1);
    ends_.reserve(places);
  }
  /// Takes up what was prepared. Does not throw.
  void start(std::size_t tokens) noexcept {
    units_a_row_ = units_of(tokens);
    ends_.clear();
  }
  /// Bytes of so many rows.
  std::size_t bytes(std::size_t rows) const { return rows * units_a_row_ * sizeof(std::uint16_t); }

  /// The `count` best rows of a layer; what was held from its place on is forgotten. May throw, and the layer
  /// then comes again.
  void hold(std::size_t place, std::span<const float> scores, std::size_t count, Workspace& workspace) {
    ends_.resize(place, 0);
    const std::size_t begin = begin_of(place);
    best_.resize(count);
    kernel::top_k(scores, workspace.take(Workspace::Slot::logits, scores.size()), best_);
    std::sort(best_.begin(), best_.end(), [&](std::uint32_t a, std::uint32_t b) {
      const kernel::Above above;
      return above(scores[a], scores[b]) || (!above(scores[b], scores[a]) && a < b);
    });
    units_.resize((begin + count) * units_a_row_);
    for (std::size_t i = 0; i < count; ++i) {
      for (std::size_t unit = 0; unit < units_a_row_; ++unit) {
        units_[(begin + i) * units_a_row_ + unit] = static_cast<std::uint16_t>(best_[i] >> (16 * unit));
      }
    }
    ends_.push_back(begin + count);
  }

  /// `scores` of other layers become scores by which a selector takes the sinks and what is protected, the
  /// share of these scores, and of the rest what the layer's own scores place first. Throws ArgumentError
  /// where the capacity cannot hold what is protected.
  void mix(std::size_t layer, std::size_t place, const Scores<Granularity::layer>& scores,
           std::size_t capacity, std::size_t sinks, double share, const State& state, Workspace& workspace) {
    constexpr float certain = (std::numeric_limits<float>::max)();
    const std::span<float> row = scores.row(0);
    const std::size_t room = capacity - scores.window();
    if (room >= row.size()) {
      return;  // all stay
    }
    const Retained& known = state.layer(layer);
    state.protected_tokens().mark(layer, known, scores, capacity);
    std::size_t first = state.protected_tokens().count(known, scores, 0);
    Retained::Cursor positions = known.cursor();
    for (std::size_t t = 0; t < row.size() && first < room && positions.seek(t) < sinks; ++t) {
      first += row[t] == certain ? 0U : 1U;
      row[t] = certain;
    }
    first += static_cast<std::size_t>(std::lround(share * static_cast<double>(room - first)));
    best_.resize(first);
    kernel::top_k(row, workspace.take(Workspace::Slot::logits, row.size()), best_);
    std::fill(row.begin(), row.end(), 0.0F);
    for (std::size_t i = begin_of(place); i < ends_[place]; ++i) {
      row[row_at(i)] = static_cast<float>(ends_[place] - i);
    }
    for (const std::uint32_t chosen : best_) {
      row[chosen] = certain;
    }
  }

  std::size_t memory_bytes() const {
    return units_.capacity() * sizeof(std::uint16_t) + best_.capacity() * sizeof(std::uint32_t) +
           ends_.capacity() * sizeof(std::size_t);
  }

 private:
  /// Units of 16 bits that hold a row's number: two only where a sequence has more than 65,536 tokens, as all
  /// layers' rows are what weighs most.
  static std::size_t units_of(std::size_t tokens) { return tokens > 0x10000 ? 2 : 1; }
  std::size_t begin_of(std::size_t place) const { return place == 0 ? 0 : ends_[place - 1]; }
  std::uint32_t row_at(std::size_t index) const {
    const std::uint32_t low = units_[index * units_a_row_];
    return units_a_row_ == 1 ? low : low | std::uint32_t{units_[index * 2 + 1]} << 16U;
  }

  std::size_t units_a_row_ = 1;
  std::vector<std::uint16_t> units_;  // rows, place after place, best first
  std::vector<std::size_t> ends_;     // [place], in rows
  std::vector<std::uint32_t> best_;   // of the layer at hand
};

}  // namespace compresskv::sequence
