#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

#include "compresskv/core/policy.hpp"
#include "compresskv/core/scores.hpp"
#include "compresskv/core/strict_float_begin.hpp"
#include "compresskv/kernel/window_attention.hpp"
#include "compresskv/score/scorer.hpp"
#include "compresskv/score/window_scorer.hpp"

namespace compresskv::score {

/// Options of `KvZip`.
struct KvZipOptions {
  std::size_t sinks = 4;   ///< first tokens of the sequence: every stretch sees them, and they stay
  std::size_t window = 1;  ///< most recent tokens, kept whatever their scores
};

/// KVzip: what the model looks at when it repeats the context stays, whatever will be asked.
///
///     score[g][t] = largest  softmax(q K^T)[t]  of any head of group g and any query of the tokens that
///                   repeat t's stretch
///
/// The context is cut into stretches (2,048 tokens in the paper). For each the engine feeds a request to
/// repeat it and the stretch once more, shows the queries of what it fed by `Compressor::observe`, and takes
/// those tokens back; `finish` then shrinks all layers. The softmax is over the sinks, the stretch, and what
/// was fed up to the query. With `select::WholeModel` all layers and KV heads share one budget, as in the
/// paper; with a selector of one layer each layer has its own.
///
/// Differs from the paper: the last `window` tokens stay, and until `finish` scores are held as half floats,
/// of 11 bits. Paper: Kim et al., NeurIPS 2025 (arXiv 2505.23416); docs/method.md 3.18. Cost: that of feeding
/// the context once more, its attention twice; two bytes for each token, layer and KV head.
class KvZip : public WindowScorer<Granularity::kv_head, Needs::repeats, KvZipOptions> {
 public:
  static constexpr Reach reach = Reach::all_layers;

  using WindowScorer::WindowScorer;

  std::size_t sinks() const { return options().sinks; }

  template <class Kv, class O, class X>
  void score(const kernel::LayerInput<Kv, O>& in, Workspace& workspace, X& executor,
             const Scores<granularity>& scores) const {
    std::fill(scores.values().begin(), scores.values().end(), 0.0F);
    kernel::for_all_heads(in.shape, [&](std::span<const std::uint32_t> heads) {
      kernel::attention_maxima(in, heads, in.window, {}, workspace, executor,
                               [&](std::uint32_t head, std::span<const float> maxima) {
                                 const std::span<float> row = scores.row(head / in.shape.group());
                                 std::transform(row.begin(), row.end(), maxima.begin(), row.begin(),
                                                [](float a, float b) { return a < b ? b : a; });
                               });
    });
  }
};

}  // namespace compresskv::score

#include "compresskv/core/strict_float_end.hpp"
