// What `ckv calibrate` measures on one prompt; all of it becomes records.
#pragma once

#include <compresskv/core/head_ranking.hpp>
#include <cstddef>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "arguments.hpp"
#include "calibration_jobs.hpp"
#include "engine/sequence.hpp"
#include "needle.hpp"
#include "records.hpp"
#include "run.hpp"

namespace ckv {

/// What decides what a prompt says.
struct CalibrationSettings {
  std::string engine{small_engine};
  CacheArguments cache;
  std::vector<NeedleText> needles;
  std::filesystem::path haystack;  ///< empty: the King James text
  std::size_t depths = 5;
  std::size_t max_new_tokens = 50;

  /// Of the so-manieth depth, evenly from first to last.
  double depth(std::size_t index) const {
    return depths == 1 ? 0.5 : static_cast<double>(index) / static_cast<double>(depths - 1);
  }
};

/// A needle prompt of the grid.
struct NeedleRun {
  std::size_t run = 0;
  std::size_t needle = 0;
  std::size_t length = 0;
  double depth = 0.0;
};

/// A prompt whose layers are evicted from: the run's, else a stretch of the haystack.
struct ErrorPrompt {
  std::string data_set;
  std::size_t run = 0;  ///< its number in the data set
  std::size_t length = 0;
  std::optional<NeedleRun> needle = std::nullopt;
};

/// Heads that are masked, and how they were chosen.
struct HeadMask {
  std::string heads;  ///< "srh", "classic" or "random"
  std::size_t draw = 0;
  std::vector<engine::HeadIndex> masked = {};
};

/// The shape of a model file. In llama.cpp another process loads it: this one may have to fork, which what
/// libllama starts, threads and devices, does not outlive. Throws as load_engine, and where the model's cache
/// cannot be compressed, which a calibration would be for.
compresskv::ModelShape shape_of_file(std::string_view engine, const std::filesystem::path& path);

/// Works on one prompt after another.
class PromptCalibration {
 public:
  /// `settings` must outlive it. Throws as load_engine and Haystack::from.
  PromptCalibration(const CalibrationSettings& settings, const std::filesystem::path& model, int threads);

  /// Answers a needle prompt and scores every head. Throws as needle_prompt.
  Json score_heads(const NeedleRun& run) const;

  // In the small engine alone:

  /// What each layer loses when it is cut to `rows`, for each of several budgets: a record each. The answer
  /// is that of the whole cache; of a stretch of text what it goes on with. A prompt without a step says
  /// nothing, and its record counts none.
  void measure_errors(const ErrorPrompt& prompt, const compresskv::HeadRanking& ranking,
                      std::span<const std::size_t> budgets, const Take& hand_on) const;

  /// How the queries of every head are spread over `texts` stretches of the haystack of `length` tokens,
  /// without the first 4 of each, into `file`; what it came to. Throws engine::Error where the first layer's
  /// keys of equal tokens contradict the rotary embedding that is written down, and compresskv::FileError.
  Json measure_statistics(std::size_t length, std::size_t texts, const std::filesystem::path& file) const;

  /// How well each KV head retrieves, by what it looks at when the model repeats `texts` stretches of the
  /// haystack of `length` tokens, into `file`; what it came to.
  Json measure_kv_heads(std::size_t length, std::size_t texts, const std::filesystem::path& file) const;

  /// A surrogate of what repeats look at, fitted to `texts` stretches of the haystack of `length` tokens
  /// without the first 4 of each, into `file`; what it came to: tokens, and how much of the variance of
  /// others' scores it explains in each layer, of an eighth as many stretches that are held out. Throws
  /// compresskv::FileError.
  Json fit_surrogate(std::size_t length, std::size_t texts, const std::filesystem::path& file) const;

  /// Whether each of these masks leaves a needle prompt's answer right; a record each. The prompts are those
  /// of the task "needle", by `run`. Ends where the answer is wrong with nothing masked.
  void ablate(std::size_t length, std::size_t run, std::span<const HeadMask> masks,
              const Take& hand_on) const;

 private:
  NeedlePrompt prompt_of(const NeedleRun& run) const;
  const LoadedModel& small() const;

  const CalibrationSettings* settings_;
  std::unique_ptr<ModelEngine> loaded_;
  Haystack haystack_;
};

}  // namespace ckv
