#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <span>

#include "compresskv/core/shape.hpp"
#include "compresskv/core/strict_float_begin.hpp"
#include "compresskv/kernel/layer_input.hpp"
#include "compresskv/kernel/logits.hpp"
#include "compresskv/view/kv_view.hpp"
#include "compresskv/view/observation.hpp"

namespace compresskv::kernel {

namespace detail {

/// Tokens of a tile, which is what a task takes: 1024 keys of 128 bfloat16 are a quarter of a megabyte, so a
/// task's keys stay in the second-level cache.
inline constexpr std::size_t tokens_per_tile = 1024;

/// Tiles of so many rows, the last of them perhaps not whole.
constexpr std::size_t tile_count(std::size_t rows) { return (rows + tokens_per_tile - 1) / tokens_per_tile; }

/// Floats from one query's logits to the next: an odd number of cache lines, so that the queries do not
/// compete for the same few cache sets. Without padding, sixteen queries of 32,768 tokens take 1.14 times as
/// long.
constexpr std::size_t logits_stride(std::size_t rows) { return ((rows + 15) / 16 | 1U) * 16; }

/// How many heads of one KV head a group has, and how many of their queries have their logits in memory at a
/// time. All extra memory stays within 1 % of the model's cache: whole heads where at least one fits, else
/// some of one head's queries, and one query in any case.
struct GroupSize {
  std::size_t heads = 1;
  std::size_t queries_per_pass = 1;  ///< of all these heads
};

/// Floats that a layer's scorer may hold for itself. `key_buffer` is how many floats each tile has for its
/// keys.
inline std::size_t spare_floats(const ModelShape& shape, std::size_t row_bytes, std::size_t rows,
                                std::size_t key_buffer, std::size_t held_bytes) {
  // A twentieth of the 1 % is for what does not grow with the rows.
  const std::size_t allowed = rows * shape.layers * shape.kv_heads * row_bytes / 2000 * 19;
  // Scores and selection of each KV head, one head's pooled scores, 1.1 bits of position for each row, KV
  // head and layer, the decoded keys of each tile, and what the sequence holds.
  const std::size_t others = (2 * shape.kv_heads + 1) * rows * sizeof(float) +
                             (shape.layers + 1) * shape.kv_heads * rows * 11 / 80 +
                             tile_count(rows) * key_buffer * sizeof(float) + held_bytes;
  return allowed <= others ? 0 : (allowed - others) / sizeof(float);
}

/// `sums` is how many arrays of one float a row each head has beside its logits; the rest as `spare_floats`.
inline GroupSize group_size(const ModelShape& shape, std::size_t row_bytes, std::size_t rows,
                            std::size_t window, std::size_t sums, std::size_t key_buffer,
                            std::size_t held_bytes) {
  const std::size_t arrays =
      spare_floats(shape, row_bytes, rows, key_buffer, held_bytes) / logits_stride(rows);
  const std::size_t heads = arrays / (window + sums);
  if (heads > 0) {
    return {.heads = heads, .queries_per_pass = heads * window};
  }
  return {.queries_per_pass = arrays < sums + 1 ? 1 : arrays - sums};
}

/// Calls `per_group(heads, observers, queries_per_pass)` for group after group of `heads`. A group is heads
/// of one KV head, as many as fit (`GroupSize`). Heads whose KV head has no evictable row are left out; a KV
/// head with fewer rows than `observers` has that many observers.
template <class Kv, class O, class PerGroup>
void for_head_groups(const LayerInput<Kv, O>& in, std::span<const std::uint32_t> heads, std::size_t observers,
                     std::size_t sums, PerGroup&& per_group) {
  for (std::size_t first = 0; first < heads.size();) {
    const std::size_t kv_head = heads[first] / in.shape.group();
    if (in.evictable(kv_head) == 0) {
      ++first;
      continue;
    }
    const std::size_t own = (std::min)(observers, in.rows[kv_head]);
    GroupSize size;
    if constexpr (QueryObservation<O>) {
      size = group_size(in.shape, kv_row_bytes(in.kv), in.rows[kv_head], own, sums,
                        key_buffer_size(key_kind(in.kv), in.shape.head_dim), in.held_bytes);
    }
    std::size_t last = first + 1;
    while (last < heads.size() && last - first < size.heads && heads[last] / in.shape.group() == kv_head) {
      ++last;
    }
    per_group(heads.subspan(first, last - first), own, size.queries_per_pass);
    first = last;
  }
}

}  // namespace detail

/// Calls `run(heads)` with all query heads of the model, ascending, some at a time: for methods that do not
/// choose heads.
template <class Run>
void for_all_heads(const ModelShape& shape, Run&& run) {
  std::array<std::uint32_t, 64> heads;
  for (std::size_t first = 0; first < shape.query_heads; first += heads.size()) {
    const std::size_t count = (std::min)(heads.size(), shape.query_heads - first);
    std::iota(heads.begin(), heads.begin() + static_cast<std::ptrdiff_t>(count),
              static_cast<std::uint32_t>(first));
    run(std::span<const std::uint32_t>(heads).first(count));
  }
}

}  // namespace compresskv::kernel

#include "compresskv/core/strict_float_end.hpp"
