#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "compresskv/core/error.hpp"
#include "compresskv/core/layer_errors.hpp"

namespace compresskv::calibrate {

/// Measures what evicting from each layer costs (Eq. 8-12 of arXiv 2606.24467), which `budget::ErrorAware`
/// turns into budgets. For each data set, over all decode steps t of all its prompts,
///
///     e(layer) = sum over t of  ||compressed - full|| / (||full|| + eps)
///
/// where `full` and `compressed` are what the layer's attention block gives after the output projection, from
/// the whole cache and from one that was compressed at the end of the prefill (to 32 tokens in the paper).
/// Both caches grow with the generated tokens, and the full output is what goes on to the next layer. The
/// errors of a data set are normalised to sum 1, averaged over the data sets and normalised again. All in
/// double.
///
/// Departure from the paper: eps is 1e-5 by default, as in the released code that made the published figures;
/// the paper has 1e-6. Not safe to share between threads without a lock.
class EvictionErrorAccumulator {
 public:
  struct Options {
    double epsilon = 1e-5;  ///< keeps a step whose full output is near 0 from ruling the sum
  };

  /// Throws ArgumentError when there is no layer, or epsilon is not finite and above 0.
  EvictionErrorAccumulator(std::size_t layers, Options options)
      : options_(options), sums_(layers, 0.0), steps_(layers, 0) {
    compresskv::detail::require(layers > 0, "eviction error accumulator needs at least one layer, got 0");
    compresskv::detail::require(options.epsilon > 0.0 && std::isfinite(options.epsilon), "epsilon is ",
                                options.epsilon, ", must be finite and above 0: leave it at 1e-5");
  }

  explicit EvictionErrorAccumulator(std::size_t layers) : EvictionErrorAccumulator(layers, Options{}) {}

  /// Starts a data set, one or more prompts.
  /// Throws ArgumentError when one is open already, or the name was used before or is `avg_score`, which
  /// names the mean on disk.
  void begin_data_set(std::string name) {
    using compresskv::detail::require;
    require(!open_, "begin_data_set within data set '", name_, "': call end_data_set first");
    require(name != "avg_score", "a data set cannot be named avg_score, which is the mean's: rename it");
    require(std::none_of(data_sets_.begin(), data_sets_.end(),
                         [&](const LayerErrors::DataSet& set) { return set.name == name; }),
            "data set '", name, "' was measured already: give all its prompts between one begin and one end");
    name_ = std::move(name);
    sums_.assign(sums_.size(), 0.0);
    steps_.assign(steps_.size(), 0);
    open_ = true;
  }

  /// Takes one decode step of one layer: the attention block's output from the full and from the compressed
  /// cache. Throws ArgumentError when no data set is open, the layer does not exist, the outputs are empty or
  /// of different length, or a value is not finite.
  void add(std::size_t layer, std::span<const float> full, std::span<const float> compressed) {
    using compresskv::detail::require;
    require(open_, "add outside a data set: call begin_data_set first");
    require(layer < sums_.size(), "layer is ", layer, ", the model has layers 0 to ", sums_.size() - 1);
    require(!full.empty() && full.size() == compressed.size(), "outputs of layer ", layer, " have ",
            full.size(), " (full) and ", compressed.size(),
            " (compressed) elements: both must have the model's width");
    double difference = 0.0;
    double norm = 0.0;
    for (std::size_t i = 0; i < full.size(); ++i) {
      const auto whole = static_cast<double>(full[i]);
      const double apart = static_cast<double>(compressed[i]) - whole;
      difference += apart * apart;
      norm += whole * whole;
    }
    // Squares of floats cannot overflow a double, so a sum that is not finite means an element that is not.
    if (!std::isfinite(difference) || !std::isfinite(norm)) {
      reject_element(layer, full, compressed);
    }
    sums_[layer] += std::sqrt(difference) / (std::sqrt(norm) + options_.epsilon);
    ++steps_[layer];
  }

  /// Ends the data set.
  /// Throws ArgumentError, and the data set stays open, when none is open, a layer has not seen as many steps
  /// as layer 0, there was no step, or no layer has an error above 0.
  void end_data_set() {
    using compresskv::detail::require;
    require(open_, "end_data_set outside a data set: call begin_data_set first");
    require(steps_.front() > 0, "data set '", name_,
            "' has no step of layer 0: call add for every layer at every "
            "decode step");
    for (std::size_t layer = 0; layer < steps_.size(); ++layer) {
      require(steps_[layer] == steps_.front(), "data set '", name_, "' has ", steps_[layer],
              " steps of layer ", layer, ", ", steps_.front(),
              " of layer 0: call add for every layer at every decode step");
    }
    require(std::any_of(sums_.begin(), sums_.end(), [](double sum) { return sum > 0.0; }), "data set '",
            name_, "' has no error in any layer: compress the cache to fewer tokens than the prompts have");
    data_sets_.push_back({.name = std::move(name_), .errors = sums_});
    open_ = false;
  }

  /// The errors of the data sets that ended. Throws ArgumentError while one is open, Error when there is
  /// none.
  LayerErrors errors() const {
    compresskv::detail::require(!open_, "errors asked for within data set '", name_,
                                "': call end_data_set first");
    compresskv::detail::require<Error>(!data_sets_.empty(),
                                       "no data set was measured: begin_data_set, add, end_data_set first");
    return LayerErrors(data_sets_);
  }

 private:
  [[noreturn]] static void reject_element(std::size_t layer, std::span<const float> full,
                                          std::span<const float> compressed) {
    for (std::size_t i = 0; i < full.size(); ++i) {
      compresskv::detail::require(std::isfinite(full[i]), "full output of layer ", layer, " element ", i,
                                  " is ", full[i], ": outputs must be finite");
      compresskv::detail::require(std::isfinite(compressed[i]), "compressed output of layer ", layer,
                                  " element ", i, " is ", compressed[i], ": outputs must be finite");
    }
    compresskv::detail::fail<ArgumentError>("outputs of layer ", layer, " have no finite norm");
  }

  Options options_;
  std::vector<LayerErrors::DataSet> data_sets_;  // not yet normalised

  // The open data set.
  bool open_ = false;
  std::string name_;
  std::vector<double> sums_;        // [layer]
  std::vector<std::size_t> steps_;  // [layer]
};

}  // namespace compresskv::calibrate
