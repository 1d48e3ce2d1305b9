#include <gtest/gtest.h>

#include <compresskv/score/snap_kv.hpp>

#include "reference/errors.hpp"
#include "reference/methods.hpp"

namespace compresskv {
namespace {

using reference::expect_error;
using reference::Layer;
using reference::LayerCase;

TEST(SnapKv, IsTheReferenceOverGeneratedLayers) {
  for (const LayerCase& c : reference::layer_cases(40, 71)) {
    SCOPED_TRACE(c);
    Layer<float> layer(c);
    const double relative = reference::score_tolerance(c.head_dim, c.rows, c.observed(), c.pool_width,
                                                       c.group, reference::largest_logit_mass(layer));
    reference::expect_scores(score::SnapKv{{.window = c.window, .pool = c.pool, .pool_width = c.pool_width}},
                             layer, reference::snap_kv(layer), relative,
                             reference::score_underflow(c.observed()));
  }
}

TEST(SnapKv, AveragesConsecutiveHeads) {
  // Two KV heads of two query heads each. Only the second head of the first group sees token 3, only the
  // first of the second group token 5: a mean over (0, 2) and (1, 3) would mix them.
  const ModelShape shape{.layers = 1, .query_heads = 4, .kv_heads = 2, .head_dim = 4};
  const Plan plan{shape, score::SnapKv{{.window = 1, .pool_width = 1}}, select::GroupedTopK{},
                  budget::Uniform{Budget::tokens_per_layer(2)}};
  std::vector<float> weights(4 * 10, 0.0F);
  weights[1 * 10 + 3] = 1.0F;
  weights[2 * 10 + 5] = 1.0F;
  Compressor compressor{plan};
  compressor.begin(10);
  const Selection& rows = compressor.select(
      0, AttentionMatrix<float>(weights.data(), {.query_heads = 4, .queries = 1, .tokens = 10}));
  EXPECT_EQ(rows.rows(0)[0], 3U);
  EXPECT_EQ(rows.rows(1)[0], 5U);
}

TEST(SnapKv, RejectsOptionsByName) {
  expect_error<ArgumentError>([] { score::SnapKv{{.window = 0}}; }, {"window is 0"});
  expect_error<ArgumentError>([] { score::SnapKv{{.pool_width = 4}}; }, {"pooling width is 4", "odd"});
}

}  // namespace
}  // namespace compresskv
