#pragma once

#include <cstddef>
#include <span>

#include "compresskv/core/policy.hpp"
#include "compresskv/core/scores.hpp"
#include "compresskv/score/scorer.hpp"
#include "compresskv/score/window_scorer.hpp"

namespace compresskv::score {

struct StreamingOptions {
  std::size_t sinks = 4;   ///< first tokens, kept before any other
  std::size_t window = 8;  ///< most recent tokens, kept whatever the budget, as in the other methods
};

/// StreamingLLM: the first tokens (attention sinks) and the most recent ones, whatever they say.
///
/// Position only, true positions kept. Paper: Xiao et al., ICLR 2024 (arXiv 2309.17453); docs/method.md 3.9.
/// Cost: one pass over the scores; no key is read.
class StreamingLlm : public WindowScorer<Granularity::layer, Needs::nothing, StreamingOptions> {
 public:
  using WindowScorer::WindowScorer;

  template <class Kv, class O, class X>
  void score(const kernel::LayerInput<Kv, O>&, Workspace&, X&, const Scores<granularity>& scores) const {
    // Float32 holds every integer up to 2^24: enough for prompts of 16 million tokens.
    const std::span<float> values = scores.row(0);
    const auto count = static_cast<float>(values.size());
    for (std::size_t t = 0; t < values.size(); ++t) {
      values[t] = t < options().sinks ? count : static_cast<float>(t);
    }
  }
};

}  // namespace compresskv::score
