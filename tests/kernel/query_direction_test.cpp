#include "compresskv/kernel/query_direction.hpp"

#include <gtest/gtest.h>

#include <Eigen/Eigenvalues>
#include <cmath>
#include <vector>

#include "reference/statistics_methods.hpp"

namespace compresskv::kernel {
namespace {

TEST(MeanRotationOfQueries, IsTheMeanOverAllPositions) {
  for (const std::size_t positions : {1U, 2U, 37U}) {
    for (const Rotary& rotary : reference::rotary_kinds(12)) {
      reference::Random random(positions);
      const QueryStatistics::Head head =
          reference::SpreadOfRows(reference::spread_queries(random, 20, 12), rotary).head(20);
      reference::Matrix moment = reference::covariance_of(head);
      const std::vector<double> mean(head.mean.begin(), head.mean.end());
      for (std::size_t i = 0; i < 12; ++i) {
        for (std::size_t j = 0; j < 12; ++j) {
          moment[i][j] += mean[i] * mean[j];
        }
      }
      reference::Matrix expected(12, std::vector<double>(12, 0.0));
      std::vector<double> expected_mean(12, 0.0);
      for (std::size_t p = 0; p < positions; ++p) {
        const auto turn = reference::rotation_matrix(rotary, 12, static_cast<double>(p));
        const auto turned = reference::conjugated(turn, moment);
        const auto turned_mean = reference::times(turn, mean);
        for (std::size_t i = 0; i < 12; ++i) {
          expected_mean[i] += turned_mean[i] / static_cast<double>(positions);
          for (std::size_t j = 0; j < 12; ++j) {
            expected[i][j] += turned[i][j] / static_cast<double>(positions);
          }
        }
      }
      const MeanRotation rotation(rotary, 12, positions);
      const std::vector<double> found = rotation.second_moment(head);
      const std::vector<double> found_mean = rotation.mean(head);
      for (std::size_t i = 0; i < 12; ++i) {
        ASSERT_NEAR(found_mean[i], expected_mean[i], 1e-10);
        for (std::size_t j = 0; j < 12; ++j) {
          ASSERT_NEAR(found[i * 12 + j], expected[i][j], 1e-10) << i << ", " << j;
        }
      }
    }
  }
}

TEST(MainDirection, IsTheEigenvectorOfTheLargestEigenvalue) {
  reference::Random random(23);
  for (const std::size_t size : {1U, 2U, 3U, 16U, 64U}) {
    for (int round = 0; round < 5; ++round) {
      // One direction stands out, as it does in models.
      Eigen::MatrixXd root = Eigen::MatrixXd::Zero(static_cast<Eigen::Index>(size), 8);
      for (Eigen::Index i = 0; i < root.rows(); ++i) {
        for (Eigen::Index j = 0; j < root.cols(); ++j) {
          root(i, j) = static_cast<double>(random.gaussian()) * (j == 0 ? 4.0 : 1.0);
        }
      }
      const Eigen::MatrixXd matrix = root * root.transpose();
      const Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd> solver(matrix);
      const Eigen::VectorXd expected = solver.eigenvectors().col(matrix.rows() - 1);
      const std::vector<double> flat(matrix.data(), matrix.data() + matrix.size());
      const std::vector<double> found = main_direction(flat, size);
      double along = 0.0;
      double length = 0.0;
      for (std::size_t e = 0; e < size; ++e) {
        along += found[e] * expected[static_cast<Eigen::Index>(e)];
        length += found[e] * found[e];
      }
      EXPECT_NEAR(length, 1.0, 1e-12);
      EXPECT_NEAR(std::abs(along), 1.0, 1e-12) << "size " << size;
    }
  }
}

TEST(MainDirection, OfNothingIsNone) {
  EXPECT_EQ(main_direction(std::vector<double>(9, 0.0), 3), std::vector<double>(3, 0.0));
}

TEST(MainDirection, IsFoundWhereItHasNoPartInTheLargestVariance) {
  // Eigenvalue 8 of the last two elements, though the first has the largest variance.
  const std::vector<double> matrix{5, 0, 0, 0, 4, 4, 0, 4, 4};
  const std::vector<double> found = main_direction(matrix, 3);
  EXPECT_NEAR(found[0], 0.0, 1e-9);
  EXPECT_NEAR(std::abs(found[1]), std::sqrt(0.5), 1e-9);
  EXPECT_NEAR(found[1], found[2], 1e-9);
}

}  // namespace
}  // namespace compresskv::kernel
