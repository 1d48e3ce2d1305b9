#pragma once

#include <concepts>
#include <cstddef>

#include "compresskv/core/head_ranking.hpp"
#include "compresskv/core/head_scores.hpp"
#include "compresskv/score/blended_retrieval.hpp"
#include "compresskv/score/carried.hpp"
#include "compresskv/score/semantic_retrieval.hpp"
#include "compresskv/score/window_scorer.hpp"

namespace compresskv::score {

/// Ours: `Blend` for engines that cannot hold all layers whole. What the layers so far have seen (Carried)
/// stands in for the whole model, and each layer shrinks as it arrives.
///
/// docs/method.md 3.13. Cost: as SemanticRetrieval with twice the heads; two floats a token of the prompt.
class BlendCarried : public BlendedRetrieval<Carried> {
 public:
  struct Options {
    std::size_t heads_per_layer = 4;  ///< of Carried and of the layer's own
    float decay = 0.7F;               ///< what is left of a layer's scores one layer later, 0 to 1
    std::size_t hold_layers = 0;      ///< first layers that wait, as Carried has it
    BlendShares shares = {};
    std::size_t window = 16;
    kernel::Pool pool = kernel::Pool::trailing;
    std::size_t pool_width = 9;  ///< odd
  };

  /// Throws ArgumentError as Carried, and for a share outside 0 to 1.
  BlendCarried(const HeadScores& scores, const Options& options)
      : BlendedRetrieval({scores,
                          {.heads_per_layer = options.heads_per_layer,
                           .window = options.window,
                           .pool = options.pool,
                           .pool_width = options.pool_width}},
                         {scores,
                          {.heads_per_layer = options.heads_per_layer,
                           .decay = options.decay,
                           .hold_layers = options.hold_layers,
                           .window = options.window,
                           .pool = options.pool,
                           .pool_width = options.pool_width}},
                         options.shares) {}
  template <std::same_as<HeadRanking> Ranking>
  BlendCarried(const Ranking&, const Options&) {
    static_assert(!std::same_as<Ranking, HeadRanking>,
                  "a ranking says who is better, not by how much: give the raw head scores that calibration "
                  "writes (io::load_head_scores)");
  }
};

}  // namespace compresskv::score
