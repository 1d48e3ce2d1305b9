#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "compresskv/core/error.hpp"
#include "compresskv/core/head_ranking.hpp"
#include "compresskv/core/head_scores.hpp"
#include "compresskv/core/order.hpp"
#include "compresskv/core/policy.hpp"
#include "compresskv/score/scorer.hpp"
#include "compresskv/score/weighted_retrieval.hpp"

namespace compresskv::score {

/// Ours: the few best retrieval heads of the whole model choose one set of tokens for all layers.
///
///     s[t] = sum over the N best (layer, head) pairs  r[l][h] * A[l][h][t]
///
/// `A` is a head's pooled window score (docs/method.md 2.1, 2.2), `r` its retrieval score (Eq. 5 of
/// arXiv 2606.24467). Known only when all layers have been seen: `Compressor::arrive` for each, then
/// `finish`, which shrinks them all; the whole cache is alive until then. Equal scores `r`: the lower layer,
/// then the lower head; docs/method.md 3.12. Cost: window attention of N heads in all, and two floats a token
/// of the prompt.
class ModelWide : public WeightedRetrieval {
 public:
  static constexpr Reach reach = Reach::all_layers;

  struct Options {
    std::size_t heads = 16;  ///< N, of the whole model
    std::size_t window = 16;
    kernel::Pool pool = kernel::Pool::average;
    std::size_t pool_width = 5;  ///< odd
    bool equal_weights = false;  ///< r = 1 for the chosen heads: an ablation
  };

  /// Throws ArgumentError for no heads or more than the model has, no window or an even pooling width.
  ModelWide(const HeadScores& scores, const Options& options)
      : WeightedRetrieval(weighted(scores, options), scores.heads(), PooledWindow::of(options)) {}
  template <std::same_as<HeadRanking> Ranking>
  ModelWide(const Ranking&, const Options&) {
    static_assert(!std::same_as<Ranking, HeadRanking>,
                  "a ranking compares heads of one layer alone: give the raw head scores that calibration "
                  "writes (io::load_head_scores)");
  }

  /// Layers add up as they are.
  float decay() const { return 1.0F; }

 private:
  static Heads weighted(const HeadScores& scores, const Options& options) {
    const std::size_t all = scores.layers() * scores.heads();
    detail::require(options.heads > 0 && options.heads <= all, "heads is ", options.heads,
                    ", must be 1 to the ", all, " of the model");
    std::vector<double> means;  // [layer][head]
    for (std::size_t layer = 0; layer < scores.layers(); ++layer) {
      for (std::size_t head = 0; head < scores.heads(); ++head) {
        means.push_back(scores.mean(layer, head));
      }
    }
    Heads layers(scores.layers());
    const std::vector<std::uint32_t> best = detail::by_falling(means);
    for (const std::uint32_t pair : std::span(best).first(options.heads)) {
      layers[pair / scores.heads()].push_back({.head = static_cast<std::uint32_t>(pair % scores.heads()),
                                               .weight = options.equal_weights ? 1.0 : means[pair]});
    }
    return layers;
  }
};

}  // namespace compresskv::score
