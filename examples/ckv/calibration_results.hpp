// What the records of a calibration say together.
#pragma once

#include <compresskv/calibrate/eviction_error_accumulator.hpp>
#include <compresskv/calibrate/head_score_accumulator.hpp>
#include <compresskv/core/head_ranking.hpp>
#include <compresskv/core/head_scores.hpp>
#include <compresskv/core/shape.hpp>
#include <cstddef>
#include <filesystem>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "calibration.hpp"
#include "engine/model.hpp"
#include "records.hpp"

namespace ckv {

/// What tells a record from all others of its file.
Json heads_key(std::size_t run);
Json errors_key(std::size_t rows, const std::string& data_set, std::size_t run);
Json ablation_key(std::size_t length, const HeadMask& mask, std::size_t run);

/// A record's own. Throws Json's exceptions where a part of it is absent, engine::Error for another kind.
Json key_of(const Json& record);

/// The records of a folder, found by what tells them apart.
class CalibrationRecords {
 public:
  /// Throws as RecordFile, and engine::Error naming the file where a record is none of a calibration.
  CalibrationRecords(const std::filesystem::path& path, const Json& header);

  bool empty() const { return records_.empty(); }
  bool has(const Json& key) const { return records_.contains(key.dump()); }
  const Json& at(const Json& key) const { return records_.at(key.dump()); }

  /// Writes it, too.
  void add(const Json& record);

  /// The scores of the head runs numbered 0 to `runs` - 1. Throws engine::Error naming the file where they do
  /// not fit the model; so do the others.
  compresskv::calibrate::HeadScoreAccumulator heads(std::size_t runs,
                                                    const compresskv::ModelShape& shape) const;
  compresskv::calibrate::EvictionErrorAccumulator errors(std::span<const ErrorPrompt> prompts,
                                                         std::size_t rows,
                                                         const compresskv::ModelShape& shape) const;
  /// Whether the prompt's answer is right under this mask.
  bool right(std::size_t length, const HeadMask& mask, std::size_t run) const;

 private:
  template <class Read>
  auto checked(const Read& read) const;

  std::filesystem::path path_;
  RecordFile file_;
  std::map<std::string, Json> records_;
};

/// All heads of a model by falling mean score; equal means: the lower layer, then the lower head first.
std::vector<engine::HeadIndex> best_heads(const compresskv::HeadScores& scores);

/// Share of the best `count` heads of a layer that both rankings have, mean over the layers.
double top_overlap(const compresskv::HeadRanking& a, const compresskv::HeadRanking& b, std::size_t count);

/// Spearman's rank correlation of the mean scores over all heads of the model. Equal scores share the mean of
/// their ranks; 0 where one side knows no difference.
double rank_correlation(const compresskv::HeadScores& a, const compresskv::HeadScores& b);

/// How far rankings from fewer prompts agree: from the prompts of even and of odd number, and from the first
/// 1, 2, 4, ... of a fixed shuffle with all of them. `null` where a half has no prompt that counted.
Json stability_json(const compresskv::calibrate::HeadScoreAccumulator& scores,
                    compresskv::calibrate::HeadScoreKind kind);

/// Nothing masked, then for each of `counts` the best heads by both scores and `draws` times random ones.
std::vector<HeadMask> head_masks(const compresskv::HeadScores& srh, const compresskv::HeadScores& classic,
                                 std::span<const std::size_t> counts, std::size_t draws);

/// Share of right answers to these prompts by heads and how many of them are masked, 0 included.
Json ablation_json(const CalibrationRecords& records, std::size_t length, std::span<const HeadMask> masks,
                   std::span<const std::size_t> runs);

}  // namespace ckv
