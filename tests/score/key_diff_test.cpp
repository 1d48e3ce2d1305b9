#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <compresskv/score/key_diff.hpp>
#include <cstdint>
#include <limits>
#include <vector>

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

/// Directions alone count: keys of the smallest numbers have the scores of those a power of two longer.
TEST(KeyDiff, KeysOfDenormalNumbersHaveTheirDirection) {
  reference::Random random(77);
  Layer<float> layer({.head_dim = 8, .rows = 40, .window = 3, .capacity = 10});
  Layer<float> tiny({.head_dim = 8, .rows = 40, .window = 3, .capacity = 10});
  for (std::size_t row = 0; row < 40; ++row) {
    for (std::size_t dim = 0; dim < 8; ++dim) {
      const auto magnitude = static_cast<std::uint32_t>(random.below(50));
      const std::uint32_t sign = random.below(2) == 0 ? 0U : 0x80000000U;
      layer.cache.keys[layer.cache.at(0, row, dim)] =
          (sign == 0 ? 1.0F : -1.0F) * static_cast<float>(magnitude);
      tiny.cache.keys[tiny.cache.at(0, row, dim)] = std::bit_cast<float>(sign | magnitude);
    }
  }
  const Plan plan{layer.shape, score::KeyDiff{{.window = 3}}, select::GroupedTopK{},
                  budget::Uniform{Budget::tokens_per_layer(10)}};
  Compressor compressor{plan};
  compressor.begin(40);
  const auto row = compressor.score(0, layer.cache.view()).row(0);
  const std::vector<float> expected(row.begin(), row.end());
  const auto scores = compressor.score(0, tiny.cache.view()).row(0);
  EXPECT_TRUE(std::equal(scores.begin(), scores.end(), expected.begin(), expected.end()));
  EXPECT_GT(*std::max_element(expected.begin(), expected.end()), 0.1F);
}

TEST(KeyDiff, NamesTheKeyThatIsNotFinite) {
  for (const float poison :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    Layer<float> layer({.head_dim = 4, .rows = 20, .window = 2, .capacity = 4});
    layer.cache.keys[layer.cache.at(0, 7, 2)] = poison;
    const Plan plan{layer.shape, score::KeyDiff{{.window = 2}}, select::GroupedTopK{},
                    budget::Uniform{Budget::tokens_per_layer(4)}};
    Compressor compressor{plan};
    compressor.begin(20);
    expect_error<ScoreError>([&] { compressor.compress(0, layer.cache.view()); }, {"row 0 token 7 is "});
    layer.cache.keys[layer.cache.at(0, 7, 2)] = 1.0F;
    layer.cache.keys[layer.cache.at(0, 19, 2)] = poison;  // of the window: the mean has it
    expect_error<ScoreError>([&] { compressor.compress(0, layer.cache.view()); }, {"scores must be finite"});
  }
}

}  // namespace
}  // namespace compresskv
