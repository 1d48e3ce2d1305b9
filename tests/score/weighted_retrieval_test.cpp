#include <gtest/gtest.h>

#include <compresskv/score/carried.hpp>
#include <compresskv/score/model_wide.hpp>

#include "reference/errors.hpp"

namespace compresskv {
namespace {

using reference::expect_error;

/// Head scores are float64, weights float32: an infinite one would make every score infinite or NaN.
TEST(WeightedRetrieval, RejectsWeightsBeyondFloat32) {
  const HeadScores scores(2, 2, {{1.0}, {2.0}, {1.0}, {1e39}});
  const auto said = {std::string_view("weight of layer 1 head 1 is 1e+39"),
                     std::string_view("must be at most 3.40282e+38"),
                     std::string_view("divide all head scores")};
  expect_error<ArgumentError>([&] { score::Carried(scores, {.heads_per_layer = 1}); }, said);
  expect_error<ArgumentError>([&] { score::ModelWide(scores, {.heads = 2}); }, said);
  EXPECT_NO_THROW(score::ModelWide(scores, {.heads = 2, .equal_weights = true}));
}

}  // namespace
}  // namespace compresskv
