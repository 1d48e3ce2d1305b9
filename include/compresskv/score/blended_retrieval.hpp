#pragma once

#include <cstddef>
#include <utility>

#include "compresskv/core/error.hpp"
#include "compresskv/core/float_bits.hpp"
#include "compresskv/core/policy.hpp"
#include "compresskv/core/scores.hpp"
#include "compresskv/core/shape.hpp"
#include "compresskv/core/workspace.hpp"
#include "compresskv/kernel/layer_input.hpp"
#include "compresskv/score/semantic_retrieval.hpp"

namespace compresskv::score {

/// How a blend shares out the rows of a layer.
struct BlendShares {
  std::size_t sinks = 4;     ///< first positions, which always stay
  double model_share = 0.6;  ///< of what is left beside window and sinks: rows that the whole model chooses
};

/// What `Blend` and `BlendCarried` are: rows of each layer shared between heads of other layers (`Shared`:
/// ModelWide or Carried) and its own (SemanticRetrieval).
///
///     | sinks | chosen by the shared scores | chosen by the layer's own | window |
///
/// The shares count rows, not scores: two heads' scores are no common currency. docs/method.md 3.13.
template <class Shared>
class BlendedRetrieval {
 public:
  static constexpr Granularity granularity = Granularity::layer;
  static constexpr Needs needs = Needs::window_attention;
  static constexpr Reach reach = Shared::reach;

  /// Throws ArgumentError for a share outside 0 to 1.
  BlendedRetrieval(SemanticRetrieval own, Shared shared, const BlendShares& shares)
      : own_(std::move(own)), shared_(std::move(shared)), shares_(shares) {
    detail::require(
        detail::is_finite(shares.model_share) && shares.model_share >= 0.0 && shares.model_share <= 1.0,
        "model_share is ", shares.model_share, ", must be between 0 and 1");
  }

  std::size_t window() const { return own_.window(); }
  const BlendShares& shares() const { return shares_; }
  /// What travels from layer to layer.
  const Shared& shared() const { return shared_; }
  float decay() const { return shared_.decay(); }
  std::size_t hold_layers() const requires(reach == Reach::earlier_layers) { return shared_.hold_layers(); }

  void validate(const ModelShape& shape) const {
    own_.validate(shape);
    shared_.validate(shape);
  }

  /// The layer's own scores.
  template <class Kv, class O, class X>
  void score(const kernel::LayerInput<Kv, O>& in, Workspace& workspace, X& executor,
             const Scores<granularity>& scores) const {
    own_.score(in, workspace, executor, scores);
  }

 private:
  SemanticRetrieval own_;
  Shared shared_;
  BlendShares shares_;
};

}  // namespace compresskv::score
