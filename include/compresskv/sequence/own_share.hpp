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
  /// Makes room for `rows` rows in `places` places.
  void prepare(std::size_t rows, std::size_t places) {
    rows_.reserve(rows);
    ends_.reserve(places);
  }

  /// The `count` best rows of a layer; what was held from its place on is forgotten. May throw, and the layer
  /// then comes again.
  void hold(std::size_t place, std::span<const float> scores, std::size_t count, Workspace& workspace) {
    ends_.resize(place, 0);
    const std::size_t begin = begin_of(place);
    rows_.resize(begin + count);
    const std::span<std::uint32_t> best = std::span(rows_).subspan(begin);
    kernel::top_k(scores, workspace.take(Workspace::Slot::logits, scores.size()), best);
    std::sort(best.begin(), best.end(), [&](std::uint32_t a, std::uint32_t b) {
      const kernel::Above above;
      return above(scores[a], scores[b]) || (!above(scores[b], scores[a]) && a < b);
    });
    ends_.push_back(rows_.size());
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
    first_.resize(first);
    kernel::top_k(row, workspace.take(Workspace::Slot::logits, row.size()), first_);
    std::fill(row.begin(), row.end(), 0.0F);
    for (std::size_t i = begin_of(place); i < ends_[place]; ++i) {
      row[rows_[i]] = static_cast<float>(ends_[place] - i);
    }
    for (const std::uint32_t chosen : first_) {
      row[chosen] = certain;
    }
  }

  std::size_t memory_bytes() const {
    return (rows_.capacity() + first_.capacity()) * sizeof(std::uint32_t) +
           ends_.capacity() * sizeof(std::size_t);
  }

 private:
  std::size_t begin_of(std::size_t place) const { return place == 0 ? 0 : ends_[place - 1]; }

  std::vector<std::uint32_t> rows_;   // place after place, best first
  std::vector<std::size_t> ends_;     // [place], in rows_
  std::vector<std::uint32_t> first_;  // of the layer that is mixed
};

}  // namespace compresskv::sequence
