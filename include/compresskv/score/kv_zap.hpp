#pragma once

#include <algorithm>
#include <cstddef>
#include <limits>
#include <span>
#include <type_traits>
#include <utility>

#include "compresskv/core/error.hpp"
#include "compresskv/core/float_mode.hpp"
#include "compresskv/core/policy.hpp"
#include "compresskv/core/scores.hpp"
#include "compresskv/core/strict_float_begin.hpp"
#include "compresskv/core/surrogate.hpp"
#include "compresskv/kernel/lanes.hpp"
#include "compresskv/kernel/logits.hpp"
#include "compresskv/kernel/packed_queries.hpp"
#include "compresskv/score/scorer.hpp"
#include "compresskv/score/window_scorer.hpp"
#include "compresskv/view/run.hpp"

namespace compresskv::score {

struct KvZapOptions {
  std::size_t window = 128;  ///< most recent tokens, kept whatever their scores
  std::size_t sinks = 4;     ///< first positions, kept before any other
};

/// KVzap, linear: what KVzip+ would find worth keeping, foretold from what goes into the layer's attention.
///
///     score[g][t] = weight[g] . hidden[t] + bias[g]
///
/// fitted to the logarithm of KVzip+'s scores. No second pass over the text, no query, no key: a row can be
/// judged as soon as its token was read, while an answer grows too. Goes with `select::Threshold`; a capacity
/// can be shared out by these scores as well.
///
/// After a compaction by a threshold rows whose hidden states are no longer shown stay: they were judged when
/// they were. Paper: Jegou and Jeblick (arXiv 2601.07891); docs/method.md 3.26. Departure: the first
/// positions stay, to which no surrogate is fitted. Cost: hidden_size multiply-adds a token and KV head;
/// hidden states are read once.
class KvZap : public WindowScorer<Granularity::kv_head, Needs::hidden_states, KvZapOptions> {
 public:
  /// Throws ArgumentError for no window.
  explicit KvZap(Surrogate surrogate, const Options& options = {})
      : WindowScorer(options), surrogate_(std::move(surrogate)) {}

  void validate(const ModelShape& shape) const { surrogate_.validate(shape.layers, shape.kv_heads); }

  template <class Kv, class O, class X>
  void score(const kernel::LayerInput<Kv, O>& in, Workspace& workspace, X& executor,
             const Scores<granularity>& scores) const {
    const std::size_t hidden_size = surrogate_.hidden_size();
    detail::require(in.observation.hidden_size() == hidden_size, "hidden states have ",
                    in.observation.hidden_size(), " elements, the surrogate's have ", hidden_size,
                    ": show what goes into the attention of the model it was calibrated for");
    const std::size_t heads = in.shape.kv_heads;
    const std::size_t shown = in.observation.tokens();
    const std::size_t first = in.retained.position(in.rows[0]) - shown;
    // Sinks, and rows that were judged when their hidden states were shown.
    const std::size_t certain = (std::max)(first, options().sinks);
    for (std::size_t head = 0; head < heads; ++head) {
      const std::span<float> row = scores.row(head);
      std::fill_n(row.begin(), (std::min)(row.size(), in.retained.rows_before(certain, head)), kept_score);
    }
    const kernel::PackedQueries weights = pack(in.layer, workspace);
    const std::size_t tiles = (shown + tile - 1) / tile;
    const std::size_t parts = (std::min)(most_parts, tiles);
    with_plain_element(in.observation.hidden_run(), [&](const auto& states) {
      using T = std::remove_cvref_t<decltype(*states.base)>;
      const std::size_t keys = kernel::round_up_to_lanes(kernel::key_buffer_size<T>(hidden_size));
      const std::size_t own = keys + heads * tile;
      const std::span<float> buffers = workspace.take(Workspace::Slot::logits, parts * own);
      executor.parallel_for(parts, [&](std::size_t part) {
        const detail::PlainFloats plain;
        float* const buffer = buffers.data() + part * own;
        for (std::size_t at = part * tile; at < shown; at += parts * tile) {
          const std::size_t count = (std::min)(tile, shown - at);
          kernel::logits(states, at, count, weights, 1.0F, buffer, buffer + keys, tile);
          for (std::size_t head = 0; head < heads; ++head) {
            hand_out(in, head, first + at, {buffer + keys + head * tile, count}, scores.row(head));
          }
        }
      });
    });
  }

 private:
  static constexpr std::size_t tile = 256;      // tokens
  static constexpr std::size_t most_parts = 6;  // tiles at a time: each takes memory
  /// Above what a surrogate gives, below that of protected tokens.
  static constexpr float kept_score = (std::numeric_limits<float>::max)() / 2;

  kernel::PackedQueries pack(std::size_t layer, Workspace& workspace) const {
    const std::size_t heads = surrogate_.kv_heads();
    const std::size_t hidden_size = surrogate_.hidden_size();
    const std::span<float> packed =
        workspace.take(Workspace::Slot::queries, kernel::PackedQueries::size(heads, hidden_size));
    std::fill(packed.begin(), packed.end(), 0.0F);
    for (std::size_t head = 0; head < heads; ++head) {
      kernel::PackedQueries::pack(head, surrogate_.weights(layer, head).data(), hidden_size, packed.data());
    }
    return {.data = packed.data(), .count = heads, .head_dim = hidden_size};
  }

  /// Products of tokens from `position` on become the scores of those that a KV head still holds.
  template <class Kv, class O>
  void hand_out(const kernel::LayerInput<Kv, O>& in, std::size_t head, std::size_t position,
                std::span<const float> products, std::span<float> row) const {
    const float bias = surrogate_.bias(in.layer, head);
    const std::size_t begin = in.retained.rows_before(position, head);
    const std::size_t end = in.retained.rows_before(position + products.size(), head);
    const bool all_held = end - begin == products.size();
    const std::size_t sinks = in.retained.rows_before(options().sinks, head);
    for (std::size_t t = (std::max)(begin, sinks); t < (std::min)(end, row.size()); ++t) {
      const std::size_t at = all_held ? t - begin : in.retained.position(t, head) - position;
      row[t] = products[at] + bias;
    }
  }

  Surrogate surrogate_;
};

}  // namespace compresskv::score

#include "compresskv/core/strict_float_end.hpp"
