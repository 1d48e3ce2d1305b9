#include "compresskv/core/float_bits.hpp"

#include <gtest/gtest.h>

#include <limits>

namespace {

using compresskv::detail::is_finite;
using compresskv::detail::is_nan;

template <class T>
void expect_told_apart() {
  using Limits = std::numeric_limits<T>;
  for (const T x :
       {T{0}, -T{0}, T{1}, (Limits::max)(), Limits::lowest(), (Limits::min)(), Limits::denorm_min()}) {
    EXPECT_TRUE(is_finite(x)) << x;
    EXPECT_FALSE(is_nan(x)) << x;
  }
  for (const T x : {Limits::infinity(), -Limits::infinity()}) {
    EXPECT_FALSE(is_finite(x)) << x;
    EXPECT_FALSE(is_nan(x)) << x;
  }
  for (const T x : {Limits::quiet_NaN(), -Limits::quiet_NaN(), Limits::signaling_NaN()}) {
    EXPECT_FALSE(is_finite(x)) << x;
    EXPECT_TRUE(is_nan(x)) << x;
  }
}

TEST(Finite, TellsNumbersInfinitiesAndNanApartByTheirBits) {
  expect_told_apart<float>();
  expect_told_apart<double>();
}

}  // namespace
