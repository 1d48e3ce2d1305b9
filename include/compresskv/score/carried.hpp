#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "compresskv/core/error.hpp"
#include "compresskv/core/float_bits.hpp"
#include "compresskv/core/head_ranking.hpp"
#include "compresskv/core/head_scores.hpp"
#include "compresskv/core/policy.hpp"
#include "compresskv/score/scorer.hpp"
#include "compresskv/score/weighted_retrieval.hpp"

namespace compresskv::score {

/// Ours: retrieval heads of all layers so far choose, each layer as it arrives.
///
///     s_l[t] = decay * s_(l-1)[t] + sum over the layer's top k heads h  r[l][h] * A[l][h][t]
///
/// `A` is a head's pooled window score (docs/method.md 2.1, 2.2), `r` its retrieval score (Eq. 5 of
/// arXiv 2606.24467): a layer whose heads retrieve nothing follows those below it. Scores go by position.
/// Layers below the first retrieving heads know little: the first `hold_layers` wait for the scores of the
/// layer that comes after them, and that many full layers are then alive at once. Arrives by
/// `Compressor::arrive`; docs/method.md 3.11. Cost: that of SemanticRetrieval, and two floats a token of the
/// prompt.
class Carried : public WeightedRetrieval {
 public:
  static constexpr Reach reach = Reach::earlier_layers;

  struct Options {
    std::size_t heads_per_layer = 4;  ///< k, by falling score
    float decay = 0.7F;               ///< what is left of a layer's scores one layer later, 0 to 1
    std::size_t hold_layers = 0;      ///< at most all layers but the last
    std::size_t window = 16;
    kernel::Pool pool = kernel::Pool::average;
    std::size_t pool_width = 5;  ///< odd
    bool equal_weights = false;  ///< r = 1 for the chosen heads: an ablation
  };

  /// Throws ArgumentError for no heads or more than the model has, a decay outside 0 to 1, no window or an
  /// even pooling width.
  Carried(const HeadScores& scores, const Options& options)
      : WeightedRetrieval(weighted(scores, options), scores.heads(), PooledWindow::of(options)),
        decay_(options.decay),
        hold_layers_(options.hold_layers) {
    detail::require(detail::is_finite(options.decay) && options.decay >= 0.0F && options.decay <= 1.0F,
                    "decay is ", options.decay, ", must be between 0 and 1");
  }
  template <std::same_as<HeadRanking> Ranking>
  Carried(const Ranking&, const Options&) {
    static_assert(!std::same_as<Ranking, HeadRanking>,
                  "a ranking says who is better, not by how much: give the raw head scores that calibration "
                  "writes (io::load_head_scores)");
  }

  float decay() const { return decay_; }
  std::size_t hold_layers() const { return hold_layers_; }

 private:
  static Heads weighted(const HeadScores& scores, const Options& options) {
    detail::require(options.heads_per_layer > 0 && options.heads_per_layer <= scores.heads(),
                    "heads_per_layer is ", options.heads_per_layer, ", must be 1 to the ", scores.heads(),
                    " heads of a layer");
    const HeadRanking ranking = scores.ranking();
    Heads layers(scores.layers());
    for (std::size_t layer = 0; layer < layers.size(); ++layer) {
      for (const std::uint32_t head : ranking.heads(layer).first(options.heads_per_layer)) {
        layers[layer].push_back(
            {.head = head, .weight = options.equal_weights ? 1.0 : scores.mean(layer, head)});
      }
    }
    return layers;
  }

  float decay_;
  std::size_t hold_layers_;
};

}  // namespace compresskv::score
