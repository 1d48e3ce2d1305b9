#include <gtest/gtest.h>

#include <compresskv/score/key_diff.hpp>

#include "reference/errors.hpp"
#include "reference/methods.hpp"

namespace compresskv {
namespace {

using reference::expect_error;
using reference::Layer;
using reference::LayerCase;

TEST(KeyDiff, IsTheReferenceOverGeneratedLayers) {
  for (const LayerCase& c : reference::layer_cases(30, 75)) {
    if (c.head_dim == 1) {
      continue;  // directions are +1 and -1: their mean may vanish, and with it the cosine
    }
    SCOPED_TRACE(c);
    Layer<float> layer(c);
    // Each of the mean's S terms rounds once, relative to a sum of at most S; the mean may be much shorter.
    reference::expect_scores(score::KeyDiff{{.window = c.window}}, layer, reference::key_diff(layer), 0.0,
                             2e-5);
  }
}

TEST(KeyDiff, AKeyOfNoLengthIsOrthogonal) {
  Layer<float> layer({.head_dim = 4, .rows = 20, .window = 2, .capacity = 4});
  for (std::size_t dim = 0; dim < 4; ++dim) {
    layer.cache.keys[layer.cache.at(0, 7, dim)] = 0.0F;
  }
  const Plan plan{layer.shape, score::KeyDiff{{.window = 2}}, select::GroupedTopK{},
                  budget::Uniform{Budget::tokens_per_layer(4)}};
  Compressor compressor{plan};
  compressor.begin(20);
  const auto scores = compressor.score(0, layer.cache.view());
  EXPECT_EQ(scores.row(0)[7], 0.0F);
}

TEST(KeyDiff, RejectsNoWindow) {
  expect_error<ArgumentError>([] { score::KeyDiff{{.window = 0}}; }, {"window is 0"});
}

}  // namespace
}  // namespace compresskv
