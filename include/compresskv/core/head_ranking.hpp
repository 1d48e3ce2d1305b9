#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "compresskv/core/error.hpp"
#include "compresskv/core/order.hpp"
#include "compresskv/core/shape.hpp"

namespace compresskv {

/// For each layer its query heads, best retriever first: what calibration finds once per model
/// (docs/method.md 6.3) and `score::SemanticRetrieval` reads. A layer may list only its best heads.
class HeadRanking {
 public:
  /// `layers[l]` lists query heads of layer `l` by falling retrieval score.
  /// Throws ArgumentError when there is no layer, a layer is empty or a head stands twice in a layer.
  explicit HeadRanking(std::vector<std::vector<std::uint32_t>> layers) : layers_(std::move(layers)) {
    detail::require(!layers_.empty(), "head ranking has no layer: give one list of heads a layer");
    for (std::size_t layer = 0; layer < layers_.size(); ++layer) {
      const auto& heads = layers_[layer];
      detail::require(!heads.empty(), "head ranking of layer ", layer, " is empty: list at least one head");
      // A head that stands twice stands beside itself once they are sorted: a list may be as long as a file.
      const std::vector<std::uint32_t> order =
          detail::by_falling(std::vector<double>(heads.begin(), heads.end()));
      for (std::size_t i = 1; i < order.size(); ++i) {
        detail::require(heads[order[i]] != heads[order[i - 1]], "head ranking of layer ", layer,
                        " lists head ", heads[order[i]], " twice, at places ", order[i - 1], " and ",
                        order[i], ": each head may stand once");
      }
    }
  }

  std::size_t layers() const { return layers_.size(); }

  /// Query heads of `layer`, best first. `layer` must be below `layers()`.
  std::span<const std::uint32_t> heads(std::size_t layer) const { return layers_[layer]; }

  /// Throws ArgumentError when the ranking is not one of a model with `layers` layers of `query_heads` heads.
  void validate(std::size_t layers, std::size_t query_heads) const {
    detail::require(layers_.size() == layers, "head ranking has ", layers_.size(), " layers, the model has ",
                    layers, ": use the ranking calibrated for this model");
    for (std::size_t layer = 0; layer < layers_.size(); ++layer) {
      for (const std::uint32_t head : layers_[layer]) {
        detail::require(head < query_heads, "head ranking of layer ", layer, " names head ", head,
                        ", the model has heads 0 to ", query_heads - 1,
                        ": use the ranking calibrated for this model");
      }
    }
  }

  friend bool operator==(const HeadRanking&, const HeadRanking&) = default;

 private:
  std::vector<std::vector<std::uint32_t>> layers_;
};

}  // namespace compresskv
