#pragma once

#include <cmath>
#include <cstddef>
#include <limits>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "compresskv/core/error.hpp"
#include "compresskv/core/float_bits.hpp"
#include "compresskv/core/float_mode.hpp"
#include "compresskv/core/strict_float_begin.hpp"

namespace compresskv {

namespace detail {

/// Throws ArgumentError when errors of `count` layers are not those of a model with `layers`.
inline void require_errors_of_model(std::size_t count, std::size_t layers) {
  require(count == layers, "layer errors have ", count, " layers, the model has ", layers,
          ": use the errors calibrated for this model");
}

}  // namespace detail

/// What evicting from each layer costs, measured once per model (Eq. 8-12 of arXiv 2606.24467): for each data
/// set one error a layer, normalised to sum 1, and their mean, normalised again, which `budget::ErrorAware`
/// reads.
class LayerErrors {
 public:
  struct DataSet {
    std::string name;
    std::vector<double> errors;  ///< [layer]
    friend bool operator==(const DataSet&, const DataSet&) = default;
  };

  /// Normalises each data set, averages, normalises again.
  /// Throws ArgumentError on no data set, differing lengths, a negative or non-finite error, or all zeros.
  explicit LayerErrors(std::vector<DataSet> data_sets) : data_sets_(std::move(data_sets)) {
    detail::require(!data_sets_.empty(), "layer errors have no data set: give at least one");
    average_.assign(data_sets_.front().errors.size(), 0.0);
    for (DataSet& set : data_sets_) {
      detail::require(set.errors.size() == average_.size(), "layer errors of data set '", set.name, "' have ",
                      set.errors.size(), " layers, those of '", data_sets_.front().name, "' have ",
                      average_.size(), ": all must be of one model");
      normalise(set.errors, set.name);
      for (std::size_t layer = 0; layer < average_.size(); ++layer) {
        average_[layer] += set.errors[layer] / static_cast<double>(data_sets_.size());
      }
    }
    normalise(average_, "average");
  }

  /// Errors whose mean is known already (a file's `avg_score`); it is renormalised. `data_sets` may be empty.
  LayerErrors(std::vector<double> average, std::vector<DataSet> data_sets)
      : average_(std::move(average)), data_sets_(std::move(data_sets)) {
    normalise(average_, "avg_score");
    for (DataSet& set : data_sets_) {
      detail::require(set.errors.size() == average_.size(), "layer errors of data set '", set.name, "' have ",
                      set.errors.size(), " layers, avg_score has ", average_.size(),
                      ": all must be of one model");
      normalise(set.errors, set.name);
    }
  }

  std::size_t layers() const { return average_.size(); }

  /// Mean normalised error of each layer, sum 1.
  std::span<const double> average() const { return average_; }

  std::span<const DataSet> data_sets() const { return data_sets_; }

  /// Throws ArgumentError when the errors are of a model with another number of layers.
  void validate(std::size_t layers) const { detail::require_errors_of_model(average_.size(), layers); }

  friend bool operator==(const LayerErrors&, const LayerErrors&) = default;

 private:
  static void normalise(std::vector<double>& errors, const std::string& name) {
    detail::require(!errors.empty(), "layer errors of '", name, "' are empty: give one error a layer");
    const detail::PlainFloats plain;
    double sum = 0.0;
    double largest = 0.0;
    for (std::size_t layer = 0; layer < errors.size(); ++layer) {
      detail::require(detail::is_finite(errors[layer]) && errors[layer] >= 0.0, "layer error of '", name,
                      "' layer ", layer, " is ", errors[layer], ": errors are finite and not negative");
      sum += errors[layer];
      largest = largest < errors[layer] ? errors[layer] : largest;
    }
    detail::require(sum > 0.0, "layer errors of '", name, "' sum to ", sum,
                    ": at least one layer must have an error above 0");
    if (!detail::is_finite(sum)) {
      // Their sum is beyond float64, their shares are not.
      sum = 0.0;
      for (double& error : errors) {
        error /= largest;
        sum += error;
      }
    }
    // What is normalised already, up to rounding, stays as it is: errors read back from a file equal those
    // that were written.
    const double rounding = 4.0 * std::numeric_limits<double>::epsilon() * static_cast<double>(errors.size());
    if (std::abs(sum - 1.0) <= rounding) {
      return;
    }
    for (double& error : errors) {
      error /= sum;
    }
  }

  std::vector<double> average_;
  std::vector<DataSet> data_sets_;
};

}  // namespace compresskv

#include "compresskv/core/strict_float_end.hpp"
