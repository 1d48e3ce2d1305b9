#include "compresskv/core/surrogate.hpp"

#include <gtest/gtest.h>

#include <array>
#include <limits>
#include <vector>

#include "reference/errors.hpp"
#include "reference/hidden_states.hpp"

namespace compresskv {
namespace {

using reference::expect_error;

const ModelShape surrogate_shape{.layers = 3, .query_heads = 4, .kv_heads = 2, .head_dim = 4};

TEST(Surrogate, HoldsWhatItWasGivenAndSharesItWithItsCopies) {
  const Surrogate surrogate(1, 2, 3, {1.0F, 2.0F, 3.0F, 4.0F, 5.0F, 6.0F}, {-1.0F, -2.0F});
  EXPECT_EQ(surrogate.layers(), 1U);
  EXPECT_EQ(surrogate.kv_heads(), 2U);
  EXPECT_EQ(surrogate.hidden_size(), 3U);
  EXPECT_EQ(surrogate.weights(0, 1)[0], 4.0F);
  EXPECT_EQ(surrogate.weights(0, 1).size(), 3U);
  EXPECT_EQ(surrogate.bias(0, 1), -2.0F);
  const Surrogate copy = surrogate;
  EXPECT_EQ(copy.weights(0, 0).data(), surrogate.weights(0, 0).data());
  EXPECT_EQ(copy, surrogate);
  EXPECT_FALSE(surrogate == Surrogate(1, 2, 3, {1.0F, 2.0F, 3.0F, 4.0F, 5.0F, 7.0F}, {-1.0F, -2.0F}));
  EXPECT_FALSE(surrogate == Surrogate(1, 2, 3, {1.0F, 2.0F, 3.0F, 4.0F, 5.0F, 6.0F}, {-1.0F, -3.0F}));
  EXPECT_FALSE(surrogate == Surrogate(2, 1, 3, {1.0F, 2.0F, 3.0F, 4.0F, 5.0F, 6.0F}, {-1.0F, -2.0F}));
}

TEST(Surrogate, OfSomeLayersIsTheirs) {
  const Surrogate surrogate = reference::surrogate(surrogate_shape, 5);
  const std::array<std::size_t, 2> some{0, 2};
  const Surrogate picked = surrogate.of_layers(some);
  EXPECT_EQ(picked.layers(), 2U);
  for (std::size_t head = 0; head < 2; ++head) {
    EXPECT_TRUE(std::ranges::equal(picked.weights(1, head), surrogate.weights(2, head)));
    EXPECT_EQ(picked.bias(1, head), surrogate.bias(2, head));
  }
  const std::array<std::size_t, 1> beyond{3};
  expect_error<ArgumentError>([&] { static_cast<void>(surrogate.of_layers(beyond)); },
                              {"surrogate has layers 0 to 2, layer 3 was asked for"});
}

TEST(Surrogate, RefusesWhatIsNone) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  expect_error<ArgumentError>([] { Surrogate(0, 1, 1, {}, {}); },
                              {"got 0 layers of 1 KV heads of 1 elements"});
  expect_error<ArgumentError>([] { Surrogate(1, 1, std::size_t{1} << 62U, {}, {}); }, {"is of no model"});
  expect_error<ArgumentError>(
      [] {
        Surrogate(1, 2, 1, {1.0F}, {1.0F, 1.0F});
      },
      {"surrogate has 1 weights and 2 biases", "need 2 and 2"});
  expect_error<ArgumentError>(
      [&] {
        Surrogate(1, 2, 1, {1.0F, nan}, {1.0F, 1.0F});
      },
      {"surrogate of layer 0 KV head 1 has nan: every number must be finite"});
  expect_error<ArgumentError>(
      [&] {
        Surrogate(2, 1, 1, {1.0F, 1.0F}, {1.0F, nan});
      },
      {"surrogate of layer 1 KV head 0 has nan as its bias"});
  const Surrogate surrogate = reference::surrogate(surrogate_shape, 5);
  expect_error<ArgumentError>([&] { surrogate.validate(3, 4); },
                              {"surrogate is of 3 layers of 2 KV heads, the model has 3 of 4"});
}

}  // namespace
}  // namespace compresskv
