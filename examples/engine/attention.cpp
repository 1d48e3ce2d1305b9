#include "attention.hpp"

#include <algorithm>
#include <cmath>
#include <compresskv/kernel/decode_attention.hpp>
#include <compresskv/view/strided_kv.hpp>
#include <limits>
#include <vector>

namespace engine {
namespace {

using Index = std::ptrdiff_t;

// Tile sizes: the scores of a group of 3 heads take 3 * 64 * 256 floats, which the second-level cache holds.
constexpr Index query_tile = 64;
constexpr Index key_tile = 256;
static_assert(key_tile % PackedMatrix::panel == 0);

// One KV head as matrices of the two products: keys turn a query into logits, values turn weights into an
// output.
struct PackedHead {
  PackedMatrix keys;    // [rows, head_dim]
  PackedMatrix values;  // [head_dim, rows]
};

template <typename T>
PackedHead pack(const T* keys, const T* values, Index rows, Index head_dim) {
  PackedHead head{PackedMatrix(rows, head_dim), PackedMatrix(head_dim, rows)};
  for (Index t = 0; t < rows; ++t) {
    for (Index e = 0; e < head_dim; ++e) {
      head.keys(t, e) = compresskv::to_float(keys[t * head_dim + e]);
      head.values(e, t) = compresskv::to_float(values[t * head_dim + e]);
    }
  }
  return head;
}

// The queries of one tile of tokens, of the heads that share a KV head: row g * tokens + t is head g's token
// t.
struct Tile {
  Matrix queries;
  Matrix scores;
  Matrix out;
  Vector maximum;
  Vector sum;

  // Turns a row of logits into exp(logit - maximum so far), and what the row has gathered to the new maximum.
  void accumulate(Index r, Index visible, Index count) {
    auto row = scores.row(r).head(count).array();
    auto seen = row.head(visible);
    row.tail(count - visible).setZero();
    const float highest = std::max(maximum[r], seen.maxCoeff());
    const float rescale = std::exp(maximum[r] - highest);
    seen = (seen - highest).exp();
    sum[r] = sum[r] * rescale + seen.sum();
    out.row(r) *= rescale;
    maximum[r] = highest;
  }

  // `first_row` is where the key of the tile's first token lies.
  void attend(const PackedHead& head, Index first_row, Index tokens) {
    const Index rows = queries.rows();
    const Index head_dim = queries.cols();
    scores.resize(rows, key_tile);
    out.setZero(rows, head_dim);
    maximum.setConstant(rows, -std::numeric_limits<float>::infinity());
    sum.setZero(rows);
    const Index end = first_row + tokens;
    for (Index k = 0; k < end; k += key_tile) {
      const Range keys{k, std::min(key_tile, end - k)};
      multiply({queries.data(), head_dim}, rows, head.keys, keys, {0, head_dim}, false,
               {scores.data(), key_tile});
      for (Index r = 0; r < rows; ++r) {
        const Index visible = std::clamp(first_row + r % tokens + 1 - k, Index{0}, keys.count);
        if (visible > 0) {
          accumulate(r, visible, keys.count);
        } else {
          scores.row(r).head(keys.count).setZero();
        }
      }
      multiply({scores.data(), key_tile}, rows, head.values, {0, head_dim}, keys, true,
               {out.data(), head_dim});
    }
    out.array().colwise() /= sum.array();
  }
};

}  // namespace

void prefill_attention(const LayerCache& cache, const Matrix& queries, ThreadPool& pool, Matrix& out) {
  const Index tokens = queries.rows();
  const Index head_dim = cache.head_dim();
  const Index kv_heads = cache.kv_heads();
  const Index group = queries.cols() / head_dim / kv_heads;
  const Index tiles = (tokens + query_tile - 1) / query_tile;
  const float scale = 1.0F / std::sqrt(static_cast<float>(head_dim));
  out.resize(tokens, queries.cols());

  std::vector<PackedHead> heads(static_cast<std::size_t>(kv_heads));
  pool.parallel_for(heads.size(), [&](std::size_t h) {
    with_kv_type(cache.type(), [&]<typename T>(T*) {
      const int kv_head = static_cast<int>(h);
      heads[h] = pack(cache.keys<T>(kv_head), cache.values<T>(kv_head),
                      static_cast<Index>(cache.rows(kv_head)), head_dim);
    });
  });

  pool.parallel_for(static_cast<std::size_t>(tiles * kv_heads), [&](std::size_t piece) {
    // The last tokens see the most keys, so they go first and the short pieces fill the gaps at the end.
    const Index first = (tiles - 1 - static_cast<Index>(piece) / kv_heads) * query_tile;
    const Index kv_head = static_cast<Index>(piece) % kv_heads;
    const Index count = std::min(query_tile, tokens - first);
    Tile tile;
    tile.queries.resize(group * count, head_dim);
    for (Index g = 0; g < group; ++g) {
      tile.queries.middleRows(g * count, count) =
          scale * queries.block(first, (kv_head * group + g) * head_dim, count, head_dim);
    }
    const PackedHead& head = heads[static_cast<std::size_t>(kv_head)];
    tile.attend(head, head.keys.outputs() - tokens + first, count);
    for (Index g = 0; g < group; ++g) {
      out.block(first, (kv_head * group + g) * head_dim, count, head_dim) =
          tile.out.middleRows(g * count, count);
    }
  });
}

void decode_attention(const LayerCache& cache, int kv_head, std::span<const float> query,
                      std::vector<float>& row, std::span<float> out) {
  const std::size_t head_dim = query.size();
  row.resize(cache.rows(kv_head));
  std::vector<float> scratch(2 * compresskv::kernel::round_up_to_lanes(head_dim));
  with_kv_type(cache.type(), [&]<typename T>(T*) {
    const compresskv::StridedKv head{
        cache.keys<T>(kv_head), cache.values<T>(kv_head),
        compresskv::KvShape{.kv_heads = 1, .rows = row.size(), .head_dim = head_dim},
        compresskv::layout::head_token_dim};
    const float scale = 1.0F / std::sqrt(static_cast<float>(head_dim));
    compresskv::kernel::decode_attention(head, 0, query.data(), scale, scratch, row, out.data());
  });
}

}  // namespace engine
