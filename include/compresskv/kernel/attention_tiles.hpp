#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>

#include "compresskv/core/executor.hpp"
#include "compresskv/core/float_bits.hpp"
#include "compresskv/core/float_mode.hpp"
#include "compresskv/core/strict_float_begin.hpp"
#include "compresskv/core/workspace.hpp"
#include "compresskv/kernel/finite_checks.hpp"
#include "compresskv/kernel/head_groups.hpp"
#include "compresskv/kernel/layer_input.hpp"
#include "compresskv/kernel/logits.hpp"
#include "compresskv/kernel/row_reader.hpp"
#include "compresskv/kernel/softmax.hpp"
#include "compresskv/view/kv_view.hpp"
#include "compresskv/view/observation.hpp"

namespace compresskv::kernel {

namespace detail {

/// Logits of rows [first, first + count) of one KV head, across its runs: of row r at `out[r - first]`. Of
/// its values, where asked for, as if they were keys.
template <Part part = Part::keys, KvView V>
void logits_of_tile(const V& kv, std::size_t kv_head, std::size_t first, std::size_t count,
                    const PackedQueries& queries, float scale, float* buffer, float* out,
                    std::size_t out_stride) {
  std::size_t begin = 0;
  for (std::size_t i = 0; i < kv.run_count(kv_head) && begin < first + count; ++i) {
    const auto run = run_of<part>(kv, kv_head, i);
    const std::size_t from = (std::max)(first, begin);
    const std::size_t to = (std::min)(first + count, begin + run.rows);
    if (from < to) {
      with_element(run, [&](const auto& keys) {
        logits(keys, from - begin, to - from, queries, scale, buffer, out + (from - first), out_stride);
      });
    }
    begin += run.rows;
  }
}

/// The same, of row r at `out[r]`.
template <KvView V>
void logits_of_rows(const V& kv, std::size_t kv_head, std::size_t first, std::size_t count,
                    const PackedQueries& queries, float scale, float* buffer, float* out,
                    std::size_t out_stride) {
  logits_of_tile(kv, kv_head, first, count, queries, scale, buffer, out + first, out_stride);
}

/// Merges the softmax of a row's tiles. Each sum becomes the factor that turns the values of its tile into
/// attention; the maxima are overwritten. `sink` is the logit of an extra column that takes part in maximum
/// and sum alone; -inf: none. Returns whether the row's sum is a finite number above zero.
inline bool merge_tiles(std::span<float> maxima, std::span<float> sums, float sink) {
  const float max = exp2_row(maxima.data(), maxima.size()).max;  // the maxima are now shares of that one
  const float highest = max < sink ? sink : max;
  const float share = portable::exp2(max - highest);
  float total = 0.0F;
  for (std::size_t i = 0; i < sums.size(); ++i) {
    total += maxima[i] * sums[i];
  }
  total = share * total + portable::exp2(sink - highest);
  for (std::size_t i = 0; i < sums.size(); ++i) {
    sums[i] = share * maxima[i] / total;
  }
  return compresskv::detail::is_finite(total) && total > 0.0F;
}

/// First row that the query of row `own` sees: 0, or where its sliding window of positions begins.
template <class Kv, QueryObservation O>
std::size_t first_visible(const LayerInput<Kv, O>& in, std::size_t kv_head, std::size_t own) {
  const std::size_t span = compresskv::detail::sliding_window(in.observation);
  if (span == 0) {
    return 0;
  }
  const std::size_t position = in.retained.position(own, kv_head);
  return position < span ? 0 : in.retained.rows_before(position - span + 1, kv_head);
}

/// Packs `count` observing queries from `begin` on, in the order of `heads`, into `memory`, which has
/// `PackedQueries::size` floats and those of one query more.
template <class Kv, QueryObservation O>
PackedQueries pack_queries(const LayerInput<Kv, O>& in, std::span<const std::uint32_t> heads,
                           std::size_t observers, std::size_t begin, std::size_t count,
                           std::span<float> memory) {
  const std::size_t head_dim = in.shape.head_dim;
  const bool pairs =
      uses_bf16_pairs(key_kind(in.kv), compresskv::detail::observed_kind(in.observation), head_dim);
  const std::size_t width = pairs ? head_dim / 2 : head_dim;
  const std::size_t size = PackedQueries::size(count, width);
  std::fill_n(memory.begin(), size, 0.0F);
  float* const query = memory.data() + memory.size() - head_dim;
  for (std::size_t q = 0; q < count; ++q) {
    const auto run = in.observation.query_run(heads[(begin + q) / observers]);
    with_plain_element(run, [&](const auto& typed) {
      decode_row(typed, typed.rows - observers + (begin + q) % observers, head_dim, query);
    });
    if (pairs) {
      // Two bfloat16 a float: exact, since the query was bfloat16.
      for (std::size_t e = 0; e < width; ++e) {
        query[e] = __builtin_bit_cast(float, __builtin_bit_cast(std::uint32_t, query[2 * e]) >> 16U |
                                                 __builtin_bit_cast(std::uint32_t, query[2 * e + 1]));
      }
    }
    PackedQueries::pack(q, query, width, memory.data());
  }
  return {.data = memory.data(), .count = count, .head_dim = head_dim, .bf16_pairs = pairs};
}

/// For query heads of one KV head: softmax attention of the last `observers` queries over the evictable rows.
///
/// Calls `add(h, i, first, tokens, rows)` for each tile of evictable tokens, `first` being its first token.
/// `rows` has a row for each of the queries i, i + 1, ... of `heads[h]`; their attention is `factor *
/// row[t]`. Tiles do not overlap, and several threads may add some at the same time; the queries of a tile
/// come in ascending order. Tokens that no query of the pass sees yet may be left out. A pass holds the
/// logits of `queries_per_pass` queries.
///
/// A tile's logits become `2^(logit - maximum of the tile)` while they are in the first-level cache. The
/// maximum and sum of the whole row then give one factor a query and tile. So logits are written once and
/// read once more.
template <class Kv, class Observed, Executor X, class Add>
void attention_from_queries(const LayerInput<Kv, Observed>& in, std::size_t kv_head,
                            std::span<const std::uint32_t> heads, std::size_t observers,
                            std::size_t queries_per_pass, Workspace& workspace, X& executor, Add&& add) {
  const std::size_t head_dim = in.shape.head_dim;
  const std::size_t rows = in.rows[kv_head];
  const std::size_t tiles = tile_count(rows);
  const std::size_t evictable = in.evictable(kv_head);
  const std::size_t count = heads.size() * observers;
  const std::size_t pass_size = (std::min)(queries_per_pass, count);
  const std::size_t stride = logits_stride(rows);
  const std::size_t key_buffer = key_buffer_size(key_kind(in.kv), head_dim);
  const std::span<float> queries =
      workspace.take(Workspace::Slot::queries, PackedQueries::size(pass_size, head_dim) + head_dim);
  const std::span<float> key_rows = workspace.take(Workspace::Slot::key_rows, tiles * key_buffer);
  const std::span<float> logits = workspace.take(Workspace::Slot::logits, pass_size * stride);
  const std::span<float> tile_sums = workspace.take(Workspace::Slot::row_sums, 2 * pass_size * tiles);
  const std::span<float> maxima = tile_sums.first(pass_size * tiles);  // [query][tile]
  const std::span<float> factors =
      tile_sums.last(pass_size * tiles);  // [query][tile]; sums until the tiles are merged
  const float scale = log2_e * in.observation.scale();
  const float cap = log2_e * compresskv::detail::soft_cap(in.observation);

  for (std::size_t begin = 0; begin < count; begin += pass_size) {
    const std::size_t in_pass = (std::min)(pass_size, count - begin);
    const auto own_row = [&](std::size_t q) { return rows - observers + (begin + q) % observers; };
    const bool one_head = begin / observers == (begin + in_pass - 1) / observers;
    // Keys that no query of the pass sees are left out: half of the work where a whole prompt observes.
    const std::size_t visible = one_head ? own_row(in_pass - 1) + 1 : rows;
    const std::size_t seen = (std::min)(evictable, visible);
    const PackedQueries packed = pack_queries(in, heads, observers, begin, in_pass, queries);
    executor.parallel_for(tile_count(visible), [&](std::size_t tile) {
      const compresskv::detail::PlainFloats plain_here;
      const std::size_t first = tile * tokens_per_tile;
      const std::size_t last = (std::min)(first + tokens_per_tile, visible);
      logits_of_rows(in.kv, kv_head, first, last - first, packed, scale, key_rows.data() + tile * key_buffer,
                     logits.data(), stride);
      for (std::size_t q = 0; q < in_pass; ++q) {
        // Causal mask: a query sees the keys up to its own row.
        const std::size_t own = own_row(q);
        const std::size_t from = std::clamp(first_visible(in, kv_head, own), first, last);
        const std::size_t to = std::clamp(own + 1, from, last);
        float* row = logits.data() + q * stride;
        std::fill(row + first, row + from, 0.0F);
        std::fill(row + to, row + last, 0.0F);
        if (cap > 0.0F) {
          soft_cap_row(row + from, to - from, cap);
        }
        const Exp2Sum found = exp2_row(row + from, to - from);
        maxima[q * tiles + tile] = found.max;
        factors[q * tiles + tile] = found.sum;
      }
    });
    for (std::size_t q = 0; q < in_pass; ++q) {
      const std::size_t head = heads[(begin + q) / observers];
      if (!merge_tiles(maxima.subspan(q * tiles, tile_count(visible)),
                       factors.subspan(q * tiles, tile_count(visible)),
                       log2_e * compresskv::detail::sink_logit(in.observation, head))) {
        fail_of_logits(in, head, logits.subspan(q * stride, own_row(q) + 1));
      }
    }
    executor.parallel_for(tile_count(seen), [&](std::size_t tile) {
      const compresskv::detail::PlainFloats plain_here;
      const std::size_t first = tile * tokens_per_tile;
      const std::size_t tokens = (std::min)(tokens_per_tile, seen - first);
      for (std::size_t q = 0; q < in_pass;) {
        const std::size_t query = (begin + q) % observers;
        const std::size_t same_head = (std::min)(observers - query, in_pass - q);
        add((begin + q) / observers, query, first, tokens,
            ScaledRows{.first = logits.data() + q * stride + first,
                       .stride = stride,
                       .count = same_head,
                       .factors = factors.data() + q * tiles + tile,
                       .factor_stride = tiles});
        q += same_head;
      }
    });
  }
}

/// The same for one head, from attention that the engine has computed.
template <class Kv, AttentionObservation O, class Add>
void attention_from_matrix(const LayerInput<Kv, O>& in, std::uint32_t head, std::size_t observers,
                           Workspace& workspace, Add&& add) {
  const std::size_t evictable = in.evictable(head / in.shape.group());
  const std::span<float> weights = workspace.take(Workspace::Slot::logits, evictable);
  const auto run = in.observation.attention_run(head);
  for (std::size_t i = 0; i < observers; ++i) {
    with_plain_element(run, [&](const auto& typed) {
      const auto* row = typed.row(typed.rows - observers + i);
      for (std::size_t t = 0; t < evictable; ++t) {
        weights[t] = to_float(row[t]);
      }
    });
    const float one = 1.0F;
    add(0, i, 0, evictable, ScaledRows{.first = weights.data(), .factors = &one});
  }
}

/// The same for heads of one KV head, from whatever observation has rows.
template <class Kv, Observation O, Executor X, class Add>
void add_attention(const LayerInput<Kv, O>& in, std::span<const std::uint32_t> heads, std::size_t observers,
                   std::size_t queries_per_pass, Workspace& workspace, X& executor, Add&& add) {
  if constexpr (QueryObservation<O>) {
    attention_from_queries(in, heads[0] / in.shape.group(), heads, observers, queries_per_pass, workspace,
                           executor, add);
  } else {
    attention_from_matrix(in, heads[0], observers, workspace, add);
  }
}

}  // namespace detail

}  // namespace compresskv::kernel

#include "compresskv/core/strict_float_end.hpp"
