#pragma once

#include <algorithm>
#include <cstddef>
#include <span>

#include "compresskv/core/error.hpp"
#include "compresskv/core/float_mode.hpp"
#include "compresskv/core/policy.hpp"
#include "compresskv/core/scores.hpp"
#include "compresskv/core/strict_float_begin.hpp"
#include "compresskv/kernel/exp2.hpp"
#include "compresskv/kernel/finite_checks.hpp"
#include "compresskv/kernel/ranks.hpp"
#include "compresskv/kernel/row_reader.hpp"
#include "compresskv/kernel/scaled_deviation.hpp"
#include "compresskv/kernel/softmax_portable.hpp"
#include "compresskv/score/scorer.hpp"
#include "compresskv/score/window_scorer.hpp"

namespace compresskv::score {

struct LagKvOptions {
  std::size_t sinks = 4;   ///< first positions, kept before any other
  std::size_t lag = 128;   ///< rows of a stretch, at least 2
  bool ranked = true;      ///< within each stretch; false: scores of all stretches and KV heads compete
  std::size_t window = 8;  ///< most recent tokens, kept whatever the budget
};

/// LagKV: tokens that the next stretch of text does not foretell.
///
///     | sinks | stretch 0 | stretch 1 | ... | last whole stretch, and what is left: the tail |
///
///     x'[e]       = (x[e] - min) / (max - min)     least and largest element e of the next stretch's rows
///     s[t]        = softmax over the stretch  ( standard deviation over e  of x'[t] )
///     score[g][t] = rank of (s of keys + s of values) / 2 within the stretch, divided by its rows
///
/// The standard deviation is that of a sample (divided by head_dim - 1, 0 where that is 0). An element that
/// is the same in all rows of the next stretch counts as 0. Looks at no query.
///
/// Of a capacity, window included, the sinks come first; then the tail, the most recent row first; what is
/// left goes to the stretches, each keeping equally many (where that does not come out even, the first ones
/// one more). The tail has `lag` to `2 lag - 1` rows: where it and the sinks are all that the capacity holds,
/// this is StreamingLLM, so choose `lag` well below half of the capacity. A stretch into which the window
/// reaches belongs to the tail. With fewer than two whole stretches all rows behind the sinks do.
///
/// `ranked = false` leaves the ranks out, and stretches and (with `select::Adaptive`) KV heads keep what they
/// are worth beside the others.
///
/// Stretches are of rows, counted behind the sinks; sinks are positions. So in a later turn the rows kept are
/// judged anew, beside those appended since.
///
/// Paper: Liang et al. (arXiv 2504.04704). The authors' code takes 16 sinks and stretches of 1,024, keeps a
/// share of each stretch rather than a total, and never looks again at rows that it has kept. kvpress takes 4
/// and 128, and where its total cannot hold sinks and tail leaves it to `topk` which go. docs/method.md 3.14.
///
/// Throws ScoreError naming a key or value that is not finite; sinks and what follows the last whole stretch
/// are not read. Cost: keys and values are read twice; `lag` numbers and four rows a KV head.
class LagKv : public WindowScorer<Granularity::kv_head, Needs::keys_and_values, LagKvOptions> {
 public:
  LagKv() = default;
  /// Throws ArgumentError for no window, or a lag below 2.
  explicit LagKv(const Options& options) : WindowScorer(options) {
    detail::require(options.lag >= 2, "lag is ", options.lag,
                    ", must be at least 2: one row has no least and largest element");
  }

  template <class Kv, class O, class X>
  void score(const kernel::LayerInput<Kv, O>& in, Workspace& workspace, X& executor,
             const Scores<granularity>& scores) const {
    const std::size_t heads = in.shape.kv_heads;
    const std::size_t head_dim = in.shape.head_dim;
    const std::size_t longest = *std::max_element(in.rows.begin(), in.rows.end());
    // Where no KV head has two stretches nothing is compared.
    const std::size_t lag = options().lag <= longest / 2 ? options().lag : 0;
    const std::size_t own = 4 * head_dim + lag;
    const std::span<float> buffers = workspace.take(Workspace::Slot::key_rows, heads * own);
    const std::span<std::size_t> numbers = workspace.take_counts(heads * (lag + 1));
    kernel::RefusedRows refused(numbers.first(heads));
    executor.parallel_for(heads, [&](std::size_t kv_head) {
      const detail::PlainFloats plain;
      const std::span<float> row = scores.row(kv_head);
      const std::size_t sinks = (std::min)(in.retained.rows_before(options().sinks, kv_head), row.size());
      const std::size_t stretches = lag == 0 ? 0 : scored_stretches(in.rows[kv_head], row.size(), sinks);
      const std::size_t tail = sinks + stretches * lag;
      if (stretches > 0) {
        const std::span<float> compared = row.subspan(sinks, stretches * lag);
        const Scratch scratch(buffers.subspan(kv_head * own, own), head_dim);
        std::fill(compared.begin(), compared.end(), 0.0F);
        add_part<kernel::Part::keys>(in, kv_head, sinks, compared, scratch, refused);
        add_part<kernel::Part::values>(in, kv_head, sinks, compared, scratch, refused);
        for (std::size_t first = 0; options().ranked && first < compared.size(); first += lag) {
          kernel::rank(compared.subspan(first, lag), numbers.subspan(heads + kv_head * lag, lag));
        }
      }
      // Above all of them, and below the sinks. Float32 holds each of these integers up to 2^24.
      for (std::size_t t = tail; t < row.size(); ++t) {
        row[t] = static_cast<float>(t - tail + 2);
      }
      std::fill_n(row.begin(), sinks, static_cast<float>(row.size() - tail + 2));
    });
    refused.check(in.layer);
  }

 private:
  /// Memory of one KV head.
  struct Scratch {
    Scratch(std::span<float> all, std::size_t head_dim)
        : row(all.data()),
          scaled(row + head_dim),
          next{.least = scaled + head_dim, .largest = scaled + 2 * head_dim},
          deviations(all.subspan(4 * head_dim)) {}

    float* row;
    float* scaled;
    kernel::Bounds next;          // of the next stretch
    std::span<float> deviations;  // of the stretch's rows
  };

  /// Stretches that have a whole next one and end before the window.
  std::size_t scored_stretches(std::size_t rows, std::size_t evictable, std::size_t sinks) const {
    const std::size_t whole = (rows - sinks) / options().lag;
    return (std::min)(whole == 0 ? 0 : whole - 1, (evictable - sinks) / options().lag);
  }

  /// Adds half of what keys or values give to the scores of all stretches.
  template <kernel::Part part, class Kv, class O>
  void add_part(const kernel::LayerInput<Kv, O>& in, std::size_t kv_head, std::size_t sinks,
                std::span<float> scores, const Scratch& scratch, kernel::RefusedRows& refused) const {
    const std::size_t lag = options().lag;
    const std::size_t head_dim = in.shape.head_dim;
    // Both read into one buffer: a row is done with when the next one comes.
    kernel::RowReader<part, Kv> targets(in.kv, kv_head, scratch.row);
    kernel::RowReader<part, Kv> references(in.kv, kv_head, scratch.row);
    targets.skip_to(sinks);
    references.skip_to(sinks + lag);
    for (std::size_t first = 0; first < scores.size(); first += lag) {
      const std::size_t next = sinks + first + lag;
      references.read_to(next + lag, [&](std::size_t t, const float* row) {
        if (t == next) {
          std::copy_n(row, head_dim, scratch.next.least);
          std::copy_n(row, head_dim, scratch.next.largest);
        }
        refused.look(kv_head, part, t, kernel::widen(row, head_dim, scratch.next));
      });
      targets.read_to(next, [&](std::size_t t, const float* row) {
        if (first == 0) {  // the others have been looked at as a next stretch
          refused.look(kv_head, part, t, kernel::row_is_finite(row, head_dim));
        }
        scratch.deviations[t + lag - next] =
            kernel::scaled_deviation(row, head_dim, scratch.next, scratch.scaled);
      });
      add_softmax(scratch.deviations, scores.subspan(first, lag));
    }
  }

  /// Adds half the softmax of `values`, which are changed, to `scores`.
  static void add_softmax(std::span<float> values, std::span<float> scores) {
    const float most = kernel::portable::row_max(values.data(), values.size());
    double total = 0.0;
    for (float& value : values) {
      value = kernel::portable::exp2((value - most) * kernel::log2_e);
      total += static_cast<double>(value);
    }
    for (std::size_t t = 0; t < values.size(); ++t) {
      scores[t] += static_cast<float>(0.5 * static_cast<double>(values[t]) / total);
    }
  }
};

}  // namespace compresskv::score

#include "compresskv/core/strict_float_end.hpp"
