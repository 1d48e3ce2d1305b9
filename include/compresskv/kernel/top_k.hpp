#pragma once

#include <algorithm>
#include <cassert>
#include <cstddef>
#include <cstdint>
#include <span>

#include "compresskv/core/float_bits.hpp"

namespace compresskv::kernel {

/// Whether score `a` comes before score `b`: the higher one. A strict weak order of all floats, NaN too,
/// under any compiler flags; -0 equals 0.
struct Above {
  constexpr bool operator()(const float& a, const float& b) const {
    return compresskv::detail::ordered(a) > compresskv::detail::ordered(b);
  }
};

namespace detail {

/// Copies to `values` the scores that may be among the `count` highest and returns how many these are. A
/// sample gives a bound, and scores below it are left out; where fewer than `count` would remain, all scores
/// are copied.
inline std::size_t copy_candidates(std::span<const float> scores, std::size_t count,
                                   std::span<float> values) {
  constexpr std::size_t sampled = 512;
  if (count < scores.size() / 4 && scores.size() >= 8 * sampled) {
    const std::size_t step = scores.size() / sampled;
    for (std::size_t i = 0; i < sampled; ++i) {
      values[i] = scores[i * step];
    }
    // Half as many again as the sample should have, and 16 more: then few samples give too high a bound.
    const std::size_t rank = count * 3 / (step * 2) + 16;
    const auto pivot_at = values.begin() + static_cast<std::ptrdiff_t>(rank);
    std::nth_element(values.begin(), pivot_at, values.begin() + sampled, Above{});
    const std::int32_t pivot = compresskv::detail::ordered(*pivot_at);
    std::size_t candidates = 0;
    for (const float& score : scores) {
      values[candidates] = score;
      // No branch: it would be mispredicted.
      candidates += compresskv::detail::ordered(score) >= pivot ? 1U : 0U;
    }
    if (candidates >= count) {
      return candidates;
    }
  }
  std::copy(scores.begin(), scores.end(), values.begin());
  return scores.size();
}

}  // namespace detail

/// Indices of the `out.size()` highest scores, ascending; equal scores: the lower index wins.
///
/// NaN counts as beyond the infinity of its sign. `scratch` has room for all scores. Cost: linear on average,
/// no full sort; where a small share is chosen, two passes over all scores and some over what a sample
/// leaves.
inline void top_k(std::span<const float> scores, std::span<float> scratch, std::span<std::uint32_t> out) {
  using compresskv::detail::ordered;
  assert(out.size() <= scores.size() && scratch.size() >= scores.size());
  if (out.empty()) {
    return;
  }
  const std::span<float> values = scratch.first(detail::copy_candidates(scores, out.size(), scratch));
  const auto last_kept = values.begin() + static_cast<std::ptrdiff_t>(out.size()) - 1;
  std::nth_element(values.begin(), last_kept, values.end(), Above{});
  const std::int32_t threshold = ordered(*last_kept);
  const auto above = static_cast<std::size_t>(std::count_if(
      values.begin(), last_kept, [&](const float& score) { return ordered(score) > threshold; }));
  std::size_t equal = out.size() - above;
  std::size_t kept = 0;
  for (std::size_t t = 0; kept < out.size() && t < scores.size(); ++t) {
    const std::int32_t score = ordered(scores[t]);
    if (score > threshold || (score == threshold && equal > 0)) {
      equal -= score == threshold ? 1U : 0U;
      out[kept++] = static_cast<std::uint32_t>(t);
    }
  }
  assert(kept == out.size());
}

}  // namespace compresskv::kernel
