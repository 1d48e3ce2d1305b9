#pragma once

#include <algorithm>
#include <cassert>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>

namespace compresskv::kernel {

/// Indices of the `out.size()` highest scores, ascending; equal scores: the lower index wins.
///
/// Scores must not be NaN. `scratch` has room for all scores. Cost: linear on average, no full sort.
inline void top_k(std::span<const float> scores, std::span<float> scratch, std::span<std::uint32_t> out) {
  assert(out.size() <= scores.size() && scratch.size() >= scores.size());
  if (out.empty()) {
    return;
  }
  const std::span<float> values = scratch.first(scores.size());
  std::copy(scores.begin(), scores.end(), values.begin());
  const auto last_kept = values.begin() + static_cast<std::ptrdiff_t>(out.size()) - 1;
  std::nth_element(values.begin(), last_kept, values.end(), std::greater<>());
  const float threshold = *last_kept;
  const auto above = static_cast<std::size_t>(
      std::count_if(values.begin(), last_kept, [&](float score) { return score > threshold; }));
  std::size_t equal = out.size() - above;
  std::size_t kept = 0;
  for (std::size_t t = 0; kept < out.size(); ++t) {
    if (scores[t] > threshold || (scores[t] == threshold && equal > 0)) {
      equal -= scores[t] == threshold ? 1 : 0;
      out[kept++] = static_cast<std::uint32_t>(t);
    }
  }
}

}  // namespace compresskv::kernel
