// What a compressor tells of the repeats that it was shown, before it chooses by them.

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <compresskv/compresskv.hpp>
#include <vector>

#include "reference/errors.hpp"
#include "reference/layer_case.hpp"
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

TEST(RepeatScores, AreToldUntilTheyAreUsed) {
  constexpr std::size_t context = 40;
  // Ten tokens are fed behind the context, eight of which repeat.
  Layer<float> layer({.group = 2, .kv_heads = 3, .head_dim = 16, .rows = context + 10, .window = 8});
  const KvZipPlan plan{layer.shape, score::KvZip{}, select::WholeModel{},
                       budget::Uniform{Budget::kept_ratio(0.5)}};
  Compressor compressor{plan};
  expect_error<ArgumentError>([&] { compressor.repeat_scores(0, 0); }, {"begin() was not called"});
  compressor.begin(context);
  EXPECT_EQ(compressor.repeat_scores(0, 2), std::vector<float>(context, 0.0F)) << "nothing was shown";
  const std::array<Stretch, 2> stretches = {Stretch{.first = 0, .last = 25},
                                            Stretch{.first = 25, .last = context}};
  std::vector<std::vector<double>> expected(3, std::vector<double>(context, 0.0));
  for (const Stretch& stretch : stretches) {
    compressor.observe(0, layer.cache.view(), stretch, layer.observation());
    for (std::size_t kv_head = 0; kv_head < 3; ++kv_head) {
      const auto found = reference::repeat_scores(
          [&](std::size_t row, std::size_t dim) { return layer.key(kv_head, row, dim); },
          [&](std::size_t head, std::size_t i, std::size_t dim) {
            return layer.query(kv_head * 2 + head, i, dim);
          },
          [](std::size_t row) { return row; }, 2, context, context + 10, 8, 16, layer.scale(), stretch, 4);
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

}  // namespace
}  // namespace compresskv
