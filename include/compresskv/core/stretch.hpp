#pragma once

#include <cstddef>

namespace compresskv {

/// Tokens of a sequence that follow one another: positions `first` up to `last`, which is not among them.
struct Stretch {
  std::size_t first = 0;
  std::size_t last = 0;
};

}  // namespace compresskv
