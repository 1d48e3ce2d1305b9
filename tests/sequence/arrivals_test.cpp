#include <gtest/gtest.h>

#include <compresskv/sequence/arrivals.hpp>

#include "reference/errors.hpp"

namespace compresskv::sequence {
namespace {

using reference::expect_error;

TEST(Arrivals, LayersComeInOrderEachOnce) {
  Arrivals arrivals;
  arrivals.start();
  EXPECT_FALSE(arrivals.under_way());
  expect_error<ArgumentError>([&] { arrivals.check_next(1); }, {"layer 1 arrives, expected layer 0"});
  arrivals.check_next(0);
  arrivals.add(3);
  EXPECT_TRUE(arrivals.under_way());
  expect_error<ArgumentError>([&] { arrivals.check_next(0); }, {"layer 0 arrives, expected layer 1"});
  expect_error<ArgumentError>([&] { arrivals.check_all(2); }, {"layer 1 has not arrived", "all 2 layers"});
  arrivals.add(3);
  arrivals.check_all(2);
  arrivals.end();
  EXPECT_FALSE(arrivals.under_way());
  expect_error<ArgumentError>([&] { arrivals.check_next(2); }, {"have all arrived", "begin_turn()"});
  expect_error<ArgumentError>([&] { arrivals.check_all(2); }, {"have all arrived"});
  arrivals.start();
  arrivals.check_next(0);
}

}  // namespace
}  // namespace compresskv::sequence
