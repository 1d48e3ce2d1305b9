#include <gtest/gtest.h>

#include <compresskv/score/tova.hpp>

#include "reference/methods.hpp"

namespace compresskv {
namespace {

using reference::Layer;
using reference::LayerCase;

TEST(Tova, IsTheReferenceOverGeneratedLayers) {
  for (LayerCase c : reference::layer_cases(40, 73)) {
    SCOPED_TRACE(c);
    c.window = 1;
    Layer<float> layer(c);
    const double relative = reference::score_tolerance(c.head_dim, c.rows, 1, 1, c.query_heads(),
                                                       reference::largest_logit_mass(layer));
    reference::expect_scores(score::Tova{}, layer, reference::tova(layer), relative,
                             reference::score_underflow(1));
  }
}

TEST(Tova, KeepsNoWindowButTheLastToken) {
  // The last query looks at tokens 0 and 2 alone: recent ones go.
  const std::vector<float> weights{0.5F, 0.0F, 0.4F, 0.0F, 0.0F, 0.1F};
  const Plan plan{ModelShape{.layers = 1, .query_heads = 1, .kv_heads = 1, .head_dim = 4}, score::Tova{},
                  select::SharedTopK{}, budget::Uniform{Budget::tokens_per_layer(3)}};
  Compressor compressor{plan};
  compressor.begin(6);
  const auto rows =
      compressor
          .select(0, AttentionMatrix<float>(weights.data(), {.query_heads = 1, .queries = 1, .tokens = 6}))
          .rows();
  EXPECT_EQ(std::vector<std::uint32_t>(rows.begin(), rows.end()), (std::vector<std::uint32_t>{0, 2, 5}));
}

}  // namespace
}  // namespace compresskv
