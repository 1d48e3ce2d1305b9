#include "compresskv/core/query_statistics.hpp"

#include <gtest/gtest.h>

#include <array>
#include <limits>
#include <vector>

#include "reference/errors.hpp"
#include "reference/queries.hpp"

namespace compresskv {
namespace {

using reference::expect_error;
using Heads = std::vector<QueryStatistics::Head>;

/// Two layers of two heads of four elements.
Heads four_heads(const Rotary& rotary = {}) {
  reference::Random random(5);
  Heads heads;
  for (std::size_t i = 0; i < 4; ++i) {
    heads.push_back(reference::SpreadOfRows(reference::spread_queries(random, 30, 4), rotary).head(30 + i));
  }
  return heads;
}

/// What is thrown after `change` of the heads.
template <class Change>
void refused(const Change& change, std::initializer_list<std::string_view> parts) {
  Heads heads = four_heads();
  change(heads);
  expect_error<ArgumentError>([&] { QueryStatistics(2, 2, 4, {}, heads); }, parts);
}

TEST(QueryStatistics, HoldWhatTheyWereGivenAndShareItWithTheirCopies) {
  std::vector<float> factors{1.0F, 2.0F};
  const Rotary rotary{.base = 500.0,
                      .pairing = RotaryPairing::interleaved,
                      .position_scale = 0.25,
                      .frequency_factors = factors};
  const Heads heads = four_heads(rotary);
  const QueryStatistics statistics(2, 2, 4, rotary, heads);
  factors.assign(2, 9.0F);  // its own are copies
  EXPECT_EQ(statistics.layers(), 2U);
  EXPECT_EQ(statistics.query_heads(), 2U);
  EXPECT_EQ(statistics.head_dim(), 4U);
  EXPECT_EQ(statistics.pairs(), 2U);
  EXPECT_EQ(statistics.rotary().base, 500.0);
  EXPECT_EQ(statistics.rotary().frequency_factors[1], 2.0F);
  for (std::size_t i = 0; i < 4; ++i) {
    EXPECT_EQ(statistics.head(i / 2, i % 2), heads[i]);
  }
  const QueryStatistics copy = statistics;
  EXPECT_EQ(&copy.head(0, 0), &statistics.head(0, 0));
  EXPECT_EQ(copy, statistics);
}

TEST(QueryStatistics, AreEqualWhereAllIs) {
  const QueryStatistics statistics(2, 2, 4, {}, four_heads());
  EXPECT_EQ(statistics, QueryStatistics(2, 2, 4, {}, four_heads()));
  EXPECT_EQ(statistics, QueryStatistics(2, 2, 4, {.dims = 4}, four_heads())) << "0 stands for all";
  EXPECT_FALSE(statistics == QueryStatistics(1, 4, 4, {}, four_heads()));
  EXPECT_FALSE(statistics == QueryStatistics(2, 2, 4, {.base = 9.0}, four_heads()));
  EXPECT_FALSE(statistics == QueryStatistics(2, 2, 4, {.position_scale = 2.0}, four_heads()));
  const std::vector<float> factors{1.0F, 2.0F};
  EXPECT_FALSE(statistics == QueryStatistics(2, 2, 4, {.frequency_factors = factors}, four_heads()));
  Heads other = four_heads();
  other[3].mean[0] += 1e-6F;
  EXPECT_FALSE(statistics == QueryStatistics(2, 2, 4, {}, other));
}

TEST(QueryStatistics, OfSomeLayersAreTheirHeads) {
  const QueryStatistics statistics(2, 2, 4, {.base = 77.0}, four_heads());
  const std::array<std::size_t, 1> second{1};
  const QueryStatistics picked = statistics.of_layers(second);
  EXPECT_EQ(picked.layers(), 1U);
  EXPECT_EQ(picked.rotary().base, 77.0);
  EXPECT_EQ(picked.head(0, 1), statistics.head(1, 1));
  const std::array<std::size_t, 1> beyond{2};
  expect_error<ArgumentError>([&] { statistics.of_layers(beyond); }, {"layers 0 to 1", "layer 2"});
}

TEST(QueryStatistics, RefuseWhatIsNoModel) {
  expect_error<ArgumentError>([] { QueryStatistics(0, 2, 4, {}, {}); }, {"got 0 layers of 2 heads of 4"});
  expect_error<ArgumentError>([] { QueryStatistics(2, 0, 4, {}, {}); }, {"got 2 layers of 0 heads"});
  expect_error<ArgumentError>([] { QueryStatistics(2, 2, 0, {}, {}); }, {"of 0 elements"});
  constexpr std::size_t huge = std::numeric_limits<std::size_t>::max() / 2;
  expect_error<ArgumentError>([] { QueryStatistics(huge, huge, 4, {}, {}); }, {"are of no model"});
  expect_error<ArgumentError>([] { QueryStatistics(1, 1, huge, {}, {}); }, {"are of no model"});
  expect_error<ArgumentError>([] { QueryStatistics(2, 2, 5, {}, four_heads()); }, {"Rotary: dims is 5"});
  expect_error<ArgumentError>([] { QueryStatistics(3, 2, 4, {}, four_heads()); },
                              {"have 4 heads", "3 layers of 2 need 6"});
  const QueryStatistics statistics(2, 2, 4, {}, four_heads());
  statistics.validate(2, 2, 4);
  const auto other_model = [&](std::size_t layers, std::size_t heads, std::size_t dim) {
    expect_error<ArgumentError>([&] { statistics.validate(layers, heads, dim); },
                                {"are of 2 layers of 2 heads of 4 elements", "calibrated for this model"});
  };
  other_model(3, 2, 4);
  other_model(2, 1, 4);
  other_model(2, 2, 8);
}

TEST(QueryStatistics, RefuseNumbersThatNoQueriesGive) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  refused([](Heads& heads) { heads[3].count = 0; }, {"layer 1 head 1 are of no query"});
  refused([](Heads& heads) { heads[2].mean.pop_back(); },
          {"layer 1 head 0 have 3 numbers of the mean, must have 4"});
  refused([](Heads& heads) { heads[1].modulus.push_back(1.0F); },
          {"layer 0 head 1 have 3 numbers of the moduli, must have 2"});
  refused([](Heads& heads) { heads[0].covariance.pop_back(); },
          {"have 9 numbers of the covariance, must have 10"});
  refused([&](Heads& heads) { heads[0].mean[2] = nan; }, {"have nan at place 2 of the mean"});
  refused([&](Heads& heads) { heads[0].modulus[1] = std::numeric_limits<float>::infinity(); },
          {"have inf at place 1 of the moduli"});
  refused([&](Heads& heads) { heads[0].covariance[9] = nan; }, {"have nan at place 9 of the covariance"});
  refused([](Heads& heads) { heads[0].covariance[5] = -1.0F; }, {"have the variance -1 of element 2"});
  refused([](Heads& heads) { heads[0].covariance[7] = -1000.0F; },
          {"have the covariance -1000 of elements 3 and 1", "root of their product"});
  refused([](Heads& heads) { heads[0].modulus[0] = 0.0F; },
          {"have the mean modulus 0 of pair 0", "elements 0 and 2", "the pairing"});
  refused([](Heads& heads) { heads[0].modulus[1] = 1000.0F; },
          {"have the mean modulus 1000 of pair 1", "elements 1 and 3"});
}

TEST(QueryStatistics, AllowHeadsWithoutSpread) {
  // One query: the covariance is 0, and a modulus that of the mean.
  const Heads one{{.count = 1,
                   .mean = {3.0F, 0.0F, 4.0F, 0.0F},
                   .modulus = {5.0F, 0.0F},
                   .covariance = std::vector<float>(10, 0.0F)}};
  EXPECT_EQ(QueryStatistics(1, 1, 4, {}, one).head(0, 0).modulus[0], 5.0F);
}

}  // namespace
}  // namespace compresskv
