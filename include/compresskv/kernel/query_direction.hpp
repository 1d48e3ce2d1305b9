#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <span>
#include <vector>

#include "compresskv/core/query_statistics.hpp"
#include "compresskv/core/rotary.hpp"
#include "compresskv/core/strict_float_begin.hpp"
#include "compresskv/kernel/turns.hpp"

namespace compresskv::kernel {

/// Of symmetric `matrix`, `[size][size]` with no eigenvalue below 0: the eigenvector of the largest one, of
/// length 1, to about 1e-9; where the next one is nearly as large, a direction between the two. By the power
/// method from a fixed start. All zeros where the matrix is.
inline std::vector<double> main_direction(std::span<const double> matrix, std::size_t size) {
  std::vector<double> direction(size);
  for (std::size_t e = 0; e < size; ++e) {
    // The golden ratio's multiples, which no structure of a model knows of.
    const double multiple = static_cast<double>(e + 1) * 0.6180339887498949;
    direction[e] = multiple - std::floor(multiple) - 0.5;
  }
  std::vector<double> next(size);
  constexpr std::size_t most_rounds = 1000;
  for (std::size_t round = 0; round < most_rounds; ++round) {
    std::fill(next.begin(), next.end(), 0.0);
    for (std::size_t j = 0; j < size; ++j) {
      for (std::size_t i = 0; i < size; ++i) {
        next[i] += matrix[j * size + i] * direction[j];
      }
    }
    double length = 0.0;
    for (const double element : next) {
      length += element * element;
    }
    if (!(length > 0.0)) {
      return std::vector<double>(size, 0.0);
    }
    length = std::sqrt(length);
    double moved = 0.0;
    for (std::size_t e = 0; e < size; ++e) {
      next[e] /= length;
      moved += (next[e] - direction[e]) * (next[e] - direction[e]);
    }
    direction.swap(next);
    if (moved < 1e-22) {
      break;
    }
  }
  return direction;
}

/// Turns what is known of queries before rotation into what holds for rotated ones, on the mean over
/// positions 0 .. `positions` - 1, queries taken to be alike at all of them.
class MeanRotation {
 public:
  MeanRotation(const Rotary& rotary, std::size_t head_dim, std::size_t positions)
      : head_dim_(head_dim), pairs_(rotary.pairs(head_dim)) {
    // Each element with the pair it turns in; those that do not rotate are pairs that stand still, each with
    // itself alone.
    for (std::size_t j = 0; j < pairs_; ++j) {
      planes_.push_back(
          {.x = rotary.first(j), .y = rotary.second(j, head_dim), .step = rotary.step(j, head_dim)});
    }
    for (std::size_t e = 2 * pairs_; e < head_dim; ++e) {
      planes_.push_back({.x = e, .y = e, .step = 0.0});
    }
    for (const Plane& a : planes_) {
      alone_.push_back(mean_turn(a.step, 0, positions));
      for (const Plane& b : planes_) {
        differences_.push_back(mean_turn(a.step - b.step, 0, positions));
        sums_.push_back(mean_turn(a.step + b.step, 0, positions));
      }
    }
  }

  /// E of the rotated queries.
  std::vector<double> mean(const QueryStatistics::Head& head) const {
    std::vector<double> out(head.mean.begin(), head.mean.end());
    for (std::size_t j = 0; j < pairs_; ++j) {
      const double x = out[planes_[j].x];
      const double y = out[planes_[j].y];
      out[planes_[j].x] = x * alone_[j].cosine - y * alone_[j].sine;
      out[planes_[j].y] = x * alone_[j].sine + y * alone_[j].cosine;
    }
    return out;
  }

  /// E q q^T of the rotated queries, `[head_dim][head_dim]`.
  std::vector<double> second_moment(const QueryStatistics::Head& head) const {
    std::vector<double> out(head_dim_ * head_dim_);
    for (std::size_t i = 0; i < head_dim_; ++i) {
      for (std::size_t j = 0; j <= i; ++j) {
        const double value = static_cast<double>(head.covariance[QueryStatistics::triangle(i) + j]) +
                             static_cast<double>(head.mean[i]) * static_cast<double>(head.mean[j]);
        out[i * head_dim_ + j] = value;
        out[j * head_dim_ + i] = value;
      }
    }
    for (std::size_t a = 0; a < planes_.size(); ++a) {
      for (std::size_t b = 0; b < planes_.size(); ++b) {
        turn_block(a, b, out);
      }
    }
    return out;
  }

 private:
  struct Plane {
    std::size_t x;
    std::size_t y;
    double step;
  };

  /// With p = x + i y of plane a and q of plane b: E p conj(q) turns by the difference of their angles, E p q
  /// by the sum.
  void turn_block(std::size_t a, std::size_t b, std::vector<double>& moment) const {
    const Plane& p = planes_[a];
    const Plane& q = planes_[b];
    const auto at = [&](std::size_t i, std::size_t j) -> double& { return moment[i * head_dim_ + j]; };
    if (a >= pairs_ && b >= pairs_) {
      return;
    }
    if (a >= pairs_ || b >= pairs_) {
      // Of one plane that turns and one element that does not.
      const Plane& turned = a < pairs_ ? p : q;
      const std::size_t still = a < pairs_ ? q.x : p.x;
      const Turn turn = alone_[a < pairs_ ? a : b];
      double& x = a < pairs_ ? at(turned.x, still) : at(still, turned.x);
      double& y = a < pairs_ ? at(turned.y, still) : at(still, turned.y);
      const double old_x = x;
      x = old_x * turn.cosine - y * turn.sine;
      y = old_x * turn.sine + y * turn.cosine;
      return;
    }
    double& xx = at(p.x, q.x);
    double& xy = at(p.x, q.y);
    double& yx = at(p.y, q.x);
    double& yy = at(p.y, q.y);
    const Turn difference = differences_[a * planes_.size() + b];
    const Turn sum = sums_[a * planes_.size() + b];
    const double with_real = xx + yy;  // E p conj(q)
    const double with_imaginary = yx - xy;
    const double plain_real = xx - yy;  // E p q
    const double plain_imaginary = yx + xy;
    const double with_real_turned = with_real * difference.cosine - with_imaginary * difference.sine;
    const double with_imaginary_turned = with_real * difference.sine + with_imaginary * difference.cosine;
    const double plain_real_turned = plain_real * sum.cosine - plain_imaginary * sum.sine;
    const double plain_imaginary_turned = plain_real * sum.sine + plain_imaginary * sum.cosine;
    xx = 0.5 * (with_real_turned + plain_real_turned);
    yy = 0.5 * (with_real_turned - plain_real_turned);
    yx = 0.5 * (plain_imaginary_turned + with_imaginary_turned);
    xy = 0.5 * (plain_imaginary_turned - with_imaginary_turned);
  }

  std::size_t head_dim_;
  std::size_t pairs_;
  std::vector<Plane> planes_;
  std::vector<Turn> alone_;        // [plane]
  std::vector<Turn> differences_;  // [plane][plane]
  std::vector<Turn> sums_;
};

}  // namespace compresskv::kernel

#include "compresskv/core/strict_float_end.hpp"
