#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <span>

#include "compresskv/core/error.hpp"
#include "compresskv/core/float_bits.hpp"
#include "compresskv/core/float_mode.hpp"
#include "compresskv/core/policy.hpp"
#include "compresskv/core/scores.hpp"
#include "compresskv/core/strict_float_begin.hpp"
#include "compresskv/kernel/finite_checks.hpp"
#include "compresskv/kernel/key_rows.hpp"
#include "compresskv/kernel/row_reader.hpp"
#include "compresskv/score/scorer.hpp"
#include "compresskv/score/window_scorer.hpp"

namespace compresskv::score {

struct CurOptions {
  std::size_t sinks = 4;   ///< first positions, kept before any other
  std::size_t block = 16;  ///< rows among which lengths are shared out
  std::size_t window = 8;  ///< most recent tokens, kept whatever their scores
};

/// CUR (CurDKV): tokens whose key and value are long beside those around them.
///
///     k[g][t]     = || key[g][t] ||^2 / sum over its block of 16 rows  || key[g][u] ||^2       v likewise
///     score[g][t] = k[g][t] v[g][t] / sum over all rows  k[g][u] v[g][u]        1 for the first 4 positions
///
/// Squared lengths stand for the leverage scores of a CUR decomposition. Looks at no query. Blocks are of
/// rows, from the first on, whatever was evicted before: a block of positions with one row left would give it
/// all. The last block may be shorter, and the window counts in its blocks and in the sum. Where all keys or
/// all values of a block have length 0, its shares are 0. Sinks are positions.
///
/// Paper: Sengupta et al., NeurIPS 2025 (arXiv 2509.15038), which multiplies keys and values by a random
/// matrix first. Squares of what comes out are on average those of the row, and kvpress does without by
/// default, as we do. Blocks are kvpress's, which lets recent tokens go; here the window stays.
/// docs/method.md 3.15.
///
/// Throws ScoreError naming a key or value that is not finite, of the window too. Cost: all keys and values
/// are read once; four floats for each row of a block, a KV head.
class Cur : public WindowScorer<Granularity::kv_head, Needs::keys_and_values, CurOptions> {
 public:
  Cur() = default;
  /// Throws ArgumentError for no window or no block.
  explicit Cur(const Options& options) : WindowScorer(options) {
    detail::require(options.block > 0, "block is 0: lengths are shared out among 1 row or more");
  }

  template <class Kv, class O, class X>
  void score(const kernel::LayerInput<Kv, O>& in, Workspace& workspace, X& executor,
             const Scores<granularity>& scores) const {
    const std::size_t heads = in.shape.kv_heads;
    const std::size_t head_dim = in.shape.head_dim;
    const std::size_t block = (std::min)(options().block, *std::max_element(in.rows.begin(), in.rows.end()));
    // A row, and the squared lengths of a block's keys and values.
    const std::size_t own = head_dim + 2 * floats_per_length * block;
    const std::span<float> buffers = workspace.take(Workspace::Slot::key_rows, heads * own);
    kernel::RefusedRows refused(workspace.take_counts(heads));
    executor.parallel_for(heads, [&](std::size_t kv_head) {
      const detail::PlainFloats plain;
      const std::span<float> row = scores.row(kv_head);
      const std::size_t rows = in.rows[kv_head];
      float* const buffer = buffers.data() + kv_head * own;
      float* const of_keys = buffer + head_dim;
      float* const of_values = of_keys + floats_per_length * block;
      kernel::RowReader<kernel::Part::keys, Kv> keys(in.kv, kv_head, buffer);
      kernel::RowReader<kernel::Part::values, Kv> values(in.kv, kv_head, buffer);
      double total = 0.0;
      for (std::size_t first = 0; first < rows; first += block) {
        const std::size_t last = first + (std::min)(block, rows - first);
        const double all_keys =
            read_lengths<kernel::Part::keys>(keys, last, head_dim, kv_head, refused, of_keys);
        const double all_values =
            read_lengths<kernel::Part::values>(values, last, head_dim, kv_head, refused, of_values);
        for (std::size_t t = first; t < last; ++t) {
          const double share =
              share_of(of_keys, t - first, all_keys) * share_of(of_values, t - first, all_values);
          total += share;
          if (t < row.size()) {
            row[t] = static_cast<float>(share);
          }
        }
      }
      if (total > 0.0) {
        for (float& score : row) {
          score = static_cast<float>(static_cast<double>(score) / total);
        }
      }
      std::fill_n(row.begin(), (std::min)(in.retained.rows_before(options().sinks, kv_head), row.size()),
                  1.0F);
    });
    refused.check(in.layer);
  }

 private:
  /// Squares of float32 numbers are float64, which scratch memory holds in pairs of floats.
  static constexpr std::size_t floats_per_length = sizeof(double) / sizeof(float);

  /// Squared lengths of the rows up to `last`; their sum.
  template <kernel::Part part, class Reader>
  static double read_lengths(Reader& reader, std::size_t last, std::size_t head_dim, std::size_t kv_head,
                             kernel::RefusedRows& refused, float* lengths) {
    const std::size_t first = reader.at();
    double sum = 0.0;
    reader.read_to(last, [&](std::size_t t, const float* values) {
      const double length = kernel::squared_norm(values, head_dim);
      refused.look(kv_head, part, t, detail::is_finite(length));
      std::memcpy(lengths + floats_per_length * (t - first), &length, sizeof(length));
      sum += length;
    });
    return sum;
  }

  static double share_of(const float* lengths, std::size_t index, double sum) {
    double length = 0.0;
    std::memcpy(&length, lengths + floats_per_length * index, sizeof(length));
    return sum > 0.0 ? length / sum : 0.0;
  }
};

}  // namespace compresskv::score

#include "compresskv/core/strict_float_end.hpp"
