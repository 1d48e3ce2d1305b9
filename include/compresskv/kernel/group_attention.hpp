#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>

#include "compresskv/core/executor.hpp"
#include "compresskv/core/float_bits.hpp"
#include "compresskv/core/float_mode.hpp"
#include "compresskv/core/strict_float_begin.hpp"
#include "compresskv/core/workspace.hpp"
#include "compresskv/kernel/attention_tiles.hpp"
#include "compresskv/kernel/decode_row.hpp"
#include "compresskv/kernel/finite_checks.hpp"
#include "compresskv/kernel/head_groups.hpp"
#include "compresskv/kernel/layer_input.hpp"
#include "compresskv/kernel/logits.hpp"
#include "compresskv/kernel/pooling.hpp"
#include "compresskv/kernel/softmax.hpp"
#include "compresskv/view/kv_view.hpp"
#include "compresskv/view/observation.hpp"

namespace compresskv::kernel {

namespace detail {

/// Most tasks whose scratch memory does not grow with the rows: each takes a stretch of the rows.
inline constexpr std::size_t most_stretches = 16;
/// Keys whose products a task holds at a time.
inline constexpr std::size_t keys_at_a_time = 64;

/// Floats for arrays that grow with the rows, three of them in any case, and for what tasks need beside them:
/// of `spare`, where it reaches.
struct Room {
  std::size_t arrays = 0;
  std::size_t scratch = 0;

  Room(std::size_t spare, std::size_t rows)
      : arrays((std::max)(3 * logits_stride(rows), spare / 2)), scratch(spare - (std::min)(spare, arrays)) {}
};

/// Larger values take the place of smaller ones; NaN takes that of any, and stays.
inline void max_into(const float* values, std::size_t count, float* maxima) {
  for (std::size_t t = 0; t < count; ++t) {
    const bool larger = values[t] > maxima[t] || compresskv::detail::is_nan(values[t]);
    maxima[t] = larger && !compresskv::detail::is_nan(maxima[t]) ? values[t] : maxima[t];
  }
}

/// Packs queries `begin` to `begin + count` of those that observe: those of all heads of the group side by
/// side. `memory` is that of `pack_queries`. Throws where one is not finite: a maximum might hide it.
template <class Kv, QueryObservation O>
PackedQueries pack_group(const LayerInput<Kv, O>& in, std::size_t kv_head, std::size_t observers,
                         std::size_t begin, std::size_t count, std::span<float> memory) {
  const std::size_t head_dim = in.shape.head_dim;
  const std::size_t group = in.shape.group();
  std::fill_n(memory.begin(), PackedQueries::size(count * group, head_dim), 0.0F);
  float* const query = memory.data() + memory.size() - head_dim;
  for (std::size_t h = 0; h < group; ++h) {
    const std::size_t head = kv_head * group + h;
    with_plain_element(in.observation.query_run(head), [&](const auto& typed) {
      for (std::size_t i = 0; i < count; ++i) {
        decode_row(typed, typed.rows - observers + begin + i, head_dim, query);
        if (first_not_finite({query, head_dim}) < head_dim) {
          fail_not_finite(in.layer, head, 0, "the queries hold NaN or infinite values");
        }
        PackedQueries::pack(i * group + h, query, head_dim, memory.data());
      }
    });
  }
  return {.data = memory.data(), .count = count * group, .head_dim = head_dim};
}

/// Throws for a query whose softmax is not finite, naming the head of the group that is to blame.
template <class Kv, QueryObservation O>
[[noreturn]] void fail_of_group(const LayerInput<Kv, O>& in, std::size_t kv_head, std::size_t observers,
                                std::size_t query, std::span<float> row, std::span<float> packed,
                                float* buffer) {
  const std::size_t group = in.shape.group();
  const std::size_t head_dim = in.shape.head_dim;
  for (std::size_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    const auto one = static_cast<std::uint32_t>(head);
    std::fill(packed.begin(), packed.end(), 0.0F);
    float* const decoded = packed.data() + packed.size() - head_dim;
    with_plain_element(in.observation.query_run(one), [&](const auto& typed) {
      decode_row(typed, typed.rows - observers + query, head_dim, decoded);
    });
    PackedQueries::pack(0, decoded, head_dim, packed.data());
    logits_of_rows(in.kv, kv_head, 0, row.size(),
                   PackedQueries{.data = packed.data(), .count = 1, .head_dim = head_dim},
                   log2_e * in.observation.scale(), buffer, row.data(), row.size());
    if (first_not_finite(row) < row.size()) {
      fail_of_logits(in, head, row);
    }
  }
  fail_of_logits(in, kv_head * group, row);
}

}  // namespace detail

/// Attention of a KV head's group as one head (R-KV): of each observing query the group's largest logit of
/// each evictable row, softmax over the evictable rows alone in float32, mean over the queries.
///
/// Fills `means`, one float an evictable row, of which there must be some. What a query does not see (sliding
/// window) has no weight; sinks take none. Throws ScoreError naming layer, head and token. `spare` is how
/// many floats it may hold; one row of logits in any case. Cost: that of the window's attention.
template <class Kv, QueryObservation O, Executor X>
void group_attention(const LayerInput<Kv, O>& in, std::size_t kv_head, std::size_t spare,
                     Workspace& workspace, X& executor, std::span<float> means) {
  const compresskv::detail::PlainFloats plain;
  const std::size_t evictable = means.size();
  const std::size_t rows = in.rows[kv_head];
  const std::size_t observers = rows - evictable;
  const std::size_t group = in.shape.group();
  const std::size_t head_dim = in.shape.head_dim;
  const std::size_t stride = detail::logits_stride(evictable);
  const std::size_t tiles = detail::tile_count(evictable);
  const std::size_t key_buffer = key_buffer_size(key_kind(in.kv), head_dim);
  const detail::Room room(spare, rows);
  std::size_t stretches = (std::min)(tiles, detail::most_stretches);
  std::size_t pass_size = (std::min)(observers, room.arrays / stride);
  const auto scratch = [&] { return pass_size * group * detail::keys_at_a_time + key_buffer; };
  const auto beside = [&] {
    return PackedQueries::size(pass_size * group, head_dim) + head_dim + 2 * pass_size * tiles;
  };
  while (stretches > 1 && stretches * scratch() + beside() > room.scratch) {
    --stretches;
  }
  while (pass_size > 1 && stretches * scratch() + beside() > room.scratch) {
    --pass_size;
  }
  const std::span<float> queries =
      workspace.take(Workspace::Slot::queries, PackedQueries::size(pass_size * group, head_dim) + head_dim);
  const std::span<float> scratches = workspace.take(Workspace::Slot::key_rows, stretches * scratch());
  const std::span<float> logits = workspace.take(Workspace::Slot::logits, pass_size * stride);
  const std::span<float> tile_sums = workspace.take(Workspace::Slot::row_sums, 2 * pass_size * tiles);
  const std::span<float> maxima = tile_sums.first(pass_size * tiles);  // [query][tile]
  const std::span<float> factors = tile_sums.last(pass_size * tiles);
  const float scale = log2_e * in.observation.scale();
  const float cap = log2_e * compresskv::detail::soft_cap(in.observation);
  constexpr float none = -std::numeric_limits<float>::infinity();
  const auto first_seen = [&](std::size_t query) {
    return (std::min)(evictable, detail::first_visible(in, kv_head, evictable + query));
  };

  std::fill(means.begin(), means.end(), 0.0F);
  for (std::size_t begin = 0; begin < observers; begin += pass_size) {
    const std::size_t in_pass = (std::min)(pass_size, observers - begin);
    const PackedQueries packed = detail::pack_group(in, kv_head, observers, begin, in_pass, queries);
    executor.parallel_for(stretches, [&](std::size_t stretch) {
      const compresskv::detail::PlainFloats plain_here;
      float* const buffer = scratches.data() + stretch * scratch();
      float* const products = buffer + key_buffer;
      for (std::size_t tile = stretch * tiles / stretches; tile < (stretch + 1) * tiles / stretches; ++tile) {
        const std::size_t first = tile * detail::tokens_per_tile;
        const std::size_t last = (std::min)(first + detail::tokens_per_tile, evictable);
        for (std::size_t t = first; t < last; t += detail::keys_at_a_time) {
          const std::size_t count = (std::min)(detail::keys_at_a_time, last - t);
          detail::logits_of_tile(in.kv, kv_head, t, count, packed, scale, buffer, products,
                                 detail::keys_at_a_time);
          for (std::size_t q = 0; q < in_pass * group; ++q) {
            const float* const row = products + q * detail::keys_at_a_time;
            float* const largest = logits.data() + q / group * stride + t;
            if (q % group == 0) {
              std::copy_n(row, count, largest);
            } else {
              detail::max_into(row, count, largest);
            }
          }
        }
        for (std::size_t q = 0; q < in_pass; ++q) {
          float* const row = logits.data() + q * stride;
          const std::size_t from = std::clamp(first_seen(begin + q), first, last);
          std::fill(row + first, row + from, 0.0F);
          if (cap > 0.0F) {
            soft_cap_row(row + from, last - from, cap);
          }
          const Exp2Sum found = exp2_row(row + from, last - from);
          maxima[q * tiles + tile] = found.max;
          factors[q * tiles + tile] = found.sum;
        }
      }
    });
    for (std::size_t q = 0; q < in_pass; ++q) {
      const std::span<float> of_query = factors.subspan(q * tiles, tiles);
      if (first_seen(begin + q) == evictable) {
        std::fill(of_query.begin(), of_query.end(), 0.0F);
      } else if (!detail::merge_tiles(maxima.subspan(q * tiles, tiles), of_query, none)) {
        detail::fail_of_group(in, kv_head, observers, begin + q, logits.subspan(q * stride, evictable),
                              queries, scratches.data());
      }
    }
    executor.parallel_for(tiles, [&](std::size_t tile) {
      const compresskv::detail::PlainFloats plain_here;
      const std::size_t first = tile * detail::tokens_per_tile;
      add_scaled({.first = logits.data() + first,
                  .stride = stride,
                  .count = in_pass,
                  .factors = factors.data() + tile,
                  .factor_stride = tiles},
                 (std::min)(detail::tokens_per_tile, evictable - first), means.data() + first);
    });
  }
  divide(means, observers);
}

}  // namespace compresskv::kernel

#include "compresskv/core/strict_float_end.hpp"
