#include <gtest/gtest.h>

#include <compresskv/score/knorm.hpp>

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

}  // namespace
}  // namespace compresskv
