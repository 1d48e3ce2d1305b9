#include <gtest/gtest.h>

#include <compresskv/core/budget.hpp>
#include <cstddef>
#include <limits>
#include <string_view>

#include "reference/errors.hpp"

namespace compresskv {
namespace {

using reference::expect_error;

constexpr ModelShape shape{
    .layers = 4, .query_heads = 6, .kv_heads = 2, .head_dim = 16, .kv_row_bytes = 2 * 16 * sizeof(float)};

TEST(Budget, TokensAreTakenAsGivenUpToThePrompt) {
  const Budget budget = Budget::tokens_per_layer(100);
  EXPECT_EQ(budget.resolve(1000, 8, shape), 100U);
  EXPECT_EQ(budget.resolve(100, 8, shape), 100U);
  EXPECT_EQ(budget.resolve(99, 8, shape), 99U);
  EXPECT_EQ(budget.resolve(1, 8, shape), 1U);
  EXPECT_EQ(Budget::tokens_per_layer(8).resolve(1000, 8, shape), 8U);
}

TEST(Budget, RatioIsTheShareKeptRoundedDownAndNeverBelowTheWindow) {
  EXPECT_EQ(Budget::kept_ratio(0.25).resolve(1003, 8, shape), 250U);
  EXPECT_EQ(Budget::kept_ratio(0.01).resolve(1000, 8, shape), 10U);
  // A ratio that rounds to less than the window, even to zero, keeps the window.
  EXPECT_EQ(Budget::kept_ratio(0.01).resolve(700, 8, shape), 8U);
  EXPECT_EQ(Budget::kept_ratio(0.01).resolve(50, 8, shape), 8U);
  EXPECT_EQ(Budget::kept_ratio(0.01).resolve(5, 8, shape), 5U);
  EXPECT_EQ(Budget::kept_ratio(1.0).resolve(1003, 8, shape), 1003U);
}

TEST(Budget, BytesAreWholeRowsOverAllLayersAndHeads) {
  constexpr std::size_t row = 4 * 2 * 128;  // layers, KV heads, bytes of a K and a V row
  EXPECT_EQ(Budget::bytes(row * 50).resolve(1000, 8, shape), 50U);
  EXPECT_EQ(Budget::bytes(row * 51 - 1).resolve(1000, 8, shape), 50U);
  EXPECT_EQ(Budget::bytes(row * 5000).resolve(1000, 8, shape), 1000U);
  EXPECT_EQ(Budget::bytes(row * 8).resolve(1000, 8, shape), 8U);
}

TEST(Budget, RatiosOutsideTheRangeAreRejected) {
  for (const double share : {0.0, -0.5, 1.0000001, 25.0, std::numeric_limits<double>::infinity(),
                             std::numeric_limits<double>::quiet_NaN()}) {
    expect_error<ArgumentError>([&] { Budget::kept_ratio(share); },
                                {"budget ratio is ", "must be in (0, 1]", "share of the cache that is kept"});
  }
  expect_error<ArgumentError>([] { Budget::kept_ratio(25.0); }, {"budget ratio is 25,"});
}

TEST(Budget, LessThanTheWindowIsRejected) {
  const auto tokens = Budget::tokens_per_layer(7);
  const auto expect_tokens = [](auto&& call) {
    expect_error<ArgumentError>(call,
                                {"budget is 7 rows a layer", "window alone is 8", "at least the window"});
  };
  expect_tokens([&] { tokens.resolve(1000, 8, shape); });
  expect_tokens([&] { tokens.resolve(3, 8, shape); });
  expect_tokens([&] { tokens.validate(8, shape); });
  expect_error<ArgumentError>([] { Budget::tokens_per_layer(0).validate(8, shape); }, {"budget is 0 rows"});

  const auto bytes = Budget::bytes(1024 * 8 - 1);
  const auto expect_bytes = [](auto&& call) {
    expect_error<ArgumentError>(call, {"budget of 8191 bytes is 7 rows a layer", "4 layers is 1024 bytes",
                                       "window alone is 8", "give at least 8192 bytes"});
  };
  expect_bytes([&] { bytes.resolve(1000, 8, shape); });
  expect_bytes([&] { bytes.validate(8, shape); });
  EXPECT_NO_THROW(Budget::bytes(1024 * 8).validate(8, shape));
  EXPECT_NO_THROW(Budget::kept_ratio(0.001).validate(8, shape));
}

TEST(Budget, BytesNeedTheSizeOfARow) {
  ModelShape unknown = shape;
  unknown.kv_row_bytes = 0;
  expect_error<ArgumentError>([&] { Budget::bytes(1 << 20).validate(8, unknown); },
                              {"budget in bytes needs ModelShape::kv_row_bytes", "which is 0"});
  EXPECT_NO_THROW(Budget::tokens_per_layer(8).validate(8, unknown));
}

TEST(Budget, NumbersAtTheEndOfTheirRange) {
  constexpr std::size_t most = std::numeric_limits<std::size_t>::max();
  EXPECT_EQ(Budget::kept_ratio(1.0).resolve(most, 8, shape), most);
  EXPECT_EQ(Budget::kept_ratio(0.5).resolve(most, 8, shape), std::size_t{1} << 63U);
  EXPECT_EQ(Budget::tokens_per_layer(most).resolve(1000, 8, shape), 1000U);
  EXPECT_EQ(Budget::bytes(most).resolve(1000, 8, shape), 1000U);
  expect_error<ArgumentError>([&] { Budget::bytes(5).resolve(1000, most, shape); },
                              {"budget of 5 bytes is 0 rows a layer", "give at least 2^64 bytes"});
}

/// 2^63 bytes a row of two KV heads is 0 in 64 bits, which a budget was divided by.
TEST(Budget, RowsBeyond64BitsAreRejected) {
  for (const std::size_t bytes :
       {std::size_t{1} << 63U, std::size_t{1} << 61U, std::numeric_limits<std::size_t>::max()}) {
    ModelShape wide = shape;
    wide.kv_row_bytes = bytes;
    const auto said = {std::string_view("4 layers of 2 KV heads of kv_row_bytes"),
                       std::string_view("beyond 64 bits")};
    expect_error<ArgumentError>([&] { Budget::bytes(1000).validate(8, wide); }, said);
    expect_error<ArgumentError>([&] { Budget::bytes(1000).resolve(1000, 8, wide); }, said);
    expect_error<ArgumentError>([&] { wide.validate(); }, said);
  }
  expect_error<ArgumentError>([&] { Budget::bytes(1000).resolve(1000, 8, {.kv_row_bytes = 8}); },
                              {"a budget in bytes needs a model"});
}

}  // namespace
}  // namespace compresskv
