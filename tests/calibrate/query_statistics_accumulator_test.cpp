#include "compresskv/calibrate/query_statistics_accumulator.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <compresskv/view/query_window.hpp>
#include <limits>
#include <span>
#include <vector>

#include "reference/errors.hpp"
#include "reference/queries.hpp"

namespace compresskv::calibrate {
namespace {

using reference::expect_error;
using reference::Random;
using QueryRows = std::vector<std::vector<double>>;

std::vector<float> as_floats(const std::vector<double>& row) { return {row.begin(), row.end()}; }

/// Rows as the accumulator gets them: rounded.
QueryRows rounded_rows(const QueryRows& rows) {
  QueryRows out;
  for (const auto& row : rows) {
    const std::vector<float> floats = as_floats(row);
    out.emplace_back(floats.begin(), floats.end());
  }
  return out;
}

void expect_spread(const QueryStatistics::Head& head, const reference::SpreadOfRows& expected,
                   std::size_t count, double slack, double rounding = 0.0) {
  EXPECT_EQ(head.count, count);
  const auto deviation = [&](std::size_t e) { return std::sqrt(expected.covariance[e][e]); };
  for (std::size_t i = 0; i < expected.mean.size(); ++i) {
    ASSERT_NEAR(static_cast<double>(head.mean[i]), expected.mean[i],
                slack * (1.0 + std::abs(expected.mean[i])) + rounding);
    for (std::size_t j = 0; j <= i; ++j) {
      ASSERT_NEAR(
          static_cast<double>(head.covariance[QueryStatistics::triangle(i) + j]), expected.covariance[i][j],
          slack * deviation(i) * deviation(j) + rounding * (deviation(i) + deviation(j) + rounding) + 1e-12)
          << i << ", " << j;
    }
  }
  for (std::size_t j = 0; j < expected.modulus.size(); ++j) {
    ASSERT_NEAR(static_cast<double>(head.modulus[j]), expected.modulus[j],
                slack * (1.0 + expected.modulus[j]) + rounding);
  }
}

TEST(QueryStatisticsAccumulator, IsTheReferenceBeforeAndAfterRotation) {
  Random random(31);
  for (const std::size_t head_dim : {4U, 8U, 12U, 64U}) {
    for (const Rotary& rotary : reference::rotary_kinds(head_dim)) {
      for (const std::size_t count : {1U, 2U, 3U, 50U}) {
        SCOPED_TRACE(testing::Message()
                     << "d " << head_dim << " base " << rotary.base << " queries " << count);
        const QueryRows rows = rounded_rows(reference::spread_queries(random, count, head_dim));
        QueryStatisticsAccumulator plain(2, 3, head_dim, rotary);
        QueryStatisticsAccumulator rotated(2, 3, head_dim, rotary);
        for (std::size_t i = 0; i < rows.size(); ++i) {
          const std::size_t position = i * i + 3;
          const std::vector<float> turned =
              as_floats(reference::rotated(rows[i], static_cast<double>(position), rotary));
          for (std::size_t head = 0; head < 6; ++head) {
            // Every head its own size, by which nothing is rounded: they must not mix.
            std::vector<float> own = as_floats(rows[i]);
            std::vector<float> own_turned = turned;
            for (std::size_t e = 0; e < head_dim; ++e) {
              own[e] *= static_cast<float>(std::size_t{1} << head);
              own_turned[e] *= static_cast<float>(std::size_t{1} << head);
            }
            plain.add_plain(head / 3, head % 3, own);
            rotated.add_rotated(head / 3, head % 3, own_turned, position);
          }
        }
        const QueryStatistics of_plain = plain.statistics();
        const QueryStatistics of_rotated = rotated.statistics();
        EXPECT_EQ(of_plain.rotary().base, rotary.base);
        for (std::size_t head = 0; head < 6; ++head) {
          QueryRows own = rows;
          for (auto& row : own) {
            for (double& x : row) {
              x *= static_cast<double>(std::size_t{1} << head);
            }
          }
          const reference::SpreadOfRows expected(own, rotary);
          expect_spread(of_plain.head(head / 3, head % 3), expected, count, 1e-6);
          // Rotated elements were rounded, by 2^-24 of at most their pair's length.
          double longest = 0.0;
          for (const auto& row : own) {
            for (const double x : row) {
              longest = std::max(longest, 1.5 * std::abs(x));
            }
          }
          expect_spread(of_rotated.head(head / 3, head % 3), expected, count, 1e-6, 0x1p-23 * longest);
        }
      }
    }
  }
}

TEST(QueryStatisticsAccumulator, AMeanFarFromZeroCostsNoDigits) {
  // Sums of squares less the square of the sum would leave nothing of a variance of 1 here.
  Random random(7);
  QueryRows rows = reference::spread_queries(random, 400, 4);
  for (auto& row : rows) {
    for (double& x : row) {
      x += 1e5;
    }
  }
  rows = rounded_rows(rows);
  QueryStatisticsAccumulator accumulator(1, 1, 4, {});
  for (const auto& row : rows) {
    accumulator.add_plain(0, 0, as_floats(row));
  }
  expect_spread(accumulator.statistics().head(0, 0), reference::SpreadOfRows(rows, {}), 400, 1e-6);
}

TEST(QueryStatisticsAccumulator, QueriesOfALayerAreThoseOfItsHeads) {
  Random random(11);
  constexpr std::size_t count = 9;
  const Rotary rotary{.pairing = RotaryPairing::interleaved};
  std::vector<half> queries(2 * count * 8);
  for (half& x : queries) {
    x = half(random.gaussian());
  }
  QueryStatisticsAccumulator of_layer(3, 2, 8, rotary);
  QueryStatisticsAccumulator of_heads(3, 2, 8, rotary);
  for (std::size_t layer = 0; layer < 3; ++layer) {
    of_layer.add_queries(
        layer, QueryWindow<half>(queries.data(), {.query_heads = 2, .queries = count, .head_dim = 8}), 100,
        4);
    for (std::size_t i = 4; i < count; ++i) {
      for (std::size_t head = 0; head < 2; ++head) {
        std::vector<float> row;
        for (std::size_t e = 0; e < 8; ++e) {
          row.push_back(to_float(queries[(head * count + i) * 8 + e]));
        }
        of_heads.add_rotated(layer, head, row, 100 + i);
      }
    }
  }
  EXPECT_EQ(of_layer.count(2, 1), count - 4);
  EXPECT_EQ(of_layer.statistics(), of_heads.statistics());
  const std::vector<half> other(3 * 8);
  expect_error<ArgumentError>(
      [&] {
        of_layer.add_queries(
            1, QueryWindow<half>(other.data(), {.query_heads = 3, .queries = 1, .head_dim = 8}), 0);
      },
      {"layer 1 shows queries of 3 heads of 8 elements", "of 2 heads of 8"});
}

TEST(QueryStatisticsAccumulator, MergedPartsAreTheWhole) {
  Random random(13);
  const QueryRows rows = rounded_rows(reference::spread_queries(random, 60, 8));
  const auto part = [&](std::size_t first, std::size_t last) {
    QueryStatisticsAccumulator out(1, 1, 8, {});
    for (std::size_t i = first; i < last; ++i) {
      out.add_plain(0, 0, as_floats(rows[i]));
    }
    return out;
  };
  QueryStatisticsAccumulator merged(1, 1, 8, {});
  for (const auto& [first, last] :
       std::vector<std::pair<std::size_t, std::size_t>>{{0, 1}, {1, 1}, {1, 40}, {40, 60}}) {
    merged.merge(part(first, last));
  }
  expect_spread(merged.statistics().head(0, 0), reference::SpreadOfRows(rows, {}), 60, 1e-6);
  QueryStatisticsAccumulator again(1, 1, 8, {});
  again.merge(part(0, 1));
  again.merge(part(1, 40));
  again.merge(part(40, 60));
  EXPECT_EQ(again.statistics(), merged.statistics()) << "the same parts in the same order: the same bits";
}

TEST(QueryStatisticsAccumulator, RefusesWhatDoesNotFit) {
  QueryStatisticsAccumulator accumulator(2, 3, 4, {});
  const std::vector<float> query(4, 1.0F);
  const auto refused = [&](auto&& call, std::initializer_list<std::string_view> parts) {
    expect_error<ArgumentError>(call, parts);
    EXPECT_EQ(accumulator.count(0, 0), 0U);
  };
  refused([&] { accumulator.add_plain(2, 0, query); }, {"layer 2 head 0 does not exist", "layers 0 to 1"});
  refused([&] { accumulator.add_rotated(0, 3, query, 1); },
          {"layer 0 head 3 does not exist", "heads 0 to 2"});
  refused([&] { accumulator.count(0, 3); }, {"does not exist"});
  refused([&] { accumulator.add_plain(0, 0, std::span(query).first(3)); },
          {"has 3 elements", "head_dim is 4"});
  for (const float poison :
       {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()}) {
    const std::vector<float> bad{1.0F, 1.0F, poison, 1.0F};
    refused([&] { accumulator.add_plain(0, 0, bad); }, {"layer 0 head 0 has ", "at element 2"});
    refused([&] { accumulator.add_rotated(0, 0, bad, 7); }, {"at element 2"});
  }
  refused([&] { accumulator.statistics(); }, {"layer 0 head 0 are of no query"});
  refused([] { QueryStatisticsAccumulator(0, 1, 4, {}); }, {"got 0 layers"});
  refused([] { QueryStatisticsAccumulator(1, 1, 5, {}); }, {"Rotary: dims is 5"});
  refused([] { QueryStatisticsAccumulator(1, 1, std::size_t{1} << 40U, {}); }, {"do not fit in memory"});
  refused([&] { accumulator.merge(QueryStatisticsAccumulator(2, 2, 4, {})); },
          {"of 2 layers of 2 heads of 4 elements into those of 2 layers of 3"});
  const std::vector<float> factors{1.0F, 2.0F};
  for (const Rotary& other :
       {Rotary{.base = 5.0}, Rotary{.dims = 2}, Rotary{.pairing = RotaryPairing::interleaved},
        Rotary{.position_scale = 0.5}, Rotary{.frequency_factors = factors}}) {
    refused([&] { accumulator.merge(QueryStatisticsAccumulator(2, 3, 4, other)); },
            {"another rotary embedding"});
  }
}

TEST(RotaryContradiction, TellsTheModelsRotaryFromOthers) {
  Random random(17);
  constexpr std::size_t head_dim = 16;
  for (const Rotary& rotary : reference::rotary_kinds(head_dim)) {
    std::vector<double> key(head_dim);
    for (double& x : key) {
      x = static_cast<double>(random.gaussian());
    }
    const std::vector<float> a = as_floats(reference::rotated(key, 5.0, rotary));
    const std::vector<float> b = as_floats(reference::rotated(key, 90.0, rotary));
    EXPECT_LT(rotary_contradiction(rotary, a, 5, b, 90), 1e-6);
    EXPECT_GT(rotary_contradiction(rotary, a, 5, b, 91), 0.05) << "another position";
    Rotary other = rotary;
    other.base *= 2.0;
    EXPECT_GT(rotary_contradiction(other, a, 5, b, 90), 0.05);
    other = rotary;
    other.pairing =
        rotary.pairing == RotaryPairing::half_split ? RotaryPairing::interleaved : RotaryPairing::half_split;
    EXPECT_GT(rotary_contradiction(other, a, 5, b, 90), 0.05);
    other = rotary;
    other.position_scale *= 0.5;
    EXPECT_GT(rotary_contradiction(other, a, 5, b, 90), 0.05);
  }
  const std::vector<float> four(4, 1.0F);
  const std::vector<float> zeros(4, 0.0F);
  expect_error<ArgumentError>([&] { rotary_contradiction({}, four, 0, std::span(four).first(2), 1); },
                              {"have 4 and 2 elements"});
  expect_error<ArgumentError>([&] { rotary_contradiction({.dims = 3}, four, 0, four, 1); }, {"dims is 3"});
  expect_error<ArgumentError>([&] { rotary_contradiction({}, zeros, 0, zeros, 1); }, {"are 0 or not finite"});
}

}  // namespace
}  // namespace compresskv::calibrate
