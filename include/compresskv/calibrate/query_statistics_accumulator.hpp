#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "compresskv/core/error.hpp"
#include "compresskv/core/float_bits.hpp"
#include "compresskv/core/float_mode.hpp"
#include "compresskv/core/query_statistics.hpp"
#include "compresskv/core/rotary.hpp"
#include "compresskv/core/sizes.hpp"
#include "compresskv/core/strict_float_begin.hpp"
#include "compresskv/kernel/decode_row.hpp"
#include "compresskv/kernel/turns.hpp"
#include "compresskv/view/observation.hpp"
#include "compresskv/view/run.hpp"

namespace compresskv::calibrate {

/// Measures how the queries of each head are spread, before rotary embedding: `QueryStatistics`.
///
///     mean = E q      covariance = E (q - mean)(q - mean)^T      modulus[j] = E | pair j of q |
///
/// over all queries that it is fed. An engine feeds it from prompts of the kind that the model will read:
/// queries before their rotation (`add_plain`), or after it with their positions (`add_rotated`,
/// `add_queries`), which are turned back. The first few tokens of a text attend otherwise than all others:
/// leave them out, as expected attention does with 4.
///
/// A factor on rotated queries (YaRN's) stays in what is measured, as it stays in the cached keys.
///
/// By Welford's recurrence in float64, so that a mean far from 0 costs no digits. Accumulators of several
/// processes `merge`; the same parts merged in the same order give the same bits. Not safe to share between
/// threads without a lock. Cost: head_dim^2 / 2 multiply-adds a query; memory: as many float64 a head.
class QueryStatisticsAccumulator {
 public:
  /// Throws ArgumentError when a size is 0 or beyond memory, or `rotary` does not fit.
  QueryStatisticsAccumulator(std::size_t layers, std::size_t query_heads, std::size_t head_dim,
                             const Rotary& rotary)
      : layers_(layers),
        query_heads_(query_heads),
        head_dim_(head_dim),
        factors_(rotary.frequency_factors.begin(), rotary.frequency_factors.end()),
        rotary_(rotary) {
    using compresskv::detail::require;
    require(layers > 0 && query_heads > 0 && head_dim > 0,
            "query statistics accumulator needs at least one layer, head and element, got ", layers,
            " layers of ", query_heads, " heads of ", head_dim, " elements");
    require(compresskv::detail::fits_in_memory(sizeof(double), {layers, query_heads, head_dim, head_dim}),
            "query statistics of ", layers, " layers of ", query_heads, " heads of ", head_dim,
            " elements do not fit in memory");
    rotary.validate(head_dim);
    rotary_.frequency_factors = {};  // those of the caller may go: see rotary()
    heads_.resize(layers * query_heads);
    for (Sums& sums : heads_) {
      sums.mean.assign(head_dim, 0.0);
      sums.modulus.assign(rotary_.pairs(head_dim), 0.0);
      sums.products.assign(QueryStatistics::triangle(head_dim), 0.0);
    }
    query_.resize(head_dim);
    difference_.resize(head_dim);
  }

  /// Takes a query as it is before rotary embedding. Throws ArgumentError, and takes nothing, when layer or
  /// head does not exist, the query has another length, or an element is not finite.
  void add_plain(std::size_t layer, std::size_t head, std::span<const float> query) {
    take(layer, head, query);
    add(heads_[layer * query_heads_ + head]);
  }

  /// Takes a query as it is after rotary embedding at `position`. Throws as `add_plain`.
  void add_rotated(std::size_t layer, std::size_t head, std::span<const float> query, std::size_t position) {
    take(layer, head, query);
    turn_back(position);
    add(heads_[layer * query_heads_ + head]);
  }

  /// Takes the queries of all heads of a layer, after rotary embedding: query `i` of `queries` has position
  /// `first_position + i`, and those before `skipped` are left out. Throws as `add_plain`; the queries before
  /// the one that is not finite are then taken.
  template <QueryObservation O>
  void add_queries(std::size_t layer, const O& queries, std::size_t first_position, std::size_t skipped = 0) {
    compresskv::detail::require(queries.query_heads() == query_heads_ && queries.head_dim() == head_dim_,
                                "layer ", layer, " shows queries of ", queries.query_heads(), " heads of ",
                                queries.head_dim(), " elements, the statistics are of ", query_heads_,
                                " heads of ", head_dim_, ": give those of the model");
    std::vector<float> query(head_dim_);
    for (std::size_t i = skipped; i < queries.queries(); ++i) {
      for (std::size_t head = 0; head < query_heads_; ++head) {
        with_plain_element(queries.query_run(head),
                           [&](const auto& run) { kernel::decode_row(run, i, head_dim_, query.data()); });
        add_rotated(layer, head, query, first_position + i);
      }
    }
  }

  /// Takes all that another accumulator was fed. Throws ArgumentError, and takes nothing, when it is of
  /// another model shape or rotary embedding.
  void merge(const QueryStatisticsAccumulator& other) {
    compresskv::detail::require(
        other.layers_ == layers_ && other.query_heads_ == query_heads_ && other.head_dim_ == head_dim_,
        "cannot merge query statistics of ", other.layers_, " layers of ", other.query_heads_, " heads of ",
        other.head_dim_, " elements into those of ", layers_, " layers of ", query_heads_, " heads of ",
        head_dim_, ": all must be of one model");
    compresskv::detail::require(
        other.rotary_.base == rotary_.base && other.rotary_.pairing == rotary_.pairing &&
            other.rotary_.rotated(head_dim_) == rotary_.rotated(head_dim_) &&
            other.rotary_.position_scale == rotary_.position_scale && other.factors_ == factors_,
        "cannot merge query statistics of another rotary embedding: all must be of one model");
    const compresskv::detail::PlainFloats plain;
    for (std::size_t i = 0; i < heads_.size(); ++i) {
      merge(heads_[i], other.heads_[i]);
    }
  }

  /// Queries that a head was fed so far.
  std::uint64_t count(std::size_t layer, std::size_t head) const {
    check_place(layer, head);
    return heads_[layer * query_heads_ + head].count;
  }

  /// What was fed so far. The covariance is divided by the number of queries. Throws ArgumentError when a
  /// head saw none, or a number is beyond float32.
  QueryStatistics statistics() const {
    const compresskv::detail::PlainFloats plain;
    std::vector<QueryStatistics::Head> heads;
    heads.reserve(heads_.size());
    for (const Sums& sums : heads_) {
      QueryStatistics::Head head{
          .count = sums.count,
          .mean = rounded(sums.mean, 1.0),
          .modulus = rounded(sums.modulus, 1.0),
          .covariance =
              rounded(sums.products, sums.count == 0 ? 1.0 : 1.0 / static_cast<double>(sums.count))};
      heads.push_back(std::move(head));
    }
    return {layers_, query_heads_, head_dim_, rotary(), std::move(heads)};
  }

 private:
  struct Sums {
    std::uint64_t count = 0;
    std::vector<double> mean;
    std::vector<double> modulus;   // mean of them
    std::vector<double> products;  // of the differences from the mean, lower triangle
  };

  Rotary rotary() const {
    Rotary own = rotary_;
    own.frequency_factors = factors_;
    return own;
  }

  static std::vector<float> rounded(const std::vector<double>& numbers, double factor) {
    std::vector<float> out;
    out.reserve(numbers.size());
    for (const double number : numbers) {
      out.push_back(static_cast<float>(number * factor));
    }
    return out;
  }

  void check_place(std::size_t layer, std::size_t head) const {
    compresskv::detail::require(layer < layers_ && head < query_heads_, "layer ", layer, " head ", head,
                                " does not exist, the model has layers 0 to ", layers_ - 1, " of heads 0 to ",
                                query_heads_ - 1);
  }

  /// Checks a query, into `query_`.
  void take(std::size_t layer, std::size_t head, std::span<const float> query) {
    check_place(layer, head);
    compresskv::detail::require(query.size() == head_dim_, "query of layer ", layer, " head ", head, " has ",
                                query.size(), " elements, the model's head_dim is ", head_dim_);
    for (std::size_t e = 0; e < head_dim_; ++e) {
      compresskv::detail::require(compresskv::detail::is_finite(query[e]), "query of layer ", layer, " head ",
                                  head, " has ", query[e], " at element ", e, ": every one must be finite");
      query_[e] = static_cast<double>(query[e]);
    }
  }

  void turn_back(std::size_t position) {
    const compresskv::detail::PlainFloats plain;
    if (turns_.empty() || turns_at_ != position) {
      const Rotary of_model = rotary();
      turns_.clear();
      for (std::size_t j = 0; j < rotary_.pairs(head_dim_); ++j) {
        turns_.push_back(
            kernel::turn_by(static_cast<double>(position) * of_model.step(j, head_dim_)).transposed());
      }
      turns_at_ = position;
    }
    kernel::turn_pairs(rotary_, std::span(query_), [&](std::size_t j) { return turns_[j]; });
  }

  /// One more query: that of `query_`.
  void add(Sums& sums) {
    const compresskv::detail::PlainFloats plain;
    ++sums.count;
    const auto n = static_cast<double>(sums.count);
    for (std::size_t j = 0; j < sums.modulus.size(); ++j) {
      const double x = query_[rotary_.first(j)];
      const double y = query_[rotary_.second(j, head_dim_)];
      sums.modulus[j] += (std::sqrt(x * x + y * y) - sums.modulus[j]) / n;
    }
    for (std::size_t e = 0; e < head_dim_; ++e) {
      difference_[e] = query_[e] - sums.mean[e];
      sums.mean[e] += difference_[e] / n;
    }
    add_products(sums, (n - 1.0) / n);
  }

  /// `products += factor * difference difference^T`.
  void add_products(Sums& sums, double factor) {
    double* row = sums.products.data();
    for (std::size_t i = 0; i < head_dim_; row += ++i) {
      const double scaled = factor * difference_[i];
      for (std::size_t j = 0; j <= i; ++j) {
        row[j] += scaled * difference_[j];
      }
    }
  }

  /// Chan's way to join two sets.
  void merge(Sums& sums, const Sums& other) {
    if (other.count == 0) {
      return;
    }
    const auto here = static_cast<double>(sums.count);
    const auto there = static_cast<double>(other.count);
    const double all = here + there;
    for (std::size_t e = 0; e < head_dim_; ++e) {
      difference_[e] = other.mean[e] - sums.mean[e];
      sums.mean[e] += difference_[e] * (there / all);
    }
    for (std::size_t j = 0; j < sums.modulus.size(); ++j) {
      sums.modulus[j] += (other.modulus[j] - sums.modulus[j]) * (there / all);
    }
    for (std::size_t i = 0; i < sums.products.size(); ++i) {
      sums.products[i] += other.products[i];
    }
    add_products(sums, here * (there / all));
    sums.count += other.count;
  }

  std::size_t layers_;
  std::size_t query_heads_;
  std::size_t head_dim_;
  std::vector<float> factors_;
  Rotary rotary_;            // without the factors
  std::vector<Sums> heads_;  // [layer * query_heads + head]
  std::vector<double> query_;
  std::vector<double> difference_;
  std::vector<kernel::Turn> turns_;  // [pair], back from `turns_at_`
  std::size_t turns_at_ = 0;
};

/// How far two queries, or two keys, that were equal before their rotation contradict a rotary embedding: the
/// distance of what they are once turned back from their positions, as a share of the longer one. About the
/// rounding of the cache where it is the model's; near 1 where base, pairing or scaling is another.
///
/// Keys of the same token are equal before rotation in the first layer, where a token knows of no other one.
/// Take some that are many positions apart. Throws ArgumentError where `rotary` does not fit, lengths differ,
/// or both are 0.
inline double rotary_contradiction(const Rotary& rotary, std::span<const float> a, std::size_t position_a,
                                   std::span<const float> b, std::size_t position_b) {
  using compresskv::detail::require;
  require(a.size() == b.size(), "rows to hold a rotary embedding against have ", a.size(), " and ", b.size(),
          " elements: give two of one head");
  rotary.validate(a.size());
  const compresskv::detail::PlainFloats plain;
  const auto back = [&](std::span<const float> row, std::size_t position) {
    std::vector<double> out(row.begin(), row.end());
    kernel::turn_pairs(rotary, std::span(out), [&](std::size_t j) {
      return kernel::turn_by(static_cast<double>(position) * rotary.step(j, row.size())).transposed();
    });
    return out;
  };
  const std::vector<double> x = back(a, position_a);
  const std::vector<double> y = back(b, position_b);
  double apart = 0.0;
  double length_x = 0.0;
  double length_y = 0.0;
  for (std::size_t e = 0; e < x.size(); ++e) {
    apart += (x[e] - y[e]) * (x[e] - y[e]);
    length_x += x[e] * x[e];
    length_y += y[e] * y[e];
  }
  const double longer = length_x > length_y ? length_x : length_y;
  require(compresskv::detail::is_finite(longer) && longer > 0.0,
          "rows to hold a rotary embedding against are 0 or not finite: give keys of a model");
  return std::sqrt(apart / longer);
}

}  // namespace compresskv::calibrate

#include "compresskv/core/strict_float_end.hpp"
