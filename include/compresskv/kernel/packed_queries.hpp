#pragma once

#include <cstddef>

#include "compresskv/core/strict_float_begin.hpp"

namespace compresskv::kernel {

/// Queries of a panel, whose elements are interleaved: with two elements each they fill the widest register
/// in use.
inline constexpr std::size_t queries_per_panel = 8;

/// Queries packed for the dot products: panel after panel, in each of them step after step, and a step is two
/// elements of each query. Elements 2s and 2s + 1 of query q are at
/// `data[((q / queries_per_panel) * steps() + s) * floats_per_step + q % queries_per_panel * 2]`. What fills
/// the last panel and the last step up is zeros.
///
/// A query is then two lanes of a register. Two elements of a key, broadcast, meet all queries of the
/// register: one load serves the products of two elements, and no sum runs across a register until the end.
///
/// With `bf16_pairs`, two bfloat16 elements take the place of one float.
struct PackedQueries {
  static constexpr std::size_t floats_per_step = 2 * queries_per_panel;

  const float* data = nullptr;
  std::size_t count = 0;
  std::size_t head_dim = 0;
  bool bf16_pairs = false;

  /// Steps of a query of so many floats.
  static constexpr std::size_t steps(std::size_t floats) { return (floats + 1) / 2; }
  std::size_t steps() const { return steps(bf16_pairs ? head_dim / 2 : head_dim); }

  /// Floats that `data` has for `count` queries of so many floats.
  static constexpr std::size_t size(std::size_t count, std::size_t floats) {
    return (count + queries_per_panel - 1) / queries_per_panel * steps(floats) * floats_per_step;
  }
  /// Writes query `q` to its lanes of `data`.
  static void pack(std::size_t q, const float* query, std::size_t floats, float* data) {
    float* lanes =
        data + (q / queries_per_panel * steps(floats) * queries_per_panel + q % queries_per_panel) * 2;
    for (std::size_t e = 0; e < floats; ++e) {
      lanes[e / 2 * floats_per_step + e % 2] = query[e];
    }
  }
};

}  // namespace compresskv::kernel

#include "compresskv/core/strict_float_end.hpp"
