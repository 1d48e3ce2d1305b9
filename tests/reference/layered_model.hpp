// A model of a few layers, with exact scores of its heads: what scores that go from layer to layer are held
// against.
#pragma once

#include <algorithm>
#include <compresskv/compresskv.hpp>
#include <cstddef>
#include <numeric>
#include <span>
#include <utility>
#include <vector>

#include "reference/methods.hpp"

namespace compresskv::reference {

using Scores64 = std::vector<double>;  // [position]

struct LayeredModel {
  LayerCase sizes;
  ModelShape shape;
  std::vector<Layer<float>> layers;
  std::vector<std::vector<std::size_t>> rows;    // [layer][kv_head], in the cache now
  std::vector<std::vector<double>> head_scores;  // [layer][head]

  LayeredModel(const LayerCase& c, std::size_t count) : sizes(c) {
    Random random(c.seed);
    shape = {.layers = count, .query_heads = c.query_heads(), .kv_heads = c.kv_heads, .head_dim = c.head_dim};
    for (std::size_t l = 0; l < count; ++l) {
      LayerCase own = c;
      own.seed = c.seed + l;
      layers.emplace_back(own);
      head_scores.emplace_back();
      for (std::size_t h = 0; h < c.query_heads(); ++h) {
        head_scores.back().push_back(random.uniform() * (l % 3 == 1 ? 1.0 : 0.1));
      }
    }
    rows.assign(count, std::vector<std::size_t>(c.kv_heads, c.rows));
  }

  HeadScores scores() const {
    std::vector<std::vector<double>> runs;
    for (const auto& layer : head_scores) {
      for (const double score : layer) {
        runs.push_back({score});
      }
    }
    return HeadScores(layers.size(), shape.query_heads, runs);
  }

  StridedKv<float> view(std::size_t l) {
    KvShape now = layers[l].cache.shape;
    now.head_rows = rows[l];
    return {layers[l].cache.keys.data(), layers[l].cache.values.data(), now, layers[l].cache.strides};
  }
  auto views() {
    return [this](std::size_t l) { return view(l); };
  }

  template <class C>
  void shrunk(const C& compressor, std::span<const std::size_t> changed) {
    for (const std::size_t l : changed) {
      for (std::size_t head = 0; head < sizes.kv_heads; ++head) {
        rows[l][head] = compressor.retained(l).rows(head);
      }
    }
  }

  /// r * A of one head over the evictable positions, from the layer as it was.
  Scores64 weighted(std::size_t l, std::size_t head) const {
    Scores64 out = pooled(window_sums(layers[l].attention(head).weights), sizes.pool, sizes.pool_width);
    for (double& score : out) {
      score *= head_scores[l][head];
    }
    return out;
  }
  /// The sum of that over the best `heads` of the whole model.
  Scores64 model_wide(std::size_t heads) const {
    std::vector<std::pair<std::size_t, std::size_t>> pairs;
    for (std::size_t l = 0; l < layers.size(); ++l) {
      for (std::size_t h = 0; h < shape.query_heads; ++h) {
        pairs.emplace_back(l, h);
      }
    }
    std::stable_sort(pairs.begin(), pairs.end(), [&](const auto& a, const auto& b) {
      return head_scores[a.first][a.second] > head_scores[b.first][b.second];
    });
    Scores64 sums(sizes.rows - sizes.observed(), 0.0);
    for (std::size_t i = 0; i < heads; ++i) {
      const Scores64 part = weighted(pairs[i].first, pairs[i].second);
      for (std::size_t t = 0; t < part.size(); ++t) {
        sums[t] += part[t];
      }
    }
    return sums;
  }
  std::vector<std::size_t> best_heads(std::size_t l, std::size_t count) const {
    std::vector<std::size_t> order(shape.query_heads);
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::stable_sort(order.begin(), order.end(),
                     [&](std::size_t a, std::size_t b) { return head_scores[l][a] > head_scores[l][b]; });
    order.resize(count);
    return order;
  }
};

}  // namespace compresskv::reference
