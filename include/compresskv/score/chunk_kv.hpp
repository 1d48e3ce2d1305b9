#pragma once

#include <algorithm>
#include <cstddef>
#include <span>
#include <utility>

#include "compresskv/core/error.hpp"
#include "compresskv/core/float_bits.hpp"
#include "compresskv/core/float_mode.hpp"
#include "compresskv/core/policy.hpp"
#include "compresskv/core/scores.hpp"
#include "compresskv/core/shape.hpp"
#include "compresskv/core/strict_float_begin.hpp"
#include "compresskv/core/workspace.hpp"
#include "compresskv/kernel/layer_input.hpp"
#include "compresskv/score/scorer.hpp"

namespace compresskv::score {

struct ChunkKvOptions {
  std::size_t chunk = 20;  ///< positions of a chunk
};

/// ChunkKV: whole chunks of neighbouring tokens stay, whatever method scores them.
///
///     score[.][t] = mean of the scorer's scores over the rows of t's chunk: positions 20 n to 20 n + 19
///
/// Equal scores keep the lower position, so the best chunks stay whole, and of the last one that there is
/// room for the first rows: the capacity is met exactly. With `select::Adaptive` that is so for what a KV
/// head keeps for itself and for the layer. The mean is over the evictable rows that are there: a chunk into
/// which the window reaches, the last one, or one that was cut in an earlier turn counts by what it has.
/// Chunks are of positions, so the same in all KV heads, layers and turns, whatever was evicted or taken
/// back. Protected tokens stay without their chunks.
///
/// Granularity, needs and window are those of the scorer. One that reaches over layers does not compile: its
/// scores travel by token. Ranks may add their means, as a mean of sums is the sum of means.
///
/// Paper: Liu et al., NeurIPS 2025 (arXiv 2502.00299): the window's attention, `floor(capacity / 20)` chunks
/// beside the window; neighbouring layers may share one choice, which is left out here. kvpress, the authors'
/// code, has one set for all KV heads (here `HeadMean`), keeps `floor(chunks * share)` of them and no window,
/// so that its total is off by up to a chunk. docs/method.md 3.16.
///
/// Throws as the scorer. Cost: that of the scorer, and two passes over the scores.
template <Scorer S>
class ChunkKv {
 public:
  static constexpr Granularity granularity = S::granularity;
  static constexpr Needs needs = S::needs;
  static constexpr Reach reach = S::reach;
  static_assert(reach == Reach::own_layer,
                "the scores of this scorer travel from layer to layer, token by token: chunks can be made of "
                "one that looks at its own layer alone (SnapKv, SemanticRetrieval, ...)");
  using Options = ChunkKvOptions;

  /// Throws ArgumentError for a chunk of no positions.
  explicit ChunkKv(S scorer, const Options& options = {}) : scorer_(std::move(scorer)), options_(options) {
    detail::require(options.chunk > 0, "chunk is 0, must be 1 position or more");
  }

  std::size_t window() const { return scorer_.window(); }
  const Options& options() const { return options_; }
  const S& scorer() const { return scorer_; }
  void validate(const ModelShape& shape) const { scorer_.validate(shape); }

  template <class Kv, class O, class X>
  void score(const kernel::LayerInput<Kv, O>& in, Workspace& workspace, X& executor,
             const Scores<granularity>& scores) const {
    scorer_.score(in, workspace, executor, scores);
    const detail::PlainFloats plain;
    for (std::size_t row = 0; row < scores.rows(); ++row) {
      const std::span<float> values = scores.row(row);
      Retained::Cursor ends = in.retained.cursor(row);
      for (std::size_t first = 0; first < values.size();) {
        const std::size_t chunk = ends.seek(first) / options_.chunk;
        double sum = 0.0;
        std::size_t last = first;
        for (; last < values.size() && ends.seek(last) / options_.chunk == chunk; ++last) {
          sum += static_cast<double>(values[last]);
        }
        // What is not finite stays, so that the error names its own token.
        if (detail::is_finite(sum)) {
          std::fill(values.begin() + static_cast<std::ptrdiff_t>(first),
                    values.begin() + static_cast<std::ptrdiff_t>(last),
                    static_cast<float>(sum / static_cast<double>(last - first)));
        }
        first = last;
      }
    }
  }

 private:
  S scorer_;
  Options options_;
};

}  // namespace compresskv::score

#include "compresskv/core/strict_float_end.hpp"
