#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <iterator>
#include <map>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "compresskv/core/error.hpp"
#include "compresskv/core/float_bits.hpp"
#include "compresskv/core/float_mode.hpp"
#include "compresskv/core/layer_errors.hpp"
#include "compresskv/core/strict_float_begin.hpp"

namespace compresskv::calibrate {

/// What one prompt says about every layer: what a process hands to another, or writes down.
struct EvictionRun {
  std::string data_set;
  std::size_t run = 0;              ///< the prompt's number within its data set
  std::size_t steps = 0;            ///< decode steps
  std::vector<double> errors = {};  ///< [layer], summed over the steps

  friend bool operator==(const EvictionRun&, const EvictionRun&) = default;
};

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
/// An engine feeds it, for each prompt, `begin_run(data_set, number)`, `add` for every layer at every decode
/// step, `end_run()`. Processes that share the prompts `merge`: sums are taken over data sets by name and
/// prompts by number, so that the result is the same to the last bit as one process's.
///
/// Departure from the paper: eps is 1e-5 by default, as in the released code that made the published figures;
/// the paper has 1e-6. Not safe to share between threads without a lock.
class EvictionErrorAccumulator {
 public:
  struct Options {
    double epsilon = 1e-5;  ///< keeps a step whose full output is near 0 from ruling the sum
  };

  /// Throws ArgumentError when there is no layer, or epsilon is not finite and above 0.
  EvictionErrorAccumulator(std::size_t layers, Options options) : options_(options), steps_(layers, 0) {
    compresskv::detail::require(layers > 0, "eviction error accumulator needs at least one layer, got 0");
    compresskv::detail::require(compresskv::detail::is_finite(options.epsilon) && options.epsilon > 0.0,
                                "epsilon is ", options.epsilon,
                                ", must be finite and above 0: leave it at 1e-5");
  }

  explicit EvictionErrorAccumulator(std::size_t layers) : EvictionErrorAccumulator(layers, Options{}) {}

  /// Starts a prompt of a data set. Throws ArgumentError when one is open already, this one came before, or
  /// the data set has no name or that of the mean on disk, `avg_score`.
  void begin_run(std::string data_set, std::size_t run) {
    using compresskv::detail::require;
    require(!open_, "begin_run within run ", open_run_.run, " of data set '", open_run_.data_set,
            "': call end_run first");
    check_new(data_set, run);
    open_run_ = {.data_set = std::move(data_set), .run = run, .errors = std::vector<double>(steps_.size())};
    steps_.assign(steps_.size(), 0);
    open_ = true;
  }

  /// Takes one decode step of one layer: the attention block's output from the full and from the compressed
  /// cache. Throws ArgumentError when no run is open, the layer does not exist, the outputs are empty or
  /// of different length, or a value is not finite.
  void add(std::size_t layer, std::span<const float> full, std::span<const float> compressed) {
    using compresskv::detail::is_finite;
    using compresskv::detail::require;
    const compresskv::detail::PlainFloats plain;
    require(open_, "add outside a run: call begin_run first");
    require(layer < steps_.size(), "layer is ", layer, ", the model has layers 0 to ", steps_.size() - 1);
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
    if (!is_finite(difference) || !is_finite(norm)) {
      reject_element(layer, full, compressed);
    }
    const double error =
        open_run_.errors[layer] + std::sqrt(difference) / (std::sqrt(norm) + options_.epsilon);
    require(is_finite(error), "error of layer ", layer, " is beyond float64, epsilon is ", options_.epsilon,
            ": leave it at 1e-5");
    open_run_.errors[layer] = error;
    ++steps_[layer];
  }

  /// Ends the run. Throws ArgumentError, and the run stays open, when none is open, there was no step, or a
  /// layer has not seen as many steps as layer 0.
  void end_run() {
    using compresskv::detail::require;
    require(open_, "end_run outside a run: call begin_run first");
    require(steps_.front() > 0, "run ", open_run_.run, " of data set '", open_run_.data_set,
            "' has no step of layer 0: call add for every layer at every decode step");
    for (std::size_t layer = 0; layer < steps_.size(); ++layer) {
      require(steps_[layer] == steps_.front(), "run ", open_run_.run, " of data set '", open_run_.data_set,
              "' has ", steps_[layer], " steps of layer ", layer, ", ", steps_.front(),
              " of layer 0: call add for every layer at every decode step");
    }
    open_run_.steps = steps_.front();
    add_run(std::move(open_run_));
    open_ = false;
  }

  /// Takes a run that another accumulator has ended. Throws ArgumentError, and takes nothing, when it came
  /// already, its errors are not one a layer, one is negative or not finite, or as `begin_run` for its name.
  void add_run(EvictionRun run) {
    using compresskv::detail::require;
    check_new(run.data_set, run.run);
    require(run.errors.size() == steps_.size(), "run ", run.run, " of data set '", run.data_set, "' has ",
            run.errors.size(), " errors, must have ", steps_.size(), ": one a layer");
    for (std::size_t layer = 0; layer < run.errors.size(); ++layer) {
      require(compresskv::detail::is_finite(run.errors[layer]) && run.errors[layer] >= 0.0, "run ", run.run,
              " of data set '", run.data_set, "' has the error ", run.errors[layer], " of layer ", layer,
              ": errors are finite and not negative");
    }
    std::map<std::size_t, EvictionRun>& runs = data_sets_[run.data_set];
    runs.emplace(run.run, std::move(run));
  }

  /// Takes all runs of another accumulator, say another process's. Throws ArgumentError, and takes nothing,
  /// when it is of another number of layers, one of the two has a run open, or a run is in both.
  void merge(const EvictionErrorAccumulator& other) {
    using compresskv::detail::require;
    require(other.steps_.size() == steps_.size(), "cannot merge errors of ", other.steps_.size(),
            " layers into those of ", steps_.size(), ": all must be of one model");
    require(!open_ && !other.open_, "merge within a run: call end_run first");
    for (const auto& [name, runs] : other.data_sets_) {
      const auto own = data_sets_.find(name);
      for (const auto& [number, run] : runs) {
        require(own == data_sets_.end() || !own->second.contains(number), "run ", number, " of data set '",
                name, "' is in both: a prompt is given to one process alone");
      }
    }
    for (const auto& [name, runs] : other.data_sets_) {
      data_sets_[name].insert(runs.begin(), runs.end());
    }
  }

  /// All runs that ended, by data set and number.
  const std::map<std::string, std::map<std::size_t, EvictionRun>>& data_sets() const { return data_sets_; }

  /// Each layer's error a decode step, mean over the data sets, not normalised: what curves over budgets are
  /// drawn from. Throws as `errors`.
  std::vector<double> step_errors() const {
    std::vector<double> mean(steps_.size(), 0.0);
    for (const auto& [name, runs] : ended()) {
      const EvictionRun sum = sum_of(runs);
      for (std::size_t layer = 0; layer < mean.size(); ++layer) {
        mean[layer] += sum.errors[layer] / static_cast<double>(sum.steps * data_sets_.size());
      }
    }
    return mean;
  }

  /// The errors of the data sets, in the order of their names. Throws ArgumentError while a run is open or
  /// where a data set has no error in any layer, Error when there is none.
  LayerErrors errors() const {
    std::vector<LayerErrors::DataSet> sets;
    for (const auto& [name, runs] : ended()) {
      sets.push_back({.name = name, .errors = sum_of(runs).errors});
      compresskv::detail::require(
          std::any_of(sets.back().errors.begin(), sets.back().errors.end(), [](double e) { return e > 0.0; }),
          "data set '", name,
          "' has no error in any layer: compress the cache to fewer tokens than the prompts have");
    }
    return LayerErrors(std::move(sets));
  }

 private:
  using Runs = std::map<std::size_t, EvictionRun>;  // by number

  void check_new(const std::string& data_set, std::size_t run) const {
    using compresskv::detail::require;
    require(!data_set.empty() && data_set != "avg_score", "a data set cannot be named '", data_set,
            "': give it a name, and not avg_score, which is the mean's");
    const auto own = data_sets_.find(data_set);
    require(own == data_sets_.end() || !own->second.contains(run), "run ", run, " of data set '", data_set,
            "' came already: each prompt has a number of its own");
  }

  const std::map<std::string, Runs>& ended() const {
    compresskv::detail::require(!open_, "errors asked for within run ", open_run_.run, " of data set '",
                                open_run_.data_set, "': call end_run first");
    compresskv::detail::require<Error>(!data_sets_.empty(),
                                       "no prompt was measured: begin_run, add, end_run first");
    return data_sets_;
  }

  static EvictionRun sum_of(const Runs& runs) {
    EvictionRun sum = runs.begin()->second;
    for (auto run = std::next(runs.begin()); run != runs.end(); ++run) {
      sum.steps += run->second.steps;
      for (std::size_t layer = 0; layer < sum.errors.size(); ++layer) {
        sum.errors[layer] += run->second.errors[layer];
      }
    }
    return sum;
  }

  [[noreturn]] static void reject_element(std::size_t layer, std::span<const float> full,
                                          std::span<const float> compressed) {
    for (std::size_t i = 0; i < full.size(); ++i) {
      compresskv::detail::require(compresskv::detail::is_finite(full[i]), "full output of layer ", layer,
                                  " element ", i, " is ", full[i], ": outputs must be finite");
      compresskv::detail::require(compresskv::detail::is_finite(compressed[i]), "compressed output of layer ",
                                  layer, " element ", i, " is ", compressed[i], ": outputs must be finite");
    }
    compresskv::detail::fail<ArgumentError>("outputs of layer ", layer, " have no finite norm");
  }

  Options options_;
  std::map<std::string, Runs> data_sets_;

  // The open run.
  bool open_ = false;
  EvictionRun open_run_;
  std::vector<std::size_t> steps_;  // [layer]
};

}  // namespace compresskv::calibrate

#include "compresskv/core/strict_float_end.hpp"
