#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <span>
#include <string_view>
#include <type_traits>
#include <vector>

#include "compresskv/core/error.hpp"
#include "compresskv/core/executor.hpp"
#include "compresskv/core/float_bits.hpp"
#include "compresskv/core/float_mode.hpp"
#include "compresskv/core/retained.hpp"
#include "compresskv/core/shape.hpp"
#include "compresskv/core/strict_float_begin.hpp"
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
  std::size_t window = 0;    ///< queries that observe and are kept; a KV head has no more than its rows
  const Retained& retained;  ///< true positions of the rows
  const Kv& kv;
  const Observed& observation;
  std::size_t held_bytes = 0;  ///< state of the sequence that counts towards the 1 %, beside positions

  /// Rows that may go: none where a KV head is shorter than the window.
  std::size_t evictable(std::size_t kv_head) const {
    return rows[kv_head] - (std::min)(window, rows[kv_head]);
  }
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

/// Floats from one query's logits to the next: whole cache lines, and an odd number of them, so that queries
/// do not meet in the same few places of a cache. With 32,768 tokens and none in between, sixteen queries
/// take 1.14 times as long.
constexpr std::size_t logits_stride(std::size_t rows) { return ((rows + 15) / 16 | 1U) * 16; }

/// `sums` arrays a head go along with its logits, `key_buffer` floats with each tile.
inline AtOnce at_once(const ModelShape& shape, std::size_t row_bytes, std::size_t rows, std::size_t window,
                      std::size_t sums, std::size_t key_buffer, std::size_t held_bytes) {
  // A twentieth of the 1 % is for what does not grow with the rows.
  const std::size_t allowed = rows * shape.layers * shape.kv_heads * row_bytes / 2000 * 19;
  // Scores and selection of each KV head, one head's pooled scores, 1.1 bits of position for each row, KV
  // head and layer, and the decoded keys of each tile.
  const std::size_t others = (2 * shape.kv_heads + 1) * rows * sizeof(float) +
                             (shape.layers + 1) * shape.kv_heads * rows * 11 / 80 +
                             (rows + tile - 1) / tile * key_buffer * sizeof(float) + held_bytes;
  const std::size_t arrays =
      allowed <= others ? 0 : (allowed - others) / (logits_stride(rows) * sizeof(float));
  const std::size_t heads = arrays / (window + sums);
  if (heads > 0) {
    return {.heads = heads, .queries = heads * window};
  }
  return {.queries = arrays < sums + 1 ? 1 : arrays - sums};
}

/// The first that is NaN or infinite; all of them where none is.
inline std::size_t first_not_finite(std::span<const float> values) {
  std::size_t t = 0;
  while (t < values.size() && compresskv::detail::is_finite(values[t])) {
    ++t;
  }
  return t;
}

[[noreturn]] inline void fail_not_finite(std::size_t layer, std::size_t head, std::size_t token,
                                         std::string_view why) {
  compresskv::detail::fail<ScoreError>("score of layer ", layer, " query head ", head, " token ", token,
                                       " is not finite: ", why, "; the cache was left as it is");
}

/// Whether rows from `first` on hold numbers alone.
template <class Run>
bool rows_are_finite(const Run& run, std::size_t first, std::size_t row_size) {
  std::vector<float> row(row_size);
  return with_element(run, [&](const auto& typed) {
    for (std::size_t r = first; r < typed.rows; ++r) {
      decode_row(typed, r, row_size, row.data());
      if (first_not_finite(row) < row_size) {
        return false;
      }
    }
    return true;
  });
}

/// Throws for a head whose logits, `row` of them, are not all numbers or all -inf. Keys and queries are read
/// again, to tell values that are no numbers from products that are none.
template <class Kv, QueryObservation O>
[[noreturn]] void fail_of_logits(const LayerInput<Kv, O>& in, std::size_t head, std::span<const float> row) {
  const std::size_t bad = first_not_finite(row);
  const std::size_t kv_head = head / in.shape.group();
  const auto queries = in.observation.query_run(head);
  bool finite =
      rows_are_finite(queries, queries.rows - (std::min)(queries.rows, in.rows[kv_head]), in.shape.head_dim);
  for (std::size_t i = 0; finite && i < in.kv.run_count(kv_head); ++i) {
    const Run<const typename Kv::key_element> keys = in.kv.key_run(kv_head, i);
    finite = rows_are_finite(keys, 0, in.shape.head_dim);
  }
  // No logit but -inf: all of them are to blame.
  fail_not_finite(in.layer, head, bad < row.size() ? bad : 0,
                  finite
                      ? "keys and queries are finite, but their products times the scale are beyond float32: "
                        "check the scale, or make queries or keys smaller"
                      : "the keys or queries hold NaN or infinite values");
}

/// Logits of rows [first, first + count) of one KV head, across its runs.
template <KvView V>
void logits_of_rows(const V& kv, std::size_t kv_head, std::size_t first, std::size_t count,
                    const QueryBlock& queries, float scale, float* buffer, float* out,
                    std::size_t out_stride) {
  std::size_t begin = 0;
  for (std::size_t i = 0; i < kv.run_count(kv_head) && begin < first + count; ++i) {
    const Run<const typename V::key_element> run = kv.key_run(kv_head, i);
    const std::size_t from = (std::max)(first, begin);
    const std::size_t to = (std::min)(first + count, begin + run.rows);
    if (from < to) {
      with_element(run, [&](const auto& keys) {
        logits(keys, from - begin, to - from, queries, scale, buffer, out + from, out_stride);
      });
    }
    begin += run.rows;
  }
}

/// Makes of each tile's sum the factor that turns its values into attention; overwrites the maxima. `sink` is
/// the logit of an extra column that takes part in maximum and sum alone; -inf: none. Whether the sum is a
/// finite number above zero.
inline bool join_tiles(std::span<float> maxima, std::span<float> sums, float sink) {
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

/// First row that the query of row `own` sees: all before it, or a sliding window of positions.
template <class Kv, QueryObservation O>
std::size_t first_visible(const LayerInput<Kv, O>& in, std::size_t kv_head, std::size_t own) {
  const std::size_t span = compresskv::detail::sliding_window(in.observation);
  if (span == 0) {
    return 0;
  }
  const std::size_t position = in.retained.position(own, kv_head);
  return position < span ? 0 : in.retained.rows_before(position - span + 1, kv_head);
}

/// Queries `begin`, `begin + 1`, ... of the observed ones, in the order of `heads`, as the kernel wants them
/// in `memory`, which is `QueryBlock::size` floats and one query.
template <class Kv, QueryObservation O>
QueryBlock query_block(const LayerInput<Kv, O>& in, std::span<const std::uint32_t> heads,
                       std::size_t observers, std::size_t begin, std::size_t count, std::span<float> memory) {
  const std::size_t head_dim = in.shape.head_dim;
  const bool pairs = in_pairs(key_kind(in.kv), compresskv::detail::observed_kind(in.observation), head_dim);
  const std::size_t width = pairs ? head_dim / 2 : head_dim;
  const std::size_t size = QueryBlock::size(count, width);
  std::fill_n(memory.begin(), size, 0.0F);
  float* const query = memory.data() + memory.size() - head_dim;
  for (std::size_t q = 0; q < count; ++q) {
    const auto run = in.observation.query_run(heads[(begin + q) / observers]);
    with_plain_element(run, [&](const auto& typed) {
      decode_row(typed, typed.rows - observers + (begin + q) % observers, head_dim, query);
    });
    if (pairs) {
      // Halves of a register lane: exact, since the query was bfloat16.
      for (std::size_t e = 0; e < width; ++e) {
        query[e] = __builtin_bit_cast(float, __builtin_bit_cast(std::uint32_t, query[2 * e]) >> 16U |
                                                 __builtin_bit_cast(std::uint32_t, query[2 * e + 1]));
      }
    }
    QueryBlock::put(q, query, width, memory.data());
  }
  return {.data = memory.data(), .count = count, .head_dim = head_dim, .pairs = pairs};
}

/// For query heads of one KV head: softmax attention of the last `observers` queries over the evictable rows.
///
/// Calls `add(h, i, first, tokens, rows)` for queries i, i + 1, ... of `heads[h]`, a row of `rows` each, and
/// a stretch of evictable rows from `first` on: their attention is `factor * row[t]`. Stretches do not
/// overlap and may come at the same time; the queries of each come in ascending order. Rows in the future of
/// all queries held may be left out. Logits of `queries_at_once` queries are held at a time.
///
/// A tile's logits become `2^(logit - maximum of the tile)` while they are in the nearest cache; what the
/// whole row's maximum and sum make of that is one factor a query and tile. So the logits are written once
/// and read once more.
template <class Kv, class Observed, Executor X, class Add>
void attention_from_queries(const LayerInput<Kv, Observed>& in, std::size_t kv_head,
                            std::span<const std::uint32_t> heads, std::size_t observers,
                            std::size_t queries_at_once, Workspace& workspace, X& executor, Add&& add) {
  const std::size_t head_dim = in.shape.head_dim;
  const std::size_t rows = in.rows[kv_head];
  const std::size_t evictable = in.evictable(kv_head);
  const std::size_t count = heads.size() * observers;
  const std::size_t held = (std::min)(queries_at_once, count);
  const std::size_t stride = logits_stride(rows);
  const std::size_t key_buffer = key_buffer_size(key_kind(in.kv), head_dim);
  const auto tiles = [](std::size_t tokens) { return (tokens + tile - 1) / tile; };
  const std::span<float> queries =
      workspace.take(Workspace::Slot::queries, QueryBlock::size(held, head_dim) + head_dim);
  const std::span<float> key_rows = workspace.take(Workspace::Slot::key_rows, tiles(rows) * key_buffer);
  const std::span<float> logits = workspace.take(Workspace::Slot::logits, held * stride);
  const std::span<float> tile_sums = workspace.take(Workspace::Slot::row_sums, 2 * held * tiles(rows));
  const std::span<float> maxima = tile_sums.first(held * tiles(rows));  // [query][tile]
  const std::span<float> factors = tile_sums.last(held * tiles(rows));  // the same; sums until all are known
  const float scale = log2_e * in.observation.scale();
  const float cap = log2_e * compresskv::detail::soft_cap(in.observation);

  for (std::size_t begin = 0; begin < count; begin += held) {
    const std::size_t now = (std::min)(held, count - begin);
    // Where all queries of a prompt observe, half of what they could look at is their future.
    const auto own_row = [&](std::size_t q) { return rows - observers + (begin + q) % observers; };
    const bool one_head = begin / observers == (begin + now - 1) / observers;
    const std::size_t visible = one_head ? own_row(now - 1) + 1 : rows;
    const std::size_t looked_at = (std::min)(evictable, visible);
    const QueryBlock block = query_block(in, heads, observers, begin, now, queries);
    executor.parallel_for(tiles(visible), [&](std::size_t i) {
      const compresskv::detail::PlainFloats plain_here;
      const std::size_t first = i * tile;
      const std::size_t last = (std::min)(first + tile, visible);
      logits_of_rows(in.kv, kv_head, first, last - first, block, scale, key_rows.data() + i * key_buffer,
                     logits.data(), stride);
      for (std::size_t q = 0; q < now; ++q) {
        // A query sees the columns up to its own row: the rest is the future and has no weight.
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
        maxima[q * tiles(rows) + i] = found.max;
        factors[q * tiles(rows) + i] = found.sum;
      }
    });
    for (std::size_t q = 0; q < now; ++q) {
      const std::size_t head = heads[(begin + q) / observers];
      if (!join_tiles(maxima.subspan(q * tiles(rows), tiles(visible)),
                      factors.subspan(q * tiles(rows), tiles(visible)),
                      log2_e * compresskv::detail::sink_logit(in.observation, head))) {
        fail_of_logits(in, head, logits.subspan(q * stride, own_row(q) + 1));
      }
    }
    executor.parallel_for(tiles(looked_at), [&](std::size_t i) {
      const compresskv::detail::PlainFloats plain_here;
      const std::size_t first = i * tile;
      const std::size_t tokens = (std::min)(tile, looked_at - first);
      for (std::size_t q = 0; q < now;) {
        const std::size_t query = (begin + q) % observers;
        const std::size_t same_head = (std::min)(observers - query, now - q);
        add((begin + q) / observers, query, first, tokens,
            ScaledRows{.first = logits.data() + q * stride + first,
                       .stride = stride,
                       .count = same_head,
                       .factors = factors.data() + q * tiles(rows) + i,
                       .factor_stride = tiles(rows)});
        q += same_head;
      }
    });
  }
}

/// The same for one head from attention that the engine has computed.
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

/// Attention of heads of one KV head from whatever shows it row by row; `add` as `attention_from_queries` has
/// it.
template <class Kv, Observation O, Executor X, class Add>
void add_attention(const LayerInput<Kv, O>& in, std::span<const std::uint32_t> heads, std::size_t observers,
                   std::size_t queries_at_once, Workspace& workspace, X& executor, Add&& add) {
  if constexpr (QueryObservation<O>) {
    attention_from_queries(in, heads[0] / in.shape.group(), heads, observers, queries_at_once, workspace,
                           executor, add);
  } else {
    attention_from_matrix(in, heads[0], observers, workspace, add);
  }
}

/// Throws where what the engine computed is not finite, or gives nothing that is. From queries nothing can
/// be: their rows are checked.
template <class Kv, Observation O>
void check_finite(const LayerInput<Kv, O>& in, std::uint32_t head, std::span<const float> values) {
  if constexpr (!QueryObservation<O>) {
    const std::size_t bad = first_not_finite(values);
    if (bad == values.size()) {
      return;
    }
    bool finite = false;
    if constexpr (AttentionObservation<O>) {
      finite = rows_are_finite(in.observation.attention_run(head), 0, in.observation.tokens());
    }
    fail_not_finite(in.layer, head, bad,
                    finite
                        ? "the attention given is finite, but holds a negative weight, or weights too large "
                          "to add up: give probabilities, after the softmax"
                        : "the attention given holds NaN or infinite values");
  }
}

/// `per_group(heads, observers, queries_at_once)` for as many heads at a time as read the same keys and fit.
/// Heads whose KV head has no evictable row are left out; one with fewer rows than `observers` has that many.
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
    AtOnce held{.heads = 1, .queries = 1};
    if constexpr (QueryObservation<O>) {
      held = at_once(in.shape, kv_row_bytes(in.kv), in.rows[kv_head], own, sums,
                     key_buffer_size(key_kind(in.kv), in.shape.head_dim), in.held_bytes);
    }
    std::size_t last = first + 1;
    while (last < heads.size() && last - first < held.heads && heads[last] / in.shape.group() == kv_head) {
      ++last;
    }
    per_group(heads.subspan(first, last - first), own, held.queries);
    first = last;
  }
}

}  // namespace detail

/// Window attention (docs/method.md 2.1): logits of the last `observers` queries with all keys, causal mask,
/// softmax over all keys in float32, sum over the queries, the window's own columns dropped.
///
/// Calls `per_head(query_head, sums)` for each of `heads` (ascending), `sums` being one float an evictable
/// row of its KV head, that are valid during the call; heads without such a row are left out. Keys of a KV
/// head are read once for as many of its heads as memory allows (1 % of the model's cache), and more often
/// only where not even one head fits. Throws ScoreError naming layer, head and token when a logit is NaN or
/// +inf.
template <class Kv, Observation O, Executor X, class PerHead>
void attention_sums(const LayerInput<Kv, O>& in, std::span<const std::uint32_t> heads, std::size_t observers,
                    Workspace& workspace, X& executor, PerHead&& per_head) {
  const compresskv::detail::PlainFloats plain;
  detail::for_head_groups(
      in, heads, observers, 1, [&](auto group, std::size_t own_observers, std::size_t queries_at_once) {
        const std::size_t evictable = in.evictable(group[0] / in.shape.group());
        const std::span<float> sums = workspace.take(Workspace::Slot::sums, group.size() * evictable);
        std::fill(sums.begin(), sums.end(), 0.0F);
        const auto add = [&](std::size_t h, std::size_t, std::size_t first, std::size_t tokens,
                             const ScaledRows& rows) {
          add_scaled(rows, tokens, sums.data() + h * evictable + first);
        };
        if constexpr (SumsObservation<O>) {
          std::copy_n(in.observation.sums(group[0]).begin(), evictable, sums.begin());
        } else {
          detail::add_attention(in, group, own_observers, queries_at_once, workspace, executor, add);
        }
        for (std::size_t h = 0; h < group.size(); ++h) {
          const std::span<const float> own = sums.subspan(h * evictable, evictable);
          detail::check_finite(in, group[h], own);
          per_head(group[h], own);
        }
      });
}

/// `attention_sums` of the window's queries.
template <class Kv, Observation O, Executor X, class PerHead>
void window_attention(const LayerInput<Kv, O>& in, std::span<const std::uint32_t> heads, Workspace& workspace,
                      X& executor, PerHead&& per_head) {
  attention_sums(in, heads, in.window, workspace, executor, per_head);
}

/// How a head's window looks at an evictable token, row by row of the window.
struct WindowMoments {
  std::span<const float> means;       ///< [evictable]
  std::span<const float> deviations;  ///< [evictable], sums of squared distances from the mean
  std::span<const float> entropies;   ///< [evictable], sums of -a ln(a + 1e-10); empty unless asked for
};

/// Whether `window_moments` takes a logarithm of every weight.
enum class Entropies { no, yes };

/// Calls `per_head(query_head, WindowMoments)` for each of `heads`: what CAKE looks at. Attention sums alone
/// do not show it. Means and deviations by Welford's recurrence, the window's rows ascending. Throws as
/// `attention_sums`.
template <Entropies entropies, class Kv, Observation O, Executor X, class PerHead>
void window_moments(const LayerInput<Kv, O>& in, std::span<const std::uint32_t> heads, Workspace& workspace,
                    X& executor, PerHead&& per_head) {
  static_assert(!SumsObservation<O>,
                "this scorer needs the window's rows apart: give queries or an attention matrix, not sums");
  constexpr std::size_t arrays = entropies == Entropies::yes ? 3 : 2;
  const compresskv::detail::PlainFloats plain;
  detail::for_head_groups(
      in, heads, in.window, arrays, [&](auto group, std::size_t observers, std::size_t queries_at_once) {
        const std::size_t evictable = in.evictable(group[0] / in.shape.group());
        const std::span<float> moments =
            workspace.take(Workspace::Slot::sums, group.size() * arrays * evictable);
        std::fill(moments.begin(), moments.end(), 0.0F);
        const auto add = [&](std::size_t h, std::size_t query, std::size_t first, std::size_t tokens,
                             const ScaledRows& rows) {
          float* means = moments.data() + h * arrays * evictable + first;
          float* deviations = means + evictable;
          for (std::size_t i = 0; i < rows.count; ++i) {
            const float step = 1.0F / static_cast<float>(query + i + 1);
            for (std::size_t t = 0; t < tokens; ++t) {
              const float weight = rows.factor(i) * rows.row(i)[t];
              const float distance = weight - means[t];
              means[t] += distance * step;
              deviations[t] += distance * (weight - means[t]);
              if constexpr (entropies == Entropies::yes) {
                deviations[evictable + t] -= weight * std::log(weight + 1e-10F);
              }
            }
          }
        };
        detail::add_attention(in, group, observers, queries_at_once, workspace, executor, add);
        for (std::size_t h = 0; h < group.size(); ++h) {
          const std::span<const float> own = moments.subspan(h * arrays * evictable, arrays * evictable);
          for (std::size_t array = 0; array < arrays; ++array) {
            detail::check_finite(in, group[h], own.subspan(array * evictable, evictable));
          }
          per_head(group[h], WindowMoments{.means = own.first(evictable),
                                           .deviations = own.subspan(evictable, evictable),
                                           .entropies = own.subspan(2 * evictable)});
        }
      });
}

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

/// `attention_sums` of all query heads of the model, ascending.
template <class Kv, Observation O, Executor X, class PerHead>
void attention_sums_of_all_heads(const LayerInput<Kv, O>& in, std::size_t observers, Workspace& workspace,
                                 X& executor, PerHead&& per_head) {
  for_all_heads(in.shape, [&](std::span<const std::uint32_t> heads) {
    attention_sums(in, heads, observers, workspace, executor, per_head);
  });
}

}  // namespace compresskv::kernel

#include "compresskv/core/strict_float_end.hpp"
