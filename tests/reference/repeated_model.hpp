// A model that is shown its context once more, and what KVzip and KVzip+ make of that, in double.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <compresskv/compresskv.hpp>
#include <compresskv/view/any_kv.hpp>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "reference/executors.hpp"
#include "reference/layer_case.hpp"
#include "reference/output_norms.hpp"
#include "reference/random.hpp"
#include "reference/repeats.hpp"
#include "reference/scattered_kv.hpp"

namespace compresskv::reference {

using Positions = std::vector<std::vector<std::vector<std::uint32_t>>>;  // [layer][kv_head][row]

/// A model whose context is repeated: layers with room behind the context for the tokens fed, which change
/// from stretch to stretch.
template <class T = float>
struct RepeatedModel {
  LayerCase sizes;  // rows: the context and one repeat; window: queries of the repeat
  std::size_t context;
  ModelShape shape;
  std::vector<Layer<T>> layers;
  std::vector<std::vector<std::size_t>> rows;    // [layer][kv_head], of the context, in the cache now
  std::vector<std::vector<float>> outputs;       // [layer][hidden][query_head * head_dim]
  std::vector<std::vector<float>> hidden_norms;  // [layer][query]
  bool weighed = false;                          // scores are those of KVzip+

  RepeatedModel(const LayerCase& c, std::size_t layer_count, std::size_t context_tokens)
      : sizes(c), context(context_tokens) {
    shape = {.layers = layer_count,
             .query_heads = c.query_heads(),
             .kv_heads = c.kv_heads,
             .head_dim = c.head_dim};
    for (std::size_t l = 0; l < layer_count; ++l) {
      LayerCase own = c;
      own.seed = c.seed + l;
      own.capacity = c.window;  // of a plan that is not used here
      layers.emplace_back(own);
      outputs.push_back(random_outputs(c.seed + l, shape));
    }
    hidden_norms.assign(layer_count, std::vector<float>(c.window, 1.0F));
    rows.assign(layer_count, std::vector<std::size_t>(c.kv_heads, context));
  }

  OutputWeights output_weights() const {
    std::vector<const float*> data;
    for (const auto& layer : outputs) {
      data.push_back(layer.data());
    }
    return {data, {.hidden = output_rows, .query_heads = shape.query_heads, .head_dim = shape.head_dim}};
  }

  std::size_t fed() const { return sizes.rows - context; }

  StridedKv<T> view(std::size_t l, std::size_t fed_rows) {
    KvShape now = layers[l].cache.shape;
    shown_.assign(rows[l].begin(), rows[l].end());
    for (std::size_t& count : shown_) {
      count += fed_rows;
    }
    now.head_rows = shown_;
    return {layers[l].cache.keys.data(), layers[l].cache.values.data(), now, layers[l].cache.strides};
  }
  auto views() {
    return [this](std::size_t l) {
      KvShape now = layers[l].cache.shape;
      now.head_rows = rows[l];
      return StridedKv<T>{layers[l].cache.keys.data(), layers[l].cache.values.data(), now,
                          layers[l].cache.strides};
    };
  }

  /// Other tokens are fed behind the context.
  void feed(std::uint64_t seed) {
    Random random(seed);
    for (std::size_t l = 0; l < layers.size(); ++l) {
      auto& cache = layers[l].cache;
      for (std::size_t head = 0; head < sizes.kv_heads; ++head) {
        for (std::size_t row = rows[l][head]; row < rows[l][head] + fed(); ++row) {
          for (std::size_t dim = 0; dim < sizes.head_dim; ++dim) {
            cache.keys[cache.at(head, row, dim)] = static_cast<T>(1.5F * random.gaussian());
          }
        }
      }
      for (T& element : layers[l].queries) {
        element = static_cast<T>(random.gaussian());
      }
      for (float& norm : hidden_norms[l]) {
        norm = 0.5F + 3.0F * static_cast<float>(random.below(1000)) / 1000.0F;
      }
    }
  }

  template <class C>
  void shrunk(const C& compressor) {
    for (std::size_t l = 0; l < layers.size(); ++l) {
      for (std::size_t head = 0; head < sizes.kv_heads; ++head) {
        rows[l][head] = compressor.retained(l).rows(head);
      }
    }
  }

 private:
  std::vector<std::size_t> shown_;
};

using RepeatScores64 = std::vector<std::vector<std::vector<double>>>;  // [layer][kv_head][row]

inline RepeatScores64 no_scores(const RepeatedModel<>& model) {
  RepeatScores64 scores;
  for (const auto& layer : model.rows) {
    scores.emplace_back();
    for (const std::size_t rows : layer) {
      scores.back().emplace_back(rows, 0.0);
    }
  }
  return scores;
}

/// What the tokens fed now add to `scores`.
template <class C>
void add_repeats(const RepeatedModel<>& model, const C& compressor, const Stretch& stretch, std::size_t sinks,
                 RepeatScores64& scores) {
  for (std::size_t l = 0; l < model.layers.size(); ++l) {
    const auto& layer = model.layers[l];
    for (std::size_t kv_head = 0; kv_head < model.sizes.kv_heads; ++kv_head) {
      const std::size_t rows = model.rows[l][kv_head];
      std::vector<std::vector<double>> lengths(model.sizes.group);
      for (std::size_t head = 0; model.weighed && head < model.sizes.group; ++head) {
        for (std::size_t row = 0; row < rows; ++row) {
          lengths[head].push_back(
              euclidean(added_to_output(layer, model.outputs[l], kv_head * model.sizes.group + head, row)));
        }
      }
      const auto found = repeat_scores(
          [&](std::size_t row, std::size_t dim) { return layer.key(kv_head, row, dim); },
          [&](std::size_t head, std::size_t i, std::size_t dim) {
            return layer.query(kv_head * model.sizes.group + head, i, dim);
          },
          [&](std::size_t row) { return compressor.retained(l).position(row, kv_head); }, model.sizes.group,
          rows, rows + model.fed(), model.sizes.window, model.sizes.head_dim, layer.scale(), stretch, sinks,
          [&](std::size_t head, std::size_t i, std::size_t row) {
            return model.weighed ? lengths[head][row] / static_cast<double>(model.hidden_norms[l][i]) : 1.0;
          });
      for (std::size_t row = 0; row < rows; ++row) {
        scores[l][kv_head][row] = std::max(scores[l][kv_head][row], found[row]);
      }
    }
  }
}

/// Shows a whole context, `stretch` tokens at a time, and adds what is expected of it.
template <class C>
void repeat_all(RepeatedModel<>& model, C& compressor, std::size_t stretch, std::size_t sinks,
                std::uint64_t seed, RepeatScores64& scores) {
  for (std::size_t first = 0; first < model.context; first += stretch) {
    const Stretch now{.first = first, .last = std::min(first + stretch, model.context)};
    model.feed(seed + first);
    for (std::size_t l = 0; l < model.layers.size(); ++l) {
      compressor.observe(l, model.view(l, model.fed()), now, model.layers[l].observation(),
                         model.hidden_norms[l]);
    }
    add_repeats(model, compressor, now, sinks, scores);
  }
}

template <class C>
Positions positions_of(const C& compressor, const RepeatedModel<>& model) {
  Positions out;
  for (std::size_t l = 0; l < model.layers.size(); ++l) {
    out.emplace_back();
    for (std::size_t head = 0; head < model.sizes.kv_heads; ++head) {
      const auto& kept = compressor.retained(l).positions(head);
      out.back().emplace_back(kept.begin(), kept.end());
    }
  }
  return out;
}

/// Neither a repeat that is shown in parts, nor threads, layouts and rows in pieces change which rows stay of
/// a context of 90 tokens. `plan_of(model)` makes a plan.
template <class PlanOf>
void expect_same_rows_however_shown(PlanOf&& plan_of) {
  constexpr std::size_t context = 90;
  const LayerCase c{.group = 3, .kv_heads = 2, .head_dim = 16, .rows = context + 40, .window = 40, .seed = 8};
  const Stretch whole{.first = 0, .last = context};
  RepeatedModel<> first(c, 2, context);
  const auto plan = plan_of(first);
  RepeatScores64 unused = no_scores(first);
  const auto repeated = [&](RepeatedModel<>& model, auto compressor) {
    compressor.begin(context);
    repeat_all(model, compressor, context, 4, 1, unused);
    compressor.finish(model.views());
    return positions_of(compressor, model);
  };
  const Positions expected = repeated(first, Compressor{plan});

  {  // fed in two parts, 25 tokens, then 15, by a plan that two compressors look at
    RepeatedModel<> model(c, 2, context);
    model.feed(1);
    Compressor compressor{plan};
    compressor.begin(context);
    for (std::size_t l = 0; l < 2; ++l) {
      const auto& queries = model.layers[l].queries;
      const std::span<const float> norms(model.hidden_norms[l]);
      const auto part = [&](std::size_t from, std::size_t count) {
        return QueryWindow<float>{
            queries.data() + from * c.head_dim,
            QueryShape{.query_heads = c.query_heads(), .queries = count, .head_dim = c.head_dim},
            QueryStrides{.head = c.window * c.head_dim, .query = c.head_dim}};
      };
      compressor.observe(l, model.view(l, 25), whole, part(0, 25), norms.first(25));
      compressor.observe(l, model.view(l, 40), whole, part(25, 15), norms.subspan(25));
    }
    compressor.finish(model.views());
    EXPECT_EQ(positions_of(compressor, model), expected);
  }
  for (const Arrangement arrangement : all_arrangements) {
    LayerCase other = c;
    other.arrangement = arrangement;
    RepeatedModel<> model(other, 2, context);
    const auto own_plan = plan_of(model);
    EXPECT_EQ(repeated(model, Compressor{own_plan, ThreadExecutor{}}), expected);
  }
  {  // rows in pieces, seen through the view that hides their type
    RepeatedModel<> model(c, 2, context);
    model.feed(1);
    Random random(2);
    Compressor compressor{plan};
    compressor.begin(context);
    for (std::size_t l = 0; l < 2; ++l) {
      ScatteredMemory<float> memory(model.layers[l].cache, random, 7, 16);
      compressor.observe(l, AnyKv(memory.view()), whole, model.layers[l].observation(),
                         model.hidden_norms[l]);
    }
    compressor.finish(model.views());
    EXPECT_EQ(positions_of(compressor, model), expected);
  }
}

/// Half floats have 11 bits; below their smallest steps all are alike.
inline bool surely_above(double a, double b) { return a > b * (1.0 + 2e-3) + 2e-7; }

}  // namespace compresskv::reference
