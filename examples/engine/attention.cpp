#include "attention.hpp"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace engine {
namespace {

using Index = Eigen::Index;
using ConstRows = Eigen::Map<const Matrix>;

// Tile sizes: a score tile of a group of 3 heads takes 3 * 64 * 256 floats, which the second-level cache
// holds.
constexpr Index query_tile = 64;
constexpr Index key_tile = 256;

// Keys or values of one KV head as floats: in place where they are floats, else a copy.
class FloatRows {
 public:
  template <typename T>
  FloatRows(const T* rows, Index count, Index head_dim) {
    if constexpr (std::is_same_v<T, float>) {
      data_ = rows;
    } else {
      copy_.resize(static_cast<std::size_t>(count * head_dim));
      std::ranges::transform(rows, rows + count * head_dim, copy_.begin(),
                             [](T x) { return static_cast<float>(x); });
      data_ = copy_.data();
    }
  }
  const float* data() const { return data_; }

 private:
  std::vector<float> copy_;
  const float* data_ = nullptr;
};

// One tile of queries of the `group` heads that share a KV head, [group * tile, head_dim], against keys 0 ...
// last.
struct Tile {
  Matrix queries;
  Matrix scores;
  Matrix out;
  Vector maximum;
  Vector sum;
};

// Turns a row of logits into exp(logit - maximum so far) and rescales what the row has gathered already.
void accumulate_row(Tile& tile, Index r, Index visible) {
  auto row = tile.scores.row(r).array();
  if (visible <= 0) {
    row.setZero();
    return;
  }
  auto seen = row.head(visible);
  const float maximum = std::max(tile.maximum[r], seen.maxCoeff());
  const float rescale = std::exp(tile.maximum[r] - maximum);
  seen = (seen - maximum).exp();
  row.tail(row.size() - visible).setZero();
  tile.sum[r] = tile.sum[r] * rescale + seen.sum();
  tile.out.row(r) *= rescale;
  tile.maximum[r] = maximum;
}

void attend(const ConstRows& keys, const ConstRows& values, Index first_query, Index queries, Tile& tile) {
  const Index stacked = tile.queries.rows();
  tile.out.setZero(stacked, keys.cols());
  tile.maximum.setConstant(stacked, -std::numeric_limits<float>::infinity());
  tile.sum.setZero(stacked);
  const Index end = first_query + queries;
  for (Index k = 0; k < end; k += key_tile) {
    const Index count = std::min(key_tile, end - k);
    tile.scores.resize(stacked, count);
    tile.scores.noalias() = tile.queries * keys.middleRows(k, count).transpose();
    for (Index r = 0; r < stacked; ++r) {
      accumulate_row(tile, r, std::min(count, first_query + r % queries + 1 - k));
    }
    tile.out.noalias() += tile.scores * values.middleRows(k, count);
  }
  tile.out.array().colwise() /= tile.sum.array();
}

}  // namespace

void prefill_attention(const LayerCache& cache, const Matrix& queries, int threads, Matrix& out) {
  const Index tokens = queries.rows();
  const Index head_dim = cache.head_dim();
  const Index group = queries.cols() / head_dim / cache.kv_heads();
  const Index tiles = (tokens + query_tile - 1) / query_tile;
  const float scale = 1.0F / std::sqrt(static_cast<float>(head_dim));
  out.resize(tokens, queries.cols());

  with_kv_type(cache.type(), [&]<typename T>(T*) {
    for (int kv_head = 0; kv_head < cache.kv_heads(); ++kv_head) {
      const FloatRows key_rows{cache.keys<T>(kv_head), tokens, head_dim};
      const FloatRows value_rows{cache.values<T>(kv_head), tokens, head_dim};
      const ConstRows keys{key_rows.data(), tokens, head_dim};
      const ConstRows values{value_rows.data(), tokens, head_dim};
      const Index first_head = kv_head * group;
#pragma omp parallel num_threads(threads)
      {
        Tile tile;
        // The last tiles see the most keys, so they go first and the short ones fill the gaps at the end.
#pragma omp for schedule(dynamic)
        for (Index t = tiles - 1; t >= 0; --t) {
          const Index first = t * query_tile;
          const Index count = std::min(query_tile, tokens - first);
          tile.queries.resize(group * count, head_dim);
          for (Index g = 0; g < group; ++g) {
            tile.queries.middleRows(g * count, count) =
                scale * queries.block(first, (first_head + g) * head_dim, count, head_dim);
          }
          attend(keys, values, first, count, tile);
          for (Index g = 0; g < group; ++g) {
            out.block(first, (first_head + g) * head_dim, count, head_dim) =
                tile.out.middleRows(g * count, count);
          }
        }
      }
    }
  });
}

void decode_attention(const LayerCache& cache, int kv_head, std::span<const float> query, Vector& row,
                      std::span<float> out) {
  const auto rows = static_cast<Index>(cache.rows(kv_head));
  const Index head_dim = cache.head_dim();
  const float scale = 1.0F / std::sqrt(static_cast<float>(head_dim));
  const Eigen::Map<const Vector> q{query.data(), head_dim};
  Eigen::Map<Vector> result{out.data(), head_dim};

  with_kv_type(cache.type(), [&]<typename T>(T*) {
    const FloatRows key_rows{cache.keys<T>(kv_head), rows, head_dim};
    const FloatRows value_rows{cache.values<T>(kv_head), rows, head_dim};
    row.resize(rows);
    row.noalias() = ConstRows{key_rows.data(), rows, head_dim} * q;
    row *= scale;
    row = (row.array() - row.maxCoeff()).exp();
    row /= row.sum();
    result.noalias() = ConstRows{value_rows.data(), rows, head_dim}.transpose() * row;
  });
}

}  // namespace engine
