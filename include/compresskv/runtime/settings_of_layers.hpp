#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "compresskv/core/head_ranking.hpp"
#include "compresskv/core/head_scores.hpp"
#include "compresskv/core/layer_errors.hpp"
#include "compresskv/core/output_weights.hpp"
#include "compresskv/core/query_statistics.hpp"
#include "compresskv/core/shape.hpp"
#include "compresskv/method_settings.hpp"

namespace compresskv::detail {

inline HeadRanking ranking_of_layers(const HeadRanking& heads, std::span<const std::size_t> layers) {
  std::vector<std::vector<std::uint32_t>> picked;
  for (const std::size_t layer : layers) {
    picked.emplace_back(heads.heads(layer).begin(), heads.heads(layer).end());
  }
  return HeadRanking(std::move(picked));
}

inline HeadScores scores_of_layers(const HeadScores& scores, std::span<const std::size_t> layers) {
  std::vector<std::vector<double>> picked;
  for (const std::size_t layer : layers) {
    for (std::size_t head = 0; head < scores.heads(); ++head) {
      picked.emplace_back(scores.runs(layer, head).begin(), scores.runs(layer, head).end());
    }
  }
  return {layers.size(), scores.heads(), std::move(picked)};
}

inline LayerErrors errors_of_layers(const LayerErrors& errors, std::span<const std::size_t> layers) {
  const auto pick = [&](std::span<const double> all) {
    std::vector<double> picked;
    for (const std::size_t layer : layers) {
      picked.push_back(all[layer]);
    }
    return picked;
  };
  std::vector<LayerErrors::DataSet> sets;
  for (const LayerErrors::DataSet& set : errors.data_sets()) {
    sets.push_back({.name = set.name, .errors = pick(set.errors)});
  }
  return {pick(errors.average()), std::move(sets)};
}

/// What was calibrated for a model of this shape, of some of its layers alone. What is of another model is
/// left as it is: a method that uses it has refused it, or will. Counts of heads and layers are those of the
/// model, so there may be fewer now.
inline MethodSettings settings_of_layers(MethodSettings settings, const ModelShape& shape,
                                         std::span<const std::size_t> layers) {
  if (settings.heads && settings.heads->layers() == shape.layers) {
    settings.heads = ranking_of_layers(*settings.heads, layers);
  }
  if (settings.scores && settings.scores->layers() == shape.layers) {
    settings.scores = scores_of_layers(*settings.scores, layers);
  }
  if (settings.kv_scores && settings.kv_scores->layers() == shape.layers) {
    settings.kv_scores = scores_of_layers(*settings.kv_scores, layers);
  }
  if (settings.statistics && settings.statistics->layers() == shape.layers) {
    settings.statistics = settings.statistics->of_layers(layers);
  }
  if (settings.output_weights && settings.output_weights->layers() == shape.layers) {
    settings.output_weights = settings.output_weights->of_layers(layers);
  }
  if (settings.errors && settings.errors->layers() == shape.layers) {
    settings.errors = errors_of_layers(*settings.errors, layers);
  }
  settings.model_heads = (std::min)(settings.model_heads, layers.size() * shape.query_heads);
  const auto held = std::ranges::lower_bound(layers, settings.hold_layers) - layers.begin();
  settings.hold_layers = (std::min)(static_cast<std::size_t>(held), layers.size() - 1);
  return settings;
}

}  // namespace compresskv::detail
