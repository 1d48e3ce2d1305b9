#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>

#include "compresskv/core/error.hpp"
#include "compresskv/core/executor.hpp"
#include "compresskv/core/retained.hpp"
#include "compresskv/core/shape.hpp"
#include "compresskv/core/workspace.hpp"
#include "compresskv/kernel/logits.hpp"
#include "compresskv/kernel/softmax.hpp"
#include "compresskv/view/kv_view.hpp"
#include "compresskv/view/observation.hpp"

namespace compresskv::kernel {

/// What a scorer is shown of one layer. `Kv` is a `KvView`, or anything where the keys are not needed;
/// `Observed` likewise.
template <class Kv, class Observed>
struct LayerInput {
  const ModelShape& shape;
  std::size_t layer = 0;
  std::span<const std::size_t> rows;  ///< [kv_head], rows of the cache now
  std::size_t window = 0;             ///< queries that observe, at most the rows of any KV head
  const Retained& retained;           ///< true positions of the rows
  const Kv& kv;
  const Observed& observation;

  std::size_t evictable(std::size_t kv_head) const { return rows[kv_head] - window; }
};

namespace detail {

/// Tokens a task: 1024 keys of 128 bfloat16 fill a quarter of a megabyte, so a task stays in the second-level
/// cache.
inline constexpr std::size_t tile = 1024;

/// What is held at once, so that all extra memory stays within 1 % of the model's cache: whole heads, or
/// where not even one fits, some of its queries. One query at the least.
struct AtOnce {
  std::size_t heads = 1;
  std::size_t queries = 1;  ///< of all these heads
};

inline AtOnce at_once(const ModelShape& shape, std::size_t row_bytes, std::size_t rows, std::size_t window) {
  const std::size_t allowed = rows * shape.layers * shape.kv_heads * row_bytes / 100;
  // Scores and selection of each KV head, one head's pooled scores, and 1.1 bits of position for each row, KV
  // head and layer.
  const std::size_t others =
      (2 * shape.kv_heads + 1) * rows * sizeof(float) + (shape.layers + 1) * shape.kv_heads * rows * 11 / 80;
  const std::size_t arrays = allowed <= others ? 0 : (allowed - others) / (rows * sizeof(float));
  const std::size_t heads = arrays / (window + 1);  // a head's logits, and their sum
  if (heads > 0) {
    return {.heads = heads, .queries = heads * window};
  }
  return {.queries = arrays < 2 ? 1 : arrays - 1};
}

[[noreturn]] inline void fail_not_finite(std::size_t layer, std::size_t head, std::span<const float> values) {
  const auto bad = std::find_if_not(values.begin(), values.end(), [](float v) { return std::isfinite(v); });
  compresskv::detail::fail<ScoreError>(
      "score of layer ", layer, " query head ", head, " token ", bad - values.begin(),
      " is not finite: the keys or queries hold NaN or infinite values; the cache was left as it is");
}

/// Logits of rows [first, first + count) of one KV head, across its runs.
template <KvView V>
void logits_of_rows(const V& kv, std::size_t kv_head, std::size_t first, std::size_t count,
                    const QueryBlock& queries, float scale, float* row_buffer, float* out,
                    std::size_t out_stride) {
  std::size_t begin = 0;
  for (std::size_t i = 0; i < kv.run_count(kv_head) && begin < first + count; ++i) {
    const Run<const typename V::key_element> run = kv.key_run(kv_head, i);
    const std::size_t from = std::max(first, begin);
    const std::size_t to = std::min(first + count, begin + run.rows);
    if (from < to) {
      logits(run, from - begin, to - from, queries, scale, row_buffer, out + from, out_stride);
    }
    begin += run.rows;
  }
}

/// First row that the query of row `own` sees: all before it, or a sliding window of positions.
template <class Kv, QueryObservation O>
std::size_t first_visible(const LayerInput<Kv, O>& in, std::size_t kv_head, std::size_t own) {
  const std::size_t span = compresskv::detail::sliding_window(in.observation);
  const std::size_t position = in.retained.position(own, kv_head);
  return span == 0 || position < span ? 0 : in.retained.rows_before(position - span + 1, kv_head);
}

/// For heads of one KV head: softmax attention of the window summed over its rows, one array a head. Logits
/// of `queries_at_once` queries are held at a time.
template <class Kv, class Observed, Executor X, class PerHead>
void window_sums_from_queries(const LayerInput<Kv, Observed>& in, std::size_t kv_head,
                              std::span<const std::uint32_t> heads, std::size_t queries_at_once,
                              Workspace& workspace, X& executor, PerHead&& per_head) {
  const std::size_t head_dim = in.shape.head_dim;
  const std::size_t padded = round_up_to_lanes(head_dim);
  const std::size_t window = in.window;
  const std::size_t rows = in.rows[kv_head];
  const std::size_t evictable = in.evictable(kv_head);
  const std::size_t count = heads.size() * window;
  const std::span<float> queries = workspace.take(Workspace::Slot::queries, count * padded);
  std::fill(queries.begin(), queries.end(), 0.0F);
  for (std::size_t h = 0; h < heads.size(); ++h) {
    const auto run = in.observation.query_run(heads[h]);
    for (std::size_t i = 0; i < window; ++i) {
      decode_row(run, run.rows - window + i, head_dim, queries.data() + (h * window + i) * padded);
    }
  }
  const std::size_t tiles = (rows + tile - 1) / tile;
  const std::size_t held = std::min(queries_at_once, count);
  const std::span<float> key_rows = workspace.take(Workspace::Slot::key_rows, tiles * padded);
  const std::span<float> logits = workspace.take(Workspace::Slot::logits, held * rows);
  const std::span<float> row_sums = workspace.take(Workspace::Slot::row_sums, held);
  const std::span<float> sums = workspace.take(Workspace::Slot::sums, heads.size() * evictable);
  std::fill(sums.begin(), sums.end(), 0.0F);
  const float cap = compresskv::detail::soft_cap(in.observation);

  for (std::size_t begin = 0; begin < count; begin += held) {
    const std::size_t now = std::min(held, count - begin);
    const QueryBlock block{.data = queries.data() + begin * padded, .count = now, .head_dim = head_dim};
    executor.parallel_for(tiles, [&](std::size_t i) {
      const std::size_t first = i * tile;
      const std::size_t tokens = std::min(tile, rows - first);
      logits_of_rows(in.kv, kv_head, first, tokens, block, in.observation.scale(),
                     key_rows.data() + i * padded, logits.data(), rows);
      for (std::size_t q = 0; cap > 0.0F && q < now; ++q) {
        soft_cap_row(logits.data() + q * rows + first, tokens, cap);
      }
    });
    executor.parallel_for(now, [&](std::size_t q) {
      // Row i of the window sees the columns up to its own: the rest is the future and has no weight.
      const std::size_t own = evictable + (begin + q) % window;
      const std::size_t first = first_visible(in, kv_head, own);
      float* row = logits.data() + q * rows;
      std::fill_n(row, first, 0.0F);
      row_sums[q] = exp_row(row + first, own + 1 - first,
                            compresskv::detail::sink_logit(in.observation, heads[(begin + q) / window]));
    });
    for (std::size_t q = 0; q < now; ++q) {
      if (!std::isfinite(row_sums[q])) {
        fail_not_finite(in.layer, heads[(begin + q) / window],
                        logits.subspan(q * rows, evictable + (begin + q) % window + 1));
      }
    }
    executor.parallel_for((evictable + tile - 1) / tile, [&](std::size_t i) {
      const std::size_t first = i * tile;
      const std::size_t tokens = std::min(tile, evictable - first);
      for (std::size_t q = 0; q < now; ++q) {
        add_scaled(logits.data() + q * rows + first, 1.0F / row_sums[q], tokens,
                   sums.data() + (begin + q) / window * evictable + first);
      }
    });
  }
  for (std::size_t h = 0; h < heads.size(); ++h) {
    per_head(heads[h], std::span<const float>(sums.subspan(h * evictable, evictable)));
  }
}

/// The same from attention that the engine has computed, or has summed.
template <class Kv, KeylessObservation O, class PerHead>
void window_sums_without_keys(const LayerInput<Kv, O>& in, std::uint32_t head, Workspace& workspace,
                              PerHead&& per_head) {
  const std::size_t evictable = in.evictable(head / in.shape.group());
  const std::span<float> sums = workspace.take(Workspace::Slot::logits, evictable);
  if constexpr (SumsObservation<O>) {
    std::copy_n(in.observation.sums(head).begin(), evictable, sums.begin());
  } else {
    std::fill(sums.begin(), sums.end(), 0.0F);
    const auto run = in.observation.attention_run(head);
    for (std::size_t i = 0; i < in.window; ++i) {
      const auto* row = run.row(run.rows - in.window + i);
      for (std::size_t t = 0; t < evictable; ++t) {
        sums[t] += to_float(row[t]);
      }
    }
  }
  if (!std::all_of(sums.begin(), sums.end(), [](float v) { return std::isfinite(v); })) {
    fail_not_finite(in.layer, head, sums);
  }
  per_head(head, std::span<const float>(sums));
}

}  // namespace detail

/// Steps 2 to 4 of METHOD.md section 2: logits of the window's queries with all keys, causal mask inside the
/// window, softmax over all keys in float32, sum over the window's rows, the window's own columns dropped.
///
/// Calls `per_head(query_head, sums)` for each of `heads` (ascending), `sums` being one float an evictable
/// row of its KV head, that are valid during the call. Keys of a KV head are read once for as many of its
/// heads as memory allows (1 % of the model's cache), and more often only where not even one head fits.
/// Throws ScoreError naming layer, head and token when a logit is NaN or +inf.
template <class Kv, Observation O, Executor X, class PerHead>
void window_attention(const LayerInput<Kv, O>& in, std::span<const std::uint32_t> heads, Workspace& workspace,
                      X& executor, PerHead&& per_head) {
  if constexpr (QueryObservation<O>) {
    for (std::size_t first = 0; first < heads.size();) {
      const std::size_t kv_head = heads[first] / in.shape.group();
      const detail::AtOnce held = detail::at_once(in.shape, kv_row_bytes(in.kv), in.rows[kv_head], in.window);
      std::size_t last = first + 1;
      while (last < heads.size() && last - first < held.heads && heads[last] / in.shape.group() == kv_head) {
        ++last;
      }
      detail::window_sums_from_queries(in, kv_head, heads.subspan(first, last - first), held.queries,
                                       workspace, executor, per_head);
      first = last;
    }
  } else {
    for (const std::uint32_t head : heads) {
      detail::window_sums_without_keys(in, head, workspace, per_head);
    }
  }
}

}  // namespace compresskv::kernel
