#include <gtest/gtest.h>

#include <Eigen/Eigenvalues>
#include <compresskv/score/q_filter.hpp>
#include <cstdint>
#include <limits>
#include <vector>

#include "reference/errors.hpp"
#include "reference/statistics_methods.hpp"

namespace compresskv {
namespace {

using reference::expect_error;
using reference::Layer;
using reference::LayerCase;

/// The main right singular vector of many rotated queries would be this: the eigenvector of their second
/// moment, positions one after the other.
std::vector<double> direction_of(const QueryStatistics::Head& head, const Rotary& rotary,
                                 std::size_t positions) {
  const std::size_t size = head.mean.size();
  const std::vector<double> mean(head.mean.begin(), head.mean.end());
  reference::Matrix moment = reference::covariance_of(head);
  for (std::size_t i = 0; i < size; ++i) {
    for (std::size_t j = 0; j < size; ++j) {
      moment[i][j] += mean[i] * mean[j];
    }
  }
  Eigen::MatrixXd sum =
      Eigen::MatrixXd::Zero(static_cast<Eigen::Index>(size), static_cast<Eigen::Index>(size));
  std::vector<double> mean_sum(size, 0.0);
  for (std::size_t p = 0; p < positions; ++p) {
    const auto turn = reference::rotation_matrix(rotary, size, static_cast<double>(p));
    const auto turned = reference::conjugated(turn, moment);
    const auto turned_mean = reference::times(turn, mean);
    for (std::size_t i = 0; i < size; ++i) {
      mean_sum[i] += turned_mean[i];
      for (std::size_t j = 0; j < size; ++j) {
        sum(static_cast<Eigen::Index>(i), static_cast<Eigen::Index>(j)) += turned[i][j];
      }
    }
  }
  const Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd> solver(sum);
  const Eigen::VectorXd main = solver.eigenvectors().col(sum.rows() - 1);
  std::vector<double> out(main.data(), main.data() + main.size());
  if (reference::dot(out, mean_sum) < 0.0) {
    for (double& x : out) {
      x = -x;
    }
  }
  return out;
}

/// Heads whose queries have a main direction that stands out.
QueryStatistics pointed_statistics(const ModelShape& shape, std::uint64_t seed, const Rotary& rotary) {
  reference::Random random(seed);
  std::vector<QueryStatistics::Head> heads;
  for (std::size_t i = 0; i < shape.layers * shape.query_heads; ++i) {
    heads.push_back(
        reference::SpreadOfRows(reference::spread_queries(random, 12, shape.head_dim, 4.0), rotary).head(12));
  }
  return {shape.layers, shape.query_heads, shape.head_dim, rotary, std::move(heads)};
}

TEST(QFilter, IsTheReferenceOverGeneratedLayers) {
  std::size_t tried = 0;
  for (const LayerCase& c : reference::layer_cases(16, 93)) {
    if (c.head_dim % 4 != 0 || c.head_dim > 20 || c.query_heads() > 12) {
      continue;
    }
    SCOPED_TRACE(c);
    Layer<float> layer(c);
    const auto rotaries = reference::rotary_kinds(c.head_dim);
    const Rotary rotary = rotaries[c.seed % rotaries.size()];
    const QueryStatistics statistics = pointed_statistics(layer.shape, c.seed, rotary);
    const std::size_t positions = 1 + c.seed % 7;
    reference::ScoreRows expected(c.kv_heads);
    for (std::size_t kv_head = 0; kv_head < c.kv_heads; ++kv_head) {
      std::vector<double> filter(c.head_dim, 0.0);
      for (std::size_t i = 0; i < c.group; ++i) {
        const auto direction = direction_of(statistics.head(0, kv_head * c.group + i), rotary, positions);
        for (std::size_t e = 0; e < c.head_dim; ++e) {
          filter[e] += direction[e] / static_cast<double>(c.group);
        }
      }
      for (std::size_t t = 0; t + c.observed() < c.rows; ++t) {
        expected[kv_head].push_back(reference::dot(filter, reference::key_row(layer, kv_head, t)));
      }
    }
    reference::expect_scores(score::QFilter{statistics, {.window = c.window, .positions = positions}}, layer,
                             expected, 0.0, 1e-5);
    ++tried;
  }
  EXPECT_GT(tried, 8U);
}

TEST(QFilter, KeepsTheKeysThatQueriesPointTo) {
  // Nothing turns but the last two elements, and all queries are (3, 0, ...) there: of keys along the first
  // element the longest draws the attention, and one that points away the least.
  const ModelShape shape{.layers = 1, .query_heads = 1, .kv_heads = 1, .head_dim = 4};
  QueryStatistics::Head head{.count = 5, .mean = {0.1F, 0.1F, 3.0F, 0.0F}, .modulus = {0.14142136F}};
  head.covariance.assign(10, 0.0F);
  const QueryStatistics statistics(1, 1, 4, {.dims = 2}, {head});
  Layer<float> layer({.head_dim = 4, .rows = 30, .window = 2, .capacity = 6});
  for (std::size_t t = 0; t < 30; ++t) {
    for (std::size_t e = 0; e < 4; ++e) {
      layer.cache.keys[layer.cache.at(0, t, e)] = e == 2 ? (t == 11 ? 5.0F : t == 12 ? -9.0F : 0.0F) : 0.0F;
    }
  }
  const Plan plan{shape, score::QFilter{statistics, {.window = 2}}, select::GroupedTopK{},
                  budget::Uniform{Budget::tokens_per_layer(6)}};
  Compressor compressor{plan};
  compressor.begin(30);
  const auto row = compressor.score(0, layer.cache.view()).row(0);
  EXPECT_NEAR(static_cast<double>(row[11]), 5.0, 0.02);
  EXPECT_NEAR(static_cast<double>(row[12]), -9.0, 0.04);
  EXPECT_EQ(row[0], 0.0F);
}

TEST(QFilter, NamesTheKeyThatIsNotFiniteAndTakesLongOnes) {
  Layer<float> layer({.head_dim = 8, .rows = 20, .window = 2, .capacity = 4});
  const Plan plan{layer.shape, score::QFilter{reference::query_statistics(layer.shape), {.window = 2}},
                  select::GroupedTopK{}, budget::Uniform{Budget::tokens_per_layer(4)}};
  Compressor compressor{plan};
  compressor.begin(20);
  for (std::size_t e = 0; e < 8; ++e) {
    layer.cache.keys[layer.cache.at(0, 7, e)] = 3e38F;
  }
  EXPECT_TRUE(std::isfinite(compressor.score(0, layer.cache.view()).row(0)[7]));
  for (const float poison :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    layer.cache.keys[layer.cache.at(0, 7, 2)] = poison;
    expect_error<ScoreError>([&] { compressor.compress(0, layer.cache.view()); }, {"row 0 token 7 is "});
  }
}

TEST(QFilter, RefusesWhatItCannotUse) {
  const ModelShape shape{.layers = 1, .query_heads = 2, .kv_heads = 1, .head_dim = 8};
  const QueryStatistics statistics = reference::query_statistics(shape);
  expect_error<ArgumentError>([&] { score::QFilter(statistics, {.window = 0}); }, {"window is 0"});
  expect_error<ArgumentError>([&] { score::QFilter(statistics, {.positions = 0}); }, {"positions is 0"});
  const ModelShape other{.layers = 1, .query_heads = 3, .kv_heads = 1, .head_dim = 8};
  expect_error<ArgumentError>(
      [&] {
        Plan(other, score::QFilter{statistics}, select::GroupedTopK{},
             budget::Uniform{Budget::tokens_per_layer(9)});
      },
      {"query statistics are of 1 layers of 2 heads of 8 elements, the model has 1 of 3 of 8"});
}

}  // namespace
}  // namespace compresskv
