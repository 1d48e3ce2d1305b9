// What values add to the layer's output, held against products one after the other in double.

#include "reference/output_norms.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <compresskv/compresskv.hpp>
#include <compresskv/kernel/output_norms.hpp>
#include <compresskv/view/any_kv.hpp>
#include <cstddef>
#include <limits>
#include <vector>

#include "reference/errors.hpp"
#include "reference/executors.hpp"
#include "reference/forced_path.hpp"
#include "reference/layer_case.hpp"
#include "reference/random.hpp"
#include "reference/scattered_kv.hpp"

namespace compresskv {
namespace {

using reference::expect_error;
using reference::Layer;
using reference::LayerCase;

/// Both norms of the first `count` values for each query head: [query_head][L2 of all, then L1 of all].
template <class V, class X>
std::vector<std::vector<float>> output_norms_of(const ModelShape& model, const V& kv,
                                                const OutputWeights& weights, std::size_t count, X executor) {
  const std::vector<std::size_t> rows(model.kv_heads, kv.rows(0));
  const Retained whole;
  const int nothing = 0;
  const kernel::LayerInput<V, int> in{.shape = model,
                                      .layer = weights.layers() - 1,
                                      .rows = rows,
                                      .window = 1,
                                      .retained = whole,
                                      .kv = kv,
                                      .observation = nothing};
  Workspace workspace;
  std::vector<std::vector<float>> norms;
  for (std::size_t head = 0; head < model.query_heads; ++head) {
    std::vector<float> both(2 * count);
    kernel::output_lengths(in, weights, head, workspace, executor, std::span(both).first(count));
    kernel::output_l1_norms(in, weights, head, workspace, executor, std::span(both).last(count));
    norms.push_back(both);
  }
  return norms;
}

template <class T = float>
OutputWeights view_of_outputs(const std::vector<T>& weights, const ModelShape& model) {
  return {std::vector<const T*>{weights.data()},
          {.hidden = weights.size() / (model.query_heads * model.head_dim),
           .query_heads = model.query_heads,
           .head_dim = model.head_dim}};
}

TEST(OutputNorms, AreThoseOfTheProducts) {
  for (const LayerCase& c : reference::layer_cases(20, 21)) {
    SCOPED_TRACE(testing::Message() << c);
    const Layer<float> layer(c);
    const auto weights = reference::random_outputs(c.seed, layer.shape);
    Layer<float> shown = layer;
    const auto found = output_norms_of(layer.shape, shown.cache.view(), view_of_outputs(weights, layer.shape),
                                       c.rows, SerialExecutor{});
    for (std::size_t head = 0; head < layer.shape.query_heads; ++head) {
      for (std::size_t t = 0; t < c.rows; ++t) {
        const auto added = reference::added_to_output(layer, weights, head, t);
        // A product is rounded to some units of the sum of its absolute terms.
        double length = 0.0;
        for (std::size_t dim = 0; dim < c.head_dim; ++dim) {
          length += std::abs(layer.value(head / c.group, t, dim));
        }
        const double bound = 1e-6 * length;
        ASSERT_NEAR(found[head][t], reference::euclidean(added), 3.0 * bound)
            << "head " << head << " token " << t;
        ASSERT_NEAR(found[head][c.rows + t], reference::absolute_sum(added), bound * reference::output_rows)
            << "head " << head << " token " << t;
      }
    }
  }
}

TEST(OutputNorms, OfWeightsThatDoNotSpanAHead) {
  // More elements than rows, a column of zeros, one that is another's double, and no weights at all.
  const LayerCase c{.group = 2, .kv_heads = 1, .head_dim = 40, .rows = 50, .window = 1, .seed = 5};
  Layer<float> layer(c);
  auto weights = reference::random_outputs(6, layer.shape);
  for (std::size_t out = 0; out < reference::output_rows; ++out) {
    float* const row = weights.data() + out * 80;
    row[3] = 0.0F;
    row[7] = 2.0F * row[5];
    std::fill_n(row + 40, 40, 0.0F);
  }
  const auto found = output_norms_of(layer.shape, layer.cache.view(), view_of_outputs(weights, layer.shape),
                                     50, SerialExecutor{});
  for (std::size_t t = 0; t < 50; ++t) {
    EXPECT_NEAR(found[0][t], reference::euclidean(reference::added_to_output(layer, weights, 0, t)), 1e-4);
    EXPECT_EQ(found[1][t], 0.0F);
    EXPECT_EQ(found[1][50 + t], 0.0F);
  }
}

TEST(OutputNorms, ThreadsLayoutsAndPathsChangeNoBit) {
  const LayerCase c{.group = 3, .kv_heads = 2, .head_dim = 64, .rows = 300, .window = 1, .seed = 9};
  Layer<float> layer(c);
  const auto weights = reference::random_outputs(2, layer.shape);
  const auto expected = output_norms_of(layer.shape, layer.cache.view(),
                                        view_of_outputs(weights, layer.shape), 299, SerialExecutor{});
  for (const reference::Arrangement arrangement : reference::all_arrangements) {
    LayerCase other = c;
    other.arrangement = arrangement;
    Layer<float> arranged(other);
    EXPECT_EQ(output_norms_of(layer.shape, arranged.cache.view(), view_of_outputs(weights, layer.shape), 299,
                              reference::ThreadExecutor{}),
              expected);
  }
  reference::Random random(3);
  reference::ScatteredMemory<float> memory(layer.cache, random, 7, 64);
  EXPECT_EQ(output_norms_of(layer.shape, AnyKv(memory.view()), view_of_outputs(weights, layer.shape), 299,
                            SerialExecutor{}),
            expected);
  reference::on_all_paths([&] {
    EXPECT_EQ(output_norms_of(layer.shape, layer.cache.view(), view_of_outputs(weights, layer.shape), 299,
                              SerialExecutor{}),
              expected);
  });
}

TEST(OutputNorms, WeightsMayBeOfSixteenBits) {
  const LayerCase c{.group = 2, .kv_heads = 2, .head_dim = 16, .rows = 40, .window = 1, .seed = 9};
  Layer<float> layer(c);
  const auto exact = reference::random_outputs(2, layer.shape);
  std::vector<half> halves;
  std::vector<bfloat16> bfloats;
  std::vector<float> of_halves;
  std::vector<float> of_bfloats;
  for (const float weight : exact) {
    halves.push_back(half(weight));
    bfloats.push_back(bfloat16(weight));
    of_halves.push_back(to_float(halves.back()));
    of_bfloats.push_back(to_float(bfloats.back()));
  }
  const auto norms = [&](const OutputWeights& weights) {
    return output_norms_of(layer.shape, layer.cache.view(), weights, 40, SerialExecutor{});
  };
  EXPECT_EQ(norms(view_of_outputs(halves, layer.shape)), norms(view_of_outputs(of_halves, layer.shape)));
  EXPECT_EQ(norms(view_of_outputs(bfloats, layer.shape)), norms(view_of_outputs(of_bfloats, layer.shape)));
}

TEST(OutputNorms, WhatIsNotFiniteIsNamed) {
  const LayerCase c{.group = 2, .kv_heads = 2, .head_dim = 16, .rows = 40, .window = 1, .seed = 9};
  Layer<float> layer(c);
  auto weights = reference::random_outputs(2, layer.shape);
  const auto norms = [&] {
    output_norms_of(layer.shape, layer.cache.view(), view_of_outputs(weights, layer.shape), 40,
                    SerialExecutor{});
  };
  layer.cache.values[layer.cache.at(1, 17, 3)] = std::numeric_limits<float>::quiet_NaN();
  expect_error<ScoreError>(norms,
                           {"layer 0 query head 2 token 17", "its value, or the layer's output weights"});
  layer.cache.values[layer.cache.at(1, 17, 3)] = 1.0F;
  weights[5 * 4 * 16 + 3 * 16 + 9] = std::numeric_limits<float>::infinity();
  expect_error<ArgumentError>(norms, {"output weights of layer 0 query head 3", "NaN or infinite"});
}

TEST(OutputWeights, SayWhatTheyLack) {
  const std::vector<float> data(6, 1.0F);
  const OutputShape shape{.hidden = 3, .query_heads = 2, .head_dim = 1};
  using Layers = std::vector<const float*>;
  expect_error<ArgumentError>([&] { OutputWeights(Layers{}, shape); },
                              {"at least one layer", "got 0 layers of 3"});
  expect_error<ArgumentError>(
      [&] { OutputWeights(Layers{data.data()}, {.hidden = 0, .query_heads = 2, .head_dim = 1}); },
      {"got 1 layers of 0 rows of 2 heads of 1"});
  expect_error<ArgumentError>(
      [&] {
        OutputWeights(Layers{data.data(), nullptr}, shape);
      },
      {"output weights of layer 1 are null", "every layer"});
  expect_error<ArgumentError>(
      [&] {
        OutputWeights(Layers{data.data()},
                      {.hidden = 1, .query_heads = 2, .head_dim = std::size_t{1} << 40U});
      },
      {"of no model", "give its sizes"});
  const OutputWeights weights(Layers{data.data(), data.data()}, shape);
  EXPECT_NO_THROW(weights.validate(2, 2, 1));
  expect_error<ArgumentError>([&] { weights.validate(3, 2, 1); },
                              {"of 2 layers of 2 heads of 1 elements, the model has 3 of 2 of 1"});
  const std::vector<std::size_t> some{1};
  EXPECT_EQ(weights.of_layers(some).layers(), 1U);
  const std::vector<std::size_t> beyond{2};
  expect_error<ArgumentError>([&] { static_cast<void>(weights.of_layers(beyond)); },
                              {"layers 0 to 1", "layer 2"});
}

}  // namespace
}  // namespace compresskv
