#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <compresskv/score/knorm.hpp>
#include <cstdint>
#include <limits>

#include "reference/errors.hpp"
#include "reference/methods.hpp"

namespace compresskv {
namespace {

using reference::expect_error;
using reference::Layer;
using reference::LayerCase;

TEST(Knorm, IsTheReferenceOverGeneratedLayers) {
  for (const LayerCase& c : reference::layer_cases(30, 74)) {
    SCOPED_TRACE(c);
    Layer<float> layer(c);
    reference::expect_scores(score::Knorm{{.window = c.window}}, layer, reference::knorm(layer), 1.5e-7, 0.0);
  }
}

TEST(Knorm, RejectsNoWindow) {
  expect_error<ArgumentError>([] { score::Knorm{{.window = 0}}; }, {"window is 0"});
}

TEST(Knorm, LengthsBeyondFloat32CountAsItsLargest) {
  Layer<float> layer({.head_dim = 4, .rows = 20, .window = 2, .capacity = 4});
  for (std::size_t dim = 0; dim < 4; ++dim) {
    layer.cache.keys[layer.cache.at(0, 3, dim)] = std::numeric_limits<float>::max();
    layer.cache.keys[layer.cache.at(0, 4, dim)] = std::bit_cast<float>(std::uint32_t{8});  // 2^-146
  }
  const Plan plan{layer.shape, score::Knorm{{.window = 2}}, select::GroupedTopK{},
                  budget::Uniform{Budget::tokens_per_layer(4)}};
  Compressor compressor{plan};
  compressor.begin(20);
  const auto scores = compressor.score(0, layer.cache.view()).row(0);
  EXPECT_EQ(scores[3], -std::numeric_limits<float>::max());
  EXPECT_EQ(std::bit_cast<std::uint32_t>(scores[4]), 0x80000010U) << "the length is 2^-145";
  const auto rows = compressor.compress(0, layer.cache.view()).positions(0);
  EXPECT_NE(std::find(rows.begin(), rows.end(), 4U), rows.end());
}

}  // namespace
}  // namespace compresskv
