#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "compresskv/core/error.hpp"
#include "compresskv/core/float_bits.hpp"
#include "compresskv/core/float_mode.hpp"
#include "compresskv/core/head_ranking.hpp"
#include "compresskv/core/order.hpp"
#include "compresskv/core/strict_float_begin.hpp"

namespace compresskv {

/// Raw retrieval scores: for each query head of each layer one score per counted calibration run (Eq. 5 of
/// arXiv 2606.24467). The mean over runs is the head's score; `ranking()` sorts by it.
class HeadScores {
 public:
  /// `runs[layer * heads + head]` holds that head's scores in the order of the runs.
  /// Throws ArgumentError when sizes do not fit, a head has no run, or a score or a head's sum of them is not
  /// finite.
  HeadScores(std::size_t layers, std::size_t heads, std::vector<std::vector<double>> runs)
      : heads_(heads), runs_(std::move(runs)) {
    detail::require(layers > 0 && heads > 0, "head scores need at least one layer and one head, got ", layers,
                    " layers of ", heads, " heads");
    detail::require(runs_.size() == layers * heads, "head scores have ", runs_.size(), " lists, ", layers,
                    " layers of ", heads, " heads need ", layers * heads);
    for (std::size_t i = 0; i < runs_.size(); ++i) {
      detail::require(!runs_[i].empty(), "head scores of layer ", i / heads, " head ", i % heads,
                      " are empty: no calibration run counted");
      for (const double& score : runs_[i]) {
        detail::require(detail::is_finite(score), "head scores of layer ", i / heads, " head ", i % heads,
                        " hold ", score, ": every score must be finite");
      }
      const double sum = sum_of(runs_[i]);
      detail::require(detail::is_finite(sum), "head scores of layer ", i / heads, " head ", i % heads,
                      " add up to ", sum, ": their mean is beyond float64; divide all scores by one number");
    }
  }

  std::size_t layers() const { return runs_.size() / heads_; }
  std::size_t heads() const { return heads_; }

  /// Scores of one head, one per counted run.
  std::span<const double> runs(std::size_t layer, std::size_t head) const {
    return runs_[layer * heads_ + head];
  }

  /// Mean over the counted runs, added in run order.
  double mean(std::size_t layer, std::size_t head) const {
    const auto scores = runs(layer, head);
    return sum_of(scores) / static_cast<double>(scores.size());
  }

  /// Each layer's heads by falling mean; equal means: the lower head first.
  HeadRanking ranking() const {
    std::vector<std::vector<std::uint32_t>> ranked(layers());
    for (std::size_t layer = 0; layer < layers(); ++layer) {
      std::vector<double> means(heads_);
      for (std::size_t head = 0; head < heads_; ++head) {
        means[head] = mean(layer, head);
      }
      ranked[layer] = detail::by_falling(means);
    }
    return HeadRanking(std::move(ranked));
  }

  /// Throws ArgumentError when the scores are not those of a model with `layers` layers of `heads` query
  /// heads.
  void validate(std::size_t layers, std::size_t heads) const {
    detail::require(this->layers() == layers && heads_ == heads, "head scores are of ", this->layers(),
                    " layers of ", heads_, " heads, the model has ", layers, " layers of ", heads,
                    ": use the scores calibrated for this model");
  }

  friend bool operator==(const HeadScores&, const HeadScores&) = default;

 private:
  static double sum_of(std::span<const double> scores) {
    const detail::PlainFloats plain;
    double sum = 0.0;
    for (const double& score : scores) {
      sum += score;
    }
    return sum;
  }

  std::size_t heads_;
  std::vector<std::vector<double>> runs_;
};

}  // namespace compresskv

#include "compresskv/core/strict_float_end.hpp"
