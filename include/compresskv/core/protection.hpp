#pragma once

#include <cstddef>
#include <cstdint>

#include "compresskv/core/borrowed.hpp"

namespace compresskv {

/// Tokens that no selection may evict, beside the window: a system prompt, the tokens of an image. They count
/// towards the capacity; a layer too small for them is an error.
struct Protection {
  std::size_t keep_first = 0;                    ///< positions 0 .. keep_first - 1
  std::size_t keep_last = 0;                     ///< the last so many positions, where more than the window
  Borrowed<const std::uint32_t> positions = {};  ///< any others, ascending; copied by begin()
};

}  // namespace compresskv
