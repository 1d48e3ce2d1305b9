#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>

#include "compresskv/core/float_mode.hpp"
#include "compresskv/core/output_weights.hpp"
#include "compresskv/core/policy.hpp"
#include "compresskv/core/scores.hpp"
#include "compresskv/core/strict_float_begin.hpp"
#include "compresskv/core/workspace.hpp"
#include "compresskv/kernel/output_norms.hpp"
#include "compresskv/kernel/window_attention.hpp"
#include "compresskv/score/kv_zip.hpp"
#include "compresskv/score/scorer.hpp"
#include "compresskv/score/window_scorer.hpp"

namespace compresskv::score {

/// KVzip+: as `KvZip`, attention weighed by how much it then adds to the hidden state.
///
///     score[g][t] = largest  softmax(q K^T)[t] || W_o[h] value[g][t] || / || hidden state of q ||  of any
///                   head h of group g and any query q of the tokens that repeat t's stretch
///
/// The hidden state is the one that attention is given, after the norm before it. The engine shows its length
/// for each query: the last argument of `Compressor::observe`.
///
/// Scores are held times 4096, so that half floats are precise to 11 bits from 1.5e-8 to 16. What is above
/// counts as 16.
///
/// Source: the variant of KVzip that KVzap (Jegou and Jeblick, arXiv 2601.07891) is trained to foretell, and
/// kvpress's `kvzip_plus_normalization`; docs/method.md 3.23. Cost: that of `KvZip`, and for each stretch
/// head_dim^2 multiply-adds for each of its values and query heads.
class KvZipPlus : public WindowScorer<Granularity::kv_head, Needs::repeats, KvZipOptions> {
 public:
  static constexpr Reach reach = Reach::all_layers;
  static constexpr bool reads_values = true;
  static constexpr bool needs_hidden_norms = true;

  explicit KvZipPlus(OutputWeights weights, const Options& options = {})
      : WindowScorer(options), weights_(std::move(weights)) {}

  std::size_t sinks() const { return options().sinks; }
  void validate(const ModelShape& shape) const {
    weights_.validate(shape.layers, shape.query_heads, shape.head_dim);
  }

  template <class Kv, class O, class X>
  void score(const kernel::LayerInput<Kv, O>& in, Workspace& workspace, X& executor,
             const Scores<granularity>& scores) const {
    std::fill(scores.values().begin(), scores.values().end(), 0.0F);
    const auto per_head = [&](std::uint32_t head, std::span<const float> maxima) {
      const detail::PlainFloats plain;
      const std::span<float> norms = workspace.take(Workspace::Slot::pooled, maxima.size());
      kernel::output_lengths(in, weights_, head, workspace, executor, norms);
      const std::span<float> row = scores.row(head / in.shape.group());
      for (std::size_t t = 0; t < row.size(); ++t) {
        const float score = maxima[t] * norms[t] * held_times;
        row[t] = (std::max)(row[t], score < largest ? score : largest);
      }
    };
    kernel::for_all_heads(in.shape, [&](std::span<const std::uint32_t> heads) {
      kernel::attention_maxima(in, heads, in.window, in.hidden_norms, workspace, executor, per_head);
    });
  }

 private:
  static constexpr float held_times = 4096.0F;
  static constexpr float largest = 65504.0F;  // of half floats

  OutputWeights weights_;
};

}  // namespace compresskv::score

#include "compresskv/core/strict_float_end.hpp"
