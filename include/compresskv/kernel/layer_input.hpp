#pragma once

#include <algorithm>
#include <cstddef>
#include <span>

#include "compresskv/core/retained.hpp"
#include "compresskv/core/shape.hpp"

namespace compresskv::kernel {

/// What a scorer is shown of one layer. `Kv` is a `KvView`, or anything where the keys are not needed;
/// `Observed` likewise.
template <class Kv, class Observed>
struct LayerInput {
  const ModelShape& shape;
  std::size_t layer = 0;
  std::span<const std::size_t> rows;  ///< [kv_head], rows of the cache now
  std::size_t window = 0;    ///< queries that observe and are kept; a KV head has no more than its rows
  const Retained& retained;  ///< true positions of the rows
  const Kv& kv;
  const Observed& observation;
  std::size_t held_bytes = 0;  ///< of the sequence, beside its positions: they count towards the 1 %
  std::span<const float> hidden_norms = {};  ///< [observing query], see `Compressor::observe`; or empty

  /// Rows that may go: none where a KV head is shorter than the window.
  std::size_t evictable(std::size_t kv_head) const {
    return rows[kv_head] - (std::min)(window, rows[kv_head]);
  }
};

}  // namespace compresskv::kernel
