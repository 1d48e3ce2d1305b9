#pragma once

#include <algorithm>
#include <cassert>
#include <cstddef>
#include <cstdint>
#include <numeric>

#include "compresskv/kernel/top_k.hpp"
#include "compresskv/select/selector.hpp"

namespace compresskv::select {

/// The `capacity - w` highest scores and the whole window, one set of rows for all KV heads of the layer.
///
///     row   0 ............................ S-w ......... S
///           | evictable: the best stay    | window: stays |
///
/// CompressKV's rule (docs/method.md 4.1). Equal scores: the lower position. Cost: linear in S.
class SharedTopK {
 public:
  static constexpr Reach reach = Reach::own_layer;
  static constexpr bool accepts(Granularity granularity) { return granularity == Granularity::layer; }

  /// `capacity` is at least the window; where it exceeds all rows, all stay.
  void select(const Scores<Granularity::layer>& scores, std::size_t capacity, Workspace& workspace,
              Selection& selection) const {
    const std::size_t window = scores.window();
    assert(capacity >= window);
    const std::size_t kept = (std::min)(capacity - window, scores.tokens());
    const auto rows = selection.assign_shared(kept + window);
    kernel::top_k(scores.row(0), workspace.take(Workspace::Slot::logits, scores.tokens()), rows.first(kept));
    std::iota(rows.end() - static_cast<std::ptrdiff_t>(window), rows.end(),
              static_cast<std::uint32_t>(scores.tokens()));
  }
};

}  // namespace compresskv::select
