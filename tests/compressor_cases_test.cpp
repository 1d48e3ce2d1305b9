// compress() and its steps over generated layers, in three element types, held against tests/reference/.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <compresskv/compresskv.hpp>
#include <cstring>
#include <vector>

#include "reference/executors.hpp"
#include "reference/forced_path.hpp"
#include "reference/layer_case.hpp"
#include "reference/scattered_kv.hpp"

namespace compresskv {
namespace {

using reference::ForcedPath;
using reference::Layer;
using reference::layer_cases;
using reference::LayerCase;
using reference::SemanticPlan;

using Rows = std::vector<std::uint32_t>;

Rows rows_of(const Selection& lists, std::size_t head = 0) {
  const auto rows = lists.rows(head);
  return {rows.begin(), rows.end()};
}

Rows positions_of(const Retained& retained, std::size_t head = 0) {
  const auto positions = retained.positions(head);
  return {positions.begin(), positions.end()};
}

std::vector<float> copy_of(const Scores<Granularity::layer>& scores) {
  return {scores.values().begin(), scores.values().end()};
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return reference::same_bytes(a, b);
}

template <class T>
struct CompressorCases : testing::Test {};
using Elements = testing::Types<float, half, bfloat16>;

struct ElementNames {
  template <class T>
  static std::string GetName(int) {
    return std::is_same_v<T, float> ? "float" : std::is_same_v<T, half> ? "half" : "bfloat16";
  }
};
TYPED_TEST_SUITE(CompressorCases, Elements, ElementNames);

TYPED_TEST(CompressorCases, ScoresAreTheReferencesWithinRounding) {
  for (const LayerCase& c : layer_cases(60, 11)) {
    SCOPED_TRACE(c);
    Layer<TypeParam> layer(c);
    Compressor compressor{layer.plan};
    compressor.begin(c.rows);
    const auto scores = compressor.score(0, layer.cache.view(), layer.observation());
    ASSERT_EQ(scores.rows(), 1U);
    ASSERT_EQ(scores.tokens(), c.rows - c.observed());
    ASSERT_EQ(scores.window(), c.observed());
    const auto expected = layer.scores();
    for (std::size_t t = 0; t < scores.tokens(); ++t) {
      const double tolerance =
          expected.relative_tolerance * expected.values[t] + reference::score_underflow(c.observed());
      ASSERT_NEAR(static_cast<double>(scores.values()[t]), expected.values[t], tolerance) << "token " << t;
    }
  }
}

TYPED_TEST(CompressorCases, SelectionIsTheFullSortsAndTheWindow) {
  for (const LayerCase& c : layer_cases(60, 12)) {
    SCOPED_TRACE(c);
    Layer<TypeParam> layer(c);
    Compressor compressor{layer.plan};
    compressor.begin(c.rows);
    const auto scores = compressor.score(0, layer.cache.view(), layer.observation());
    const std::size_t capacity = std::min(c.capacity, c.rows);
    const Rows expected = reference::rows_to_keep(copy_of(scores), c.observed(), capacity);
    EXPECT_EQ(rows_of(compressor.select(0, scores)), expected);
  }
}

TYPED_TEST(CompressorCases, CompressKeepsTheBestRowsByteForByte) {
  for (const LayerCase& c : layer_cases(60, 13)) {
    SCOPED_TRACE(c);
    Layer<TypeParam> layer(c);
    const auto expected_scores = layer.scores();
    const auto original = layer.cache;
    Compressor compressor{layer.plan};
    compressor.begin(c.rows);
    const Retained& kept = compressor.compress(0, layer.cache.view(), layer.observation());

    const std::size_t capacity = std::min(c.capacity, c.rows);
    ASSERT_EQ(kept.rows(), capacity);
    EXPECT_TRUE(kept.shared());
    EXPECT_EQ(kept.next_position(), c.rows);
    EXPECT_EQ(kept.bytes_freed(), (c.rows - capacity) * c.kv_heads * c.head_dim * 2 * sizeof(TypeParam));
    const Rows positions = positions_of(kept);
    EXPECT_TRUE(std::is_sorted(positions.begin(), positions.end(), std::less_equal<>()) ||
                positions.size() == 1)
        << "positions must ascend, each once";
    for (std::size_t i = 0; i < c.observed(); ++i) {
      ASSERT_EQ(positions[capacity - 1 - i], c.rows - 1 - i) << "the window must be whole";
    }
    // The rows kept are the exact arithmetic's best, but for those that lie within rounding of each other.
    const std::size_t evictable = c.rows - c.observed();
    std::vector<bool> stays(evictable, false);
    double lowest_kept = std::numeric_limits<double>::infinity();
    double highest_lost = 0.0;
    for (std::size_t i = 0; i + c.observed() < capacity; ++i) {
      stays[positions[i]] = true;
    }
    for (std::size_t t = 0; t < evictable; ++t) {
      const double score = expected_scores.values[t];
      stays[t] ? lowest_kept = std::min(lowest_kept, score) : highest_lost = std::max(highest_lost, score);
    }
    EXPECT_GE(lowest_kept, highest_lost * (1.0 - 2.0 * expected_scores.relative_tolerance) -
                               2.0 * reference::score_underflow(c.observed()));
    EXPECT_EQ(layer.cache, original.compacted([&](std::size_t) { return positions; }));
  }
}

TYPED_TEST(CompressorCases, NothingButTheSizesDecidesABit) {
  const ForcedPath exact(reference::exact_path());
  for (const LayerCase& c : layer_cases(60, 14)) {
    SCOPED_TRACE(c);
    Layer<TypeParam> layer(c);
    Compressor serial{layer.plan};
    serial.begin(c.rows);
    const auto expected = copy_of(serial.score(0, layer.cache.view(), layer.observation()));
    {
      const ForcedPath portable(kernel::CodePath::portable);
      EXPECT_TRUE(same_bits(copy_of(serial.score(0, layer.cache.view(), layer.observation())), expected))
          << "code path";
    }
    Compressor reversed{layer.plan, reference::ReverseExecutor{}};
    reversed.begin(c.rows);
    EXPECT_TRUE(same_bits(copy_of(reversed.score(0, layer.cache.view(), layer.observation())), expected))
        << "order of tasks";

    reference::Random random(c.seed);
    for (const std::size_t chunk : {c.head_dim, std::size_t{1}, std::size_t{4}}) {
      reference::ScatteredMemory<TypeParam> scattered(layer.cache, random, 1 + c.rows / 3, chunk);
      EXPECT_TRUE(same_bits(copy_of(serial.score(0, scattered.view(), layer.observation())), expected))
          << "rows in pieces, chunks of " << chunk;
      {
        const ForcedPath portable(kernel::CodePath::portable);
        EXPECT_TRUE(same_bits(copy_of(serial.score(0, scattered.view(), layer.observation())), expected))
            << "rows in pieces, chunks of " << chunk << ", portable";
      }
      Compressor compressor{layer.plan};
      compressor.begin(c.rows);
      const Retained& kept = compressor.compress(0, scattered.view(), layer.observation());
      auto contiguous = layer.cache;
      Compressor other{layer.plan, reference::ShuffledExecutor{}};
      other.begin(c.rows);
      EXPECT_EQ(positions_of(kept), positions_of(other.compress(0, contiguous.view(), layer.observation())));
      EXPECT_TRUE(scattered.starts_like(contiguous, kept.rows())) << "chunks of " << chunk;
    }
  }
}

TYPED_TEST(CompressorCases, ThreadsDecideNoBit) {
  // Few cases, as each call starts threads.
  std::vector<LayerCase> cases = layer_cases(8, 15);
  cases.push_back(
      {.group = 3, .kv_heads = 2, .head_dim = 16, .rows = 5000, .capacity = 700, .heads_per_layer = 4});
  for (const LayerCase& c : cases) {
    SCOPED_TRACE(c);
    Layer<TypeParam> layer(c);
    auto other = layer.cache;
    Compressor serial{layer.plan};
    Compressor threaded{layer.plan, reference::ThreadExecutor{}};
    serial.begin(c.rows);
    threaded.begin(c.rows);
    EXPECT_TRUE(same_bits(copy_of(serial.score(0, layer.cache.view(), layer.observation())),
                          copy_of(threaded.score(0, layer.cache.view(), layer.observation()))));
    EXPECT_EQ(positions_of(serial.compress(0, layer.cache.view(), layer.observation())),
              positions_of(threaded.compress(0, other.view(), layer.observation())));
    EXPECT_EQ(layer.cache, other);
  }
}

TYPED_TEST(CompressorCases, AttentionMatrixSelectsWithoutKeys) {
  for (const LayerCase& c : layer_cases(40, 16)) {
    SCOPED_TRACE(c);
    Layer<TypeParam> layer(c);
    const std::size_t window = c.observed();
    const std::size_t shown = layer.shown();
    // Queries before the window hold NaN: they must not be read.
    std::vector<TypeParam> attention(c.query_heads() * shown * c.rows,
                                     static_cast<TypeParam>(std::numeric_limits<float>::quiet_NaN()));
    std::vector<std::vector<double>> sums;
    for (std::size_t i = 0; i < c.heads_per_layer; ++i) {
      const std::size_t head = layer.ranking[0][i];
      auto weights = layer.attention(head).weights;
      for (std::size_t q = 0; q < window; ++q) {
        for (std::size_t t = 0; t < c.rows; ++t) {
          TypeParam& element = attention[(head * shown + c.extra_queries + q) * c.rows + t];
          element = static_cast<TypeParam>(static_cast<float>(weights[q][t]));
          weights[q][t] = static_cast<double>(to_float(element));
        }
      }
      sums.push_back(reference::window_sums(weights));
    }
    const auto expected = reference::layer_scores(sums, c.pool, c.pool_width);
    const AttentionMatrix<TypeParam> matrix{
        attention.data(), {.query_heads = c.query_heads(), .queries = shown, .tokens = c.rows}};
    Compressor alone{layer.plan};
    alone.begin(c.rows);
    const auto scores = alone.score(0, matrix);
    // Only additions of positive numbers: one rounding each.
    const double tolerance =
        reference::unit_roundoff * static_cast<double>(window + c.pool_width + c.heads_per_layer + 2);
    for (std::size_t t = 0; t < scores.tokens(); ++t) {
      ASSERT_NEAR(static_cast<double>(scores.values()[t]), expected[t], tolerance * expected[t] + 1e-44);
    }
    const Rows selected = rows_of(alone.select(0, scores));
    Compressor compressor{layer.plan};
    compressor.begin(c.rows);
    EXPECT_EQ(positions_of(compressor.compress(0, layer.cache.view(), matrix)), selected);
  }
}

TYPED_TEST(CompressorCases, GatherLeavesTheSourceAndFillsTheTarget) {
  for (const LayerCase& c : layer_cases(30, 17)) {
    SCOPED_TRACE(c);
    Layer<TypeParam> layer(c);
    const auto original = layer.cache;
    Compressor compressor{layer.plan};
    compressor.begin(c.rows);
    const auto scores = compressor.score(0, layer.cache.view(), layer.observation());
    const Selection selection = compressor.select(0, scores);
    reference::Random random(c.seed);
    reference::Cache<TypeParam> target(
        {.kv_heads = c.kv_heads, .rows = selection.rows().size() + random.below(3), .head_dim = c.head_dim},
        random.pick(reference::all_arrangements));
    const Retained& kept = compressor.gather(0, layer.cache.view(), selection, target.view());
    EXPECT_EQ(layer.cache, original) << "the source is not written";
    const Rows rows = rows_of(selection);
    EXPECT_EQ(positions_of(kept), rows);
    for (std::size_t head = 0; head < c.kv_heads; ++head) {
      for (std::size_t row = 0; row < rows.size(); ++row) {
        for (std::size_t dim = 0; dim < c.head_dim; ++dim) {
          const std::size_t to = target.at(head, row, dim);
          const std::size_t from = original.at(head, rows[row], dim);
          ASSERT_EQ(std::memcmp(&target.keys[to], &original.keys[from], sizeof(TypeParam)), 0);
          ASSERT_EQ(std::memcmp(&target.values[to], &original.values[from], sizeof(TypeParam)), 0);
        }
      }
    }
    // In place the same rows come out, from a paged cache as well.
    reference::ScatteredMemory<TypeParam> paged(original, random, 5, c.head_dim);
    Compressor other{layer.plan};
    other.begin(c.rows);
    const Retained& again = other.compress(0, paged.view(), layer.observation());
    EXPECT_EQ(positions_of(again), rows);
  }
}

TYPED_TEST(CompressorCases, RankSumsAreTheWholesWithinRounding) {
  for (const std::size_t group : {std::size_t{1}, std::size_t{3}}) {
    const LayerCase c{.group = group,
                      .kv_heads = 4,
                      .head_dim = 20,
                      .rows = 200,
                      .capacity = 50,
                      .heads_per_layer = 4,
                      .seed = 5 + group};
    SCOPED_TRACE(c);
    Layer<TypeParam> layer(c);
    Compressor whole{layer.plan};
    whole.begin(c.rows);
    const auto expected = copy_of(whole.score(0, layer.cache.view(), layer.observation()));

    // Two ranks hold two KV heads each, and the query heads that read them.
    const ModelShape rank_shape{.layers = 1, .query_heads = 2 * group, .kv_heads = 2, .head_dim = c.head_dim};
    std::vector<float> total(expected.size(), 0.0F);
    std::vector<reference::Cache<TypeParam>> caches;
    std::vector<SemanticPlan> plans;
    for (std::size_t rank = 0; rank < 2; ++rank) {
      caches.emplace_back(KvShape{.kv_heads = 2, .rows = c.rows, .head_dim = c.head_dim},
                          reference::Arrangement::token_head_dim);
      for (std::size_t head = 0; head < 2; ++head) {
        for (std::size_t row = 0; row < c.rows; ++row) {
          for (std::size_t dim = 0; dim < c.head_dim; ++dim) {
            const std::size_t from = layer.cache.at(2 * rank + head, row, dim);
            caches[rank].keys[caches[rank].at(head, row, dim)] = layer.cache.keys[from];
            caches[rank].values[caches[rank].at(head, row, dim)] = layer.cache.values[from];
          }
        }
      }
      plans.emplace_back(
          rank_shape,
          score::SemanticRetrieval{
              HeadRanking{layer.ranking},
              {.heads_per_layer = 4, .shard = {.first_head = rank * 2 * group, .heads = 2 * group}}},
          select::SharedTopK{}, budget::Uniform{Budget::tokens_per_layer(c.capacity)});
    }
    const auto observation = [&](std::size_t rank) {
      return QueryWindow<TypeParam>(layer.queries.data() + rank * 2 * group * 8 * c.head_dim,
                                    {.query_heads = 2 * group, .queries = 8, .head_dim = c.head_dim});
    };
    for (std::size_t rank = 0; rank < 2; ++rank) {
      Compressor compressor{plans[rank]};
      compressor.begin(c.rows);
      const auto scores = compressor.score(0, caches[rank].view(), observation(rank));
      for (std::size_t t = 0; t < total.size(); ++t) {
        total[t] += scores.values()[t];
      }
    }
    for (std::size_t t = 0; t < total.size(); ++t) {
      // The same five terms in another order, divided before the last addition.
      ASSERT_NEAR(total[t], expected[t], 6 * 0x1p-24 * expected[t]);
    }
    // Rank 0 reduces and selects inside compress; rank 1 is given its selection.
    Compressor first{plans[0]};
    first.begin(c.rows);
    const Rows kept =
        positions_of(first.compress(0, caches[0].view(), observation(0), [&](std::span<float> values) {
          std::copy(total.begin(), total.end(), values.begin());
        }));
    EXPECT_EQ(kept, reference::rows_to_keep(total, 8, c.capacity));
    const auto before = caches[1];
    Compressor second{plans[1]};
    second.begin(c.rows);
    EXPECT_EQ(positions_of(second.compact(0, caches[1].view(), Selection::shared_by_heads(kept))), kept);
    EXPECT_EQ(caches[1], before.compacted([&](std::size_t) { return kept; }));
  }
}

}  // namespace
}  // namespace compresskv
