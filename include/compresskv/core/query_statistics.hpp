#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "compresskv/core/error.hpp"
#include "compresskv/core/float_bits.hpp"
#include "compresskv/core/float_mode.hpp"
#include "compresskv/core/rotary.hpp"
#include "compresskv/core/sizes.hpp"
#include "compresskv/core/strict_float_begin.hpp"

namespace compresskv {

/// How the queries of each head of a model are spread, measured once per model: before rotary embedding, as
/// `calibrate::QueryStatisticsAccumulator` takes them. What methods score by that must not look at a window:
/// expected attention, Q-Filter, TriAttention.
///
/// Immutable: copies are cheap and share it.
class QueryStatistics {
 public:
  /// One query head.
  struct Head {
    std::uint64_t count = 0;          ///< queries that were seen
    std::vector<float> mean = {};     ///< [head_dim]
    std::vector<float> modulus = {};  ///< [pair], mean length of the two elements that rotate together
    std::vector<float> covariance =
        {};  ///< lower triangle row after row: (i, j <= i) at `i * (i + 1) / 2 + j`
    friend bool operator==(const Head&, const Head&) = default;
  };

  /// Elements of a lower triangle of so many rows.
  static constexpr std::size_t triangle(std::size_t rows) { return rows * (rows + 1) / 2; }

  /// `heads[layer * query_heads + head]`; `rotary` is the model's, its factors are copied.
  ///
  /// Throws ArgumentError when there is no layer, head or element, `rotary` does not fit, lists have other
  /// lengths, a head saw no query, a number is not finite, a variance is negative, a covariance is beyond
  /// what its two variances allow, or a modulus beyond what mean and variances of its pair allow: the pairing
  /// is then another than the queries were taken by.
  QueryStatistics(std::size_t layers, std::size_t query_heads, std::size_t head_dim, const Rotary& rotary,
                  std::vector<Head> heads) {
    detail::require(layers > 0 && query_heads > 0 && head_dim > 0,
                    "query statistics need at least one layer, head and element, got ", layers, " layers of ",
                    query_heads, " heads of ", head_dim, " elements");
    detail::require(head_dim <= most_elements && detail::fits_in_memory(sizeof(Head), {layers, query_heads}),
                    "query statistics of ", layers, " layers of ", query_heads, " heads of ", head_dim,
                    " elements are of no model: give its sizes");
    rotary.validate(head_dim);
    detail::require(heads.size() == layers * query_heads, "query statistics have ", heads.size(), " heads, ",
                    layers, " layers of ", query_heads, " need ", layers * query_heads);
    for (std::size_t i = 0; i < heads.size(); ++i) {
      check_head(heads[i], {.layer = i / query_heads, .head = i % query_heads}, head_dim, rotary);
    }
    auto held = std::make_shared<Held>();
    held->layers = layers;
    held->query_heads = query_heads;
    held->head_dim = head_dim;
    held->factors.assign(rotary.frequency_factors.begin(), rotary.frequency_factors.end());
    held->rotary = rotary;
    held->rotary.frequency_factors = std::as_const(held->factors);
    held->heads = std::move(heads);
    held_ = std::move(held);
  }

  std::size_t layers() const { return held_->layers; }
  std::size_t query_heads() const { return held_->query_heads; }
  std::size_t head_dim() const { return held_->head_dim; }
  std::size_t pairs() const { return held_->rotary.pairs(held_->head_dim); }

  /// The model's rotary embedding; valid as long as a copy of these statistics lives.
  const Rotary& rotary() const { return held_->rotary; }

  const Head& head(std::size_t layer, std::size_t query_head) const {
    return held_->heads[layer * held_->query_heads + query_head];
  }

  /// The same of some of the layers, which become 0, 1, ...: those of a plan for some of a model's layers.
  QueryStatistics of_layers(std::span<const std::size_t> layers) const {
    std::vector<Head> picked;
    for (const std::size_t layer : layers) {
      detail::require(layer < held_->layers, "query statistics have layers 0 to ", held_->layers - 1,
                      ", layer ", layer, " was asked for");
      for (std::size_t h = 0; h < held_->query_heads; ++h) {
        picked.push_back(head(layer, h));
      }
    }
    return {layers.size(), held_->query_heads, held_->head_dim, held_->rotary, std::move(picked)};
  }

  /// Throws ArgumentError when they are not those of a model of these sizes.
  void validate(std::size_t layers, std::size_t query_heads, std::size_t head_dim) const {
    detail::require(
        held_->layers == layers && held_->query_heads == query_heads && held_->head_dim == head_dim,
        "query statistics are of ", held_->layers, " layers of ", held_->query_heads, " heads of ",
        held_->head_dim, " elements, the model has ", layers, " of ", query_heads, " of ", head_dim,
        ": use the statistics calibrated for this model");
  }

  friend bool operator==(const QueryStatistics& a, const QueryStatistics& b) {
    const Held& x = *a.held_;
    const Held& y = *b.held_;
    return x.layers == y.layers && x.query_heads == y.query_heads && x.head_dim == y.head_dim &&
           x.rotary.base == y.rotary.base && x.rotary.rotated(x.head_dim) == y.rotary.rotated(y.head_dim) &&
           x.rotary.pairing == y.rotary.pairing && x.rotary.position_scale == y.rotary.position_scale &&
           x.factors == y.factors && x.heads == y.heads;
  }

 private:
  static constexpr std::size_t most_elements = std::size_t{1} << 20U;  // a triangle of them can be counted

  struct Held {
    std::size_t layers = 0;
    std::size_t query_heads = 0;
    std::size_t head_dim = 0;
    std::vector<float> factors;
    Rotary rotary;  // refers to the factors
    std::vector<Head> heads;
  };

  struct Place {
    std::size_t layer;
    std::size_t head;
  };

  static void check_numbers(const std::vector<float>& numbers, std::size_t expected, const char* name,
                            const Place& at) {
    detail::require(numbers.size() == expected, "query statistics of layer ", at.layer, " head ", at.head,
                    " have ", numbers.size(), " numbers of the ", name, ", must have ", expected);
    for (std::size_t i = 0; i < numbers.size(); ++i) {
      detail::require(detail::is_finite(numbers[i]), "query statistics of layer ", at.layer, " head ",
                      at.head, " have ", numbers[i], " at place ", i, " of the ", name,
                      ": every number must be finite");
    }
  }

  /// What rounding to float32 may do to numbers that fit each other.
  static constexpr double slack = 1e-3;

  static void check_head(const Head& head, const Place& at, std::size_t head_dim, const Rotary& rotary) {
    const detail::PlainFloats plain;
    detail::require(head.count > 0, "query statistics of layer ", at.layer, " head ", at.head,
                    " are of no query: feed every head");
    const std::size_t pairs = rotary.pairs(head_dim);
    check_numbers(head.mean, head_dim, "mean", at);
    check_numbers(head.modulus, pairs, "moduli", at);
    check_numbers(head.covariance, triangle(head_dim), "covariance", at);
    const auto variance = [&](std::size_t e) {
      return static_cast<double>(head.covariance[triangle(e) + e]);
    };
    for (std::size_t i = 0; i < head_dim; ++i) {
      detail::require(variance(i) >= 0.0, "query statistics of layer ", at.layer, " head ", at.head,
                      " have the variance ", variance(i), " of element ", i, ": it cannot be negative");
      for (std::size_t j = 0; j < i; ++j) {
        const auto value = static_cast<double>(head.covariance[triangle(i) + j]);
        detail::require(value * value <= variance(i) * variance(j) * (1.0 + slack) + tiny,
                        "query statistics of layer ", at.layer, " head ", at.head, " have the covariance ",
                        value, " of elements ", i, " and ", j, ", whose variances are ", variance(i), " and ",
                        variance(j), ": it cannot be greater than the root of their product");
      }
    }
    // | E q | <= E | q | <= sqrt( E | q |^2 )
    for (std::size_t j = 0; j < pairs; ++j) {
      const std::size_t x = rotary.first(j);
      const std::size_t y = rotary.second(j, head_dim);
      const double of_mean = square(head.mean[x]) + square(head.mean[y]);
      const double of_square = of_mean + variance(x) + variance(y);
      const double modulus = static_cast<double>(head.modulus[j]);
      detail::require(modulus >= 0.0 && modulus * modulus >= of_mean * (1.0 - slack) - tiny &&
                          modulus * modulus <= of_square * (1.0 + slack) + tiny,
                      "query statistics of layer ", at.layer, " head ", at.head, " have the mean modulus ",
                      modulus, " of pair ", j, ", mean and variances of its elements ", x, " and ", y,
                      " allow ", std::sqrt(of_mean), " to ", std::sqrt(of_square),
                      ": give the pairing that the queries were taken by");
    }
  }

  static constexpr double tiny = 1e-30;
  static double square(float x) { return static_cast<double>(x) * static_cast<double>(x); }

  std::shared_ptr<const Held> held_;
};

}  // namespace compresskv

#include "compresskv/core/strict_float_end.hpp"
