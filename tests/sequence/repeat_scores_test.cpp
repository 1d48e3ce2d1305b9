// What a compressor tells of the repeats that it was shown, before it chooses by them.

#include <gtest/gtest.h>

#include <algorithm>
#include <compresskv/compresskv.hpp>
#include <span>
#include <vector>

#include "reference/errors.hpp"
#include "reference/layer_case.hpp"
#include "reference/output_norms.hpp"
#include "reference/repeats.hpp"

namespace compresskv {
namespace {

using reference::expect_error;
using reference::Layer;
using KvZipPlan = Plan<score::KvZip, select::WholeModel, budget::Uniform>;

template <class C>
concept TellsRepeats = requires(const C& compressor) {
  compressor.repeat_scores(0, 0);
};
static_assert(TellsRepeats<Compressor<KvZipPlan>>);
static_assert(!TellsRepeats<Compressor<Plan<score::Knorm, select::GroupedTopK, budget::Uniform>>>);

constexpr std::size_t context = 40;

/// A layer of two query heads a group; ten tokens are fed behind the context, eight of which repeat.
const reference::LayerCase repeated{
    .group = 2, .kv_heads = 3, .head_dim = 16, .rows = context + 10, .window = 8};

/// What is told beside attention in double that counts `weigh(query head, query, row)` times.
template <class P, class Weigh>
void expect_told(const P& plan, Layer<float>& layer, std::span<const float> hidden_norms,
                 const Weigh& weigh) {
  Compressor compressor{plan};
  expect_error<ArgumentError>([&] { compressor.repeat_scores(0, 0); }, {"begin() was not called"});
  compressor.begin(context);
  EXPECT_EQ(compressor.repeat_scores(0, 2), std::vector<float>(context, 0.0F)) << "nothing was shown";
  std::vector<std::vector<double>> expected(3, std::vector<double>(context, 0.0));
  for (const Stretch& stretch : {Stretch{.first = 0, .last = 25}, Stretch{.first = 25, .last = context}}) {
    compressor.observe(0, layer.cache.view(), stretch, layer.observation(), hidden_norms);
    for (std::size_t kv_head = 0; kv_head < 3; ++kv_head) {
      const auto found = reference::repeat_scores(
          [&](std::size_t row, std::size_t dim) { return layer.key(kv_head, row, dim); },
          [&](std::size_t head, std::size_t i, std::size_t dim) {
            return layer.query(kv_head * 2 + head, i, dim);
          },
          [](std::size_t row) { return row; }, 2, context, context + 10, 8, 16, layer.scale(), stretch, 4,
          [&](std::size_t head, std::size_t i, std::size_t row) {
            return weigh(kv_head * 2 + head, i, row);
          });
      for (std::size_t row = 0; row < context; ++row) {
        expected[kv_head][row] = std::max(expected[kv_head][row], found[row]);
      }
      const std::vector<float> told = compressor.repeat_scores(0, kv_head);
      ASSERT_EQ(told.size(), context);
      for (std::size_t row = 0; row < context; ++row) {
        ASSERT_NEAR(static_cast<double>(told[row]), expected[kv_head][row],
                    1e-3 * expected[kv_head][row] + 1e-7)
            << "KV head " << kv_head << " row " << row;
      }
    }
  }
  EXPECT_GT(compressor.repeat_scores(0, 1).back(), 0.0F) << "the window's too";
  expect_error<ArgumentError>([&] { compressor.repeat_scores(1, 0); }, {"layer is 1"});
  expect_error<ArgumentError>([&] { compressor.repeat_scores(0, 3); },
                              {"kv_head is 3, the model has KV heads 0 to 2"});
  layer.cache.set_rows({context, context, context});
  compressor.finish([&](std::size_t) { return layer.cache.view(); });
  expect_error<ArgumentError>([&] { compressor.repeat_scores(0, 0); }, {"begin_turn() starts the next turn"});
}

TEST(RepeatScores, AreToldUntilTheyAreUsed) {
  Layer<float> layer(repeated);
  const KvZipPlan plan{layer.shape, score::KvZip{}, select::WholeModel{},
                       budget::Uniform{Budget::kept_ratio(0.5)}};
  expect_told(plan, layer, {}, [](std::size_t, std::size_t, std::size_t) { return 1.0; });
}

TEST(RepeatScores, AreToldWithoutWhatTheyAreHeldTimes) {
  Layer<float> layer(repeated);
  const std::vector<float> outputs = reference::random_outputs(3, layer.shape);
  const std::vector<const float*> layers{outputs.data()};
  const OutputWeights weights(layers, {.hidden = reference::output_rows, .query_heads = 6, .head_dim = 16});
  const std::vector<float> norms{1.0F, 2.0F, 0.5F, 3.0F, 1.5F, 2.5F, 1.0F, 4.0F};
  const Plan plan{layer.shape, score::KvZipPlus{weights}, select::WholeModel{},
                  budget::Uniform{Budget::kept_ratio(0.5)}};
  expect_told(plan, layer, norms, [&](std::size_t head, std::size_t i, std::size_t row) {
    return reference::euclidean(reference::added_to_output(layer, outputs, head, row)) /
           static_cast<double>(norms[i]);
  });
}

}  // namespace
}  // namespace compresskv
