#pragma once

#include <concepts>
#include <cstddef>

#include "compresskv/core/head_ranking.hpp"
#include "compresskv/core/head_scores.hpp"
#include "compresskv/score/blended_retrieval.hpp"
#include "compresskv/score/model_wide.hpp"
#include "compresskv/score/semantic_retrieval.hpp"
#include "compresskv/score/window_scorer.hpp"

namespace compresskv::score {

/// Ours, and the one to reach for: most rows go to what the whole model's best retrieval heads look at, the
/// others to what the layer's own do, and both keep what follows.
///
///     sinks, then model_share of the rows by ModelWide's scores, then by SemanticRetrieval's
///
/// Facts are found by few heads of the whole model; what else a layer needs, to go on with a text, its own
/// heads know. Both pool over the tokens before (`Pool::trailing`): a retrieval head looks at where an answer
/// begins, and without what follows answers end in the middle. Known only when all layers have been seen:
/// `Compressor::arrive` for each, then `finish`; where that is too much memory, `BlendCarried`.
/// docs/method.md 3.13. Cost: that of SemanticRetrieval and ModelWide; two floats a token of the prompt and a
/// number a kept row.
class Blend : public BlendedRetrieval<ModelWide> {
 public:
  struct Options {
    std::size_t heads = 16;           ///< of the whole model
    std::size_t heads_per_layer = 4;  ///< of the layer's own
    BlendShares shares = {};
    std::size_t window = 16;
    kernel::Pool pool = kernel::Pool::trailing;
    std::size_t pool_width = 9;  ///< odd
  };

  /// Throws ArgumentError for no heads or more than there are, a share outside 0 to 1, no window or an even
  /// pooling width.
  Blend(const HeadScores& scores, const Options& options)
      : BlendedRetrieval({scores,
                          {.heads_per_layer = options.heads_per_layer,
                           .window = options.window,
                           .pool = options.pool,
                           .pool_width = options.pool_width}},
                         {scores,
                          {.heads = options.heads,
                           .window = options.window,
                           .pool = options.pool,
                           .pool_width = options.pool_width}},
                         options.shares) {}
  template <std::same_as<HeadRanking> Ranking>
  Blend(const Ranking&, const Options&) {
    static_assert(!std::same_as<Ranking, HeadRanking>,
                  "a ranking compares heads of one layer alone: give the raw head scores that calibration "
                  "writes (io::load_head_scores)");
  }
};

}  // namespace compresskv::score
