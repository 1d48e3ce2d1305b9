#include <gtest/gtest.h>

#include <compresskv/score/cake.hpp>
#include <limits>
#include <vector>

#include "reference/errors.hpp"
#include "reference/methods.hpp"

namespace compresskv {
namespace {

using reference::expect_error;
using reference::Layer;
using reference::LayerCase;

TEST(Cake, IsTheReferenceOverGeneratedLayers) {
  for (LayerCase c : reference::layer_cases(40, 76)) {
    SCOPED_TRACE(c);
    c.pool = kernel::Pool::average;
    Layer<float> layer(c);
    const float gamma = c.rows % 2 == 0 ? 200.0F : 0.0F;
    const double relative = reference::score_tolerance(c.head_dim, c.rows, c.observed(), c.pool_width,
                                                       c.group, reference::largest_logit_mass(layer));
    // The variance of weights that are each off by `relative` is off by at most four times that of the
    // largest square, however small it is itself; gamma makes it count.
    double largest = 0.0;
    for (std::size_t head = 0; head < c.query_heads(); ++head) {
      for (const auto& row : layer.attention(head).weights) {
        for (std::size_t t = 0; t + c.observed() < c.rows; ++t) {
          largest = std::max(largest, row[t]);
        }
      }
    }
    const double absolute = reference::score_underflow(c.observed()) +
                            4.0 * relative * static_cast<double>(gamma) * largest * largest;
    reference::expect_scores(score::Cake{{.gamma = gamma, .window = c.window, .pool_width = c.pool_width}},
                             layer, reference::cake(layer, static_cast<double>(gamma)), 2.0 * relative,
                             absolute);
  }
}

TEST(Cake, TokensThatAreLookedAtUnevenlyStay) {
  // Token 1 has a mean of 0.2 in both rows, token 3 one of 0.15 from 0.3 and 0.
  const std::vector<float> weights{0.1F, 0.2F, 0.0F, 0.3F, 0.4F, 0.0F,  //
                                   0.3F, 0.2F, 0.0F, 0.0F, 0.4F, 0.1F};
  const auto rows_with = [&](float gamma) {
    const Plan plan{ModelShape{.layers = 1, .query_heads = 1, .kv_heads = 1, .head_dim = 4},
                    score::Cake{{.gamma = gamma, .window = 2, .pool_width = 1}}, select::GroupedTopK{},
                    budget::Uniform{Budget::tokens_per_layer(4)}};
    Compressor compressor{plan};
    compressor.begin(6);
    const auto rows =
        compressor
            .select(0, AttentionMatrix<float>(weights.data(), {.query_heads = 1, .queries = 2, .tokens = 6}))
            .rows(0);
    return std::vector<std::uint32_t>(rows.begin(), rows.end());
  };
  EXPECT_EQ(rows_with(0.0F), (std::vector<std::uint32_t>{0, 1, 4, 5}));
  EXPECT_EQ(rows_with(200.0F), (std::vector<std::uint32_t>{0, 3, 4, 5}));
}

TEST(Cake, RejectsOptionsByName) {
  expect_error<ArgumentError>([] { score::Cake{{.window = 0}}; }, {"window is 0"});
  expect_error<ArgumentError>([] { score::Cake{{.pool_width = 2}}; }, {"pooling width is 2"});
  expect_error<ArgumentError>([] { score::Cake{{.gamma = -1.0F}}; }, {"gamma is -1"});
  expect_error<ArgumentError>([] { score::Cake{{.gamma = std::numeric_limits<float>::infinity()}}; },
                              {"gamma is inf"});
}

}  // namespace
}  // namespace compresskv
