#include <gtest/gtest.h>

#include <compresskv/core/shape.hpp>

#include "reference/errors.hpp"

namespace compresskv {
namespace {

using reference::expect_error;

TEST(ModelShape, AcceptsEveryWholeGroup) {
  for (const std::size_t group : {1U, 3U, 4U, 9U}) {
    const ModelShape shape{.layers = 2, .query_heads = 2 * group, .kv_heads = 2, .head_dim = 1};
    EXPECT_NO_THROW(shape.validate());
    EXPECT_EQ(shape.group(), group);
  }
}

TEST(ModelShape, RejectsWhatIsMissingByName) {
  constexpr ModelShape good{.layers = 2, .query_heads = 4, .kv_heads = 2, .head_dim = 8};
  ModelShape shape = good;
  shape.layers = 0;
  expect_error<ArgumentError>([&] { shape.validate(); }, {"ModelShape::layers is 0"});
  shape = good;
  shape.query_heads = 0;
  expect_error<ArgumentError>([&] { shape.validate(); }, {"ModelShape::query_heads is 0"});
  shape = good;
  shape.kv_heads = 0;
  expect_error<ArgumentError>([&] { shape.validate(); }, {"ModelShape::kv_heads is 0"});
  shape = good;
  shape.head_dim = 0;
  expect_error<ArgumentError>([&] { shape.validate(); }, {"ModelShape::head_dim is 0"});
}

TEST(ModelShape, RejectsGroupsOfDifferentSizes) {
  const ModelShape shape{.layers = 2, .query_heads = 9, .kv_heads = 2, .head_dim = 8};
  expect_error<ArgumentError>([&] { shape.validate(); },
                              {"query_heads is 9", "multiple of kv_heads 2", "same number of query heads"});
}

TEST(ModelShape, RejectsProductsBeyond64Bits) {
  constexpr std::size_t huge = std::size_t{1} << 40U;
  const auto reject = [](const ModelShape& shape) {
    expect_error<ArgumentError>([&] { shape.validate(); }, {"ModelShape: ", "query heads", "beyond 64 bits"});
  };
  reject({.layers = huge, .query_heads = 4, .kv_heads = 2, .head_dim = huge});
  reject({.layers = huge, .query_heads = std::size_t{1} << 30U, .kv_heads = 2, .head_dim = 8});
  reject({.layers = 2, .query_heads = huge, .kv_heads = 2, .head_dim = 8});
  reject({.layers = 2, .query_heads = 4, .kv_heads = 2, .head_dim = std::size_t{1} << 62U});
}

}  // namespace
}  // namespace compresskv
