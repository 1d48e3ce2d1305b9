#pragma once

#include <Eigen/Cholesky>
#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "compresskv/core/error.hpp"
#include "compresskv/core/float_bits.hpp"
#include "compresskv/core/float_mode.hpp"
#include "compresskv/core/sizes.hpp"
#include "compresskv/core/surrogate.hpp"
#include "compresskv/kernel/decode_row.hpp"
#include "compresskv/view/observation.hpp"
#include "compresskv/view/run.hpp"

namespace compresskv::calibrate {

/// Fits a `Surrogate`: the linear map from hidden states to the logarithm of the scores that tokens were
/// given. Needs Eigen, so compresskv.hpp does not include it.
///
///     weights, bias  minimise  sum over tokens ( weights . hidden + bias - log score )^2  +  ridge v n
///     |weights|^2
///
/// in closed form for each layer and KV head, `n` being the tokens and `v` the mean variance of an element,
/// so that `ridge` has no unit. The bias is not held back. An engine feeds it texts of the kind that the
/// model will read: what goes into each layer's attention, and what repeats gave the tokens by
/// `score::KvZipPlus` (`Compressor::repeat_scores`).
///
/// Sums in float64 around running means, so that a mean far from 0 costs no digits. Accumulators of several
/// processes `merge`; the same parts merged in the same order give the same bits. Not safe to share between
/// threads without a lock. Cost: hidden_size^2 multiply-adds a token and layer, and as many float64 a layer
/// of memory.
class SurrogateAccumulator {
 public:
  /// Scores below it are taken for it: the least that those of `score::KvZipPlus` are told from 0 by.
  static constexpr double least_score = 0x1p-36;

  /// Throws ArgumentError when a size is 0 or beyond memory.
  SurrogateAccumulator(std::size_t layers, std::size_t kv_heads, std::size_t hidden_size)
      : kv_heads_(kv_heads), hidden_size_(hidden_size) {
    using compresskv::detail::require;
    require(layers > 0 && kv_heads > 0 && hidden_size > 0,
            "surrogate accumulator needs at least one layer, KV head and element, got ", layers,
            " layers of ", kv_heads, " KV heads of ", hidden_size, " elements");
    require(compresskv::detail::fits_in_memory(sizeof(double), {layers, hidden_size, hidden_size + kv_heads}),
            "surrogates of ", layers, " layers of ", kv_heads, " KV heads of ", hidden_size,
            " elements do not fit in memory");
    layers_.assign(layers, Sums(index(kv_heads), index(hidden_size)));
  }

  /// Takes tokens of a layer: what went into its attention, and their scores, `[kv_head][token]`, 0 or more.
  /// Throws ArgumentError, and takes nothing, when the layer does not exist, sizes differ, or a number is not
  /// finite or a score is below 0.
  template <HiddenObservation O>
  void add(std::size_t layer, const O& states, std::span<const float> scores) {
    using compresskv::detail::require;
    const std::size_t tokens = states.tokens();
    require(layer < layers_.size(), "layer is ", layer, ", the surrogate has layers 0 to ",
            layers_.size() - 1);
    require(states.hidden_size() == hidden_size_, "hidden states have ", states.hidden_size(),
            " elements, the surrogate's have ", hidden_size_, ": give those of the model");
    require(scores.size() == tokens * kv_heads_, "layer ", layer, " gives ", scores.size(), " scores for ",
            tokens, " tokens of ", kv_heads_, " KV heads, must be ", tokens * kv_heads_);
    const compresskv::detail::PlainFloats plain;
    Eigen::MatrixXd hidden(index(tokens), index(hidden_size_));
    Eigen::MatrixXd targets(index(tokens), index(kv_heads_));
    std::vector<float> state(hidden_size_);
    for (std::size_t t = 0; t < tokens; ++t) {
      with_plain_element(states.hidden_run(),
                         [&](const auto& run) { kernel::decode_row(run, t, hidden_size_, state.data()); });
      for (std::size_t e = 0; e < hidden_size_; ++e) {
        require(compresskv::detail::is_finite(state[e]), "hidden state of layer ", layer, " token ", t,
                " has ", state[e], " as element ", e, ": every number must be finite");
        hidden(index(t), index(e)) = static_cast<double>(state[e]);
      }
      for (std::size_t head = 0; head < kv_heads_; ++head) {
        const float score = scores[head * tokens + t];
        require(compresskv::detail::is_finite(score) && score >= 0.0F, "score of layer ", layer, " KV head ",
                head, " token ", t, " is ", score,
                ", must be finite and not below 0: give what repeats gave");
        targets(index(t), index(head)) = std::log((std::max)(static_cast<double>(score), least_score));
      }
    }
    join(layers_[layer], sums_of(hidden, targets));
  }

  /// Takes all that another accumulator was fed. Throws ArgumentError, and takes nothing, when it is of
  /// another model shape.
  void merge(const SurrogateAccumulator& other) {
    compresskv::detail::require(other.layers_.size() == layers_.size() && other.kv_heads_ == kv_heads_ &&
                                    other.hidden_size_ == hidden_size_,
                                "cannot merge a surrogate of ", other.layers_.size(), " layers of ",
                                other.kv_heads_, " KV heads of ", other.hidden_size_,
                                " elements into one of ", layers_.size(), " layers of ", kv_heads_,
                                " KV heads of ", hidden_size_, ": all must be of one model");
    for (std::size_t layer = 0; layer < layers_.size(); ++layer) {
      join(layers_[layer], other.layers_[layer]);
    }
  }

  /// Tokens that a layer was fed.
  std::uint64_t count(std::size_t layer) const { return layers_.at(layer).count; }

  /// The fit. Throws ArgumentError when a layer was fed nothing, `ridge` is not a number above 0, or what was
  /// fed gives no finite float32.
  Surrogate surrogate(double ridge = 1e-3) const {
    using compresskv::detail::require;
    require(compresskv::detail::is_finite(ridge) && ridge > 0.0, "ridge is ", ridge,
            ", must be finite and above 0");
    std::vector<float> weights;
    std::vector<float> biases;
    for (std::size_t layer = 0; layer < layers_.size(); ++layer) {
      const Sums& sums = layers_[layer];
      require(sums.count > 0, "layer ", layer, " was fed no token: feed every layer");
      Eigen::MatrixXd matrix = sums.products.selfadjointView<Eigen::Lower>();
      const double spread = matrix.trace() / static_cast<double>(hidden_size_);
      // Where nothing varies the bias says it all.
      matrix.diagonal().array() += spread > 0.0 ? ridge * spread : 1.0;
      const Eigen::MatrixXd fitted = matrix.ldlt().solve(sums.cross);
      for (std::size_t head = 0; head < kv_heads_; ++head) {
        for (std::size_t e = 0; e < hidden_size_; ++e) {
          weights.push_back(static_cast<float>(fitted(index(e), index(head))));
        }
        biases.push_back(
            static_cast<float>(sums.target_means(index(head)) - fitted.col(index(head)).dot(sums.means)));
      }
    }
    return {layers_.size(), kv_heads_, hidden_size_, std::move(weights), std::move(biases)};
  }

  /// `[layer]`, the share of the scores' variance, over all KV heads, that a surrogate foretells of the
  /// tokens fed: 1 where it is right, 0 or less where the mean of each KV head does as well. 0 where nothing
  /// varies. Fitted to other tokens, it tells what it is worth. Throws ArgumentError when it is of another
  /// model shape.
  std::vector<double> explained(const Surrogate& by) const {
    by.validate(layers_.size(), kv_heads_);
    compresskv::detail::require(by.hidden_size() == hidden_size_, "surrogate is of ", by.hidden_size(),
                                " elements, what was fed has ", hidden_size_, ": give one of the same model");
    std::vector<double> shares;
    for (std::size_t layer = 0; layer < layers_.size(); ++layer) {
      const Sums& sums = layers_[layer];
      const Eigen::MatrixXd matrix = sums.products.selfadjointView<Eigen::Lower>();
      double missed = 0.0;
      for (std::size_t head = 0; head < kv_heads_; ++head) {
        const std::span<const float> row = by.weights(layer, head);
        const Eigen::VectorXd weights =
            Eigen::Map<const Eigen::VectorXf>(row.data(), index(row.size())).cast<double>();
        const double shift = static_cast<double>(by.bias(layer, head)) + weights.dot(sums.means) -
                             sums.target_means(index(head));
        missed += sums.target_squares(index(head)) - 2.0 * weights.dot(sums.cross.col(index(head))) +
                  weights.dot(matrix * weights) + static_cast<double>(sums.count) * shift * shift;
      }
      const double all = sums.target_squares.sum();
      shares.push_back(all > 0.0 ? 1.0 - missed / all : 0.0);
    }
    return shares;
  }

 private:
  static Eigen::Index index(std::size_t i) { return static_cast<Eigen::Index>(i); }

  /// Of a layer; products are around the means.
  struct Sums {
    Sums(Eigen::Index kv_heads, Eigen::Index hidden_size)
        : means(Eigen::VectorXd::Zero(hidden_size)),
          target_means(Eigen::VectorXd::Zero(kv_heads)),
          products(Eigen::MatrixXd::Zero(hidden_size, hidden_size)),
          cross(Eigen::MatrixXd::Zero(hidden_size, kv_heads)),
          target_squares(Eigen::VectorXd::Zero(kv_heads)) {}

    std::uint64_t count = 0;
    Eigen::VectorXd means;
    Eigen::VectorXd target_means;
    Eigen::MatrixXd products;  // lower triangle of hidden hidden^T
    Eigen::MatrixXd cross;     // hidden target^T
    Eigen::VectorXd target_squares;
  };

  static Sums sums_of(Eigen::MatrixXd& hidden, Eigen::MatrixXd& targets) {
    Sums sums(targets.cols(), hidden.cols());
    sums.count = static_cast<std::uint64_t>(hidden.rows());
    if (sums.count == 0) {
      return sums;
    }
    sums.means = hidden.colwise().mean();
    sums.target_means = targets.colwise().mean();
    hidden.rowwise() -= sums.means.transpose();
    targets.rowwise() -= sums.target_means.transpose();
    sums.products.selfadjointView<Eigen::Lower>().rankUpdate(hidden.transpose());
    sums.cross.noalias() = hidden.transpose() * targets;
    sums.target_squares = targets.colwise().squaredNorm();
    return sums;
  }

  /// Chan's way to join two sets.
  static void join(Sums& sums, const Sums& other) {
    if (other.count == 0) {
      return;
    }
    const auto here = static_cast<double>(sums.count);
    const auto there = static_cast<double>(other.count);
    const double between = here * (there / (here + there));
    const Eigen::VectorXd apart = other.means - sums.means;
    const Eigen::VectorXd targets_apart = other.target_means - sums.target_means;
    sums.products.triangularView<Eigen::Lower>() += other.products;
    sums.products.selfadjointView<Eigen::Lower>().rankUpdate(apart, between);
    sums.cross += other.cross + between * apart * targets_apart.transpose();
    sums.target_squares += other.target_squares + between * targets_apart.cwiseAbs2();
    sums.means += apart * (there / (here + there));
    sums.target_means += targets_apart * (there / (here + there));
    sums.count += other.count;
  }

  std::size_t kv_heads_;
  std::size_t hidden_size_;
  std::vector<Sums> layers_;
};

}  // namespace compresskv::calibrate
