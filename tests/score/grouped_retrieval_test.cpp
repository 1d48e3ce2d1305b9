// Per-group retrieval with its selector, held against plain code in double: heads of the own group, the
// fallback for groups without one, and KV heads that hold different rows.

#include <gtest/gtest.h>

#include <compresskv/compresskv.hpp>
#include <cstdint>
#include <map>
#include <numeric>
#include <vector>

#include "reference/errors.hpp"
#include "reference/layer_case.hpp"

namespace compresskv {
namespace {

using reference::expect_error;
using reference::Layer;
using reference::LayerCase;
using reference::Random;
using Rows = std::vector<std::uint32_t>;
using GroupedPlan = Plan<score::GroupedRetrieval, select::GroupedTopK, budget::Uniform>;

GroupedPlan plan_of(const Layer<float>& layer) {
  const LayerCase& c = layer.sizes;
  return {layer.shape,
          score::GroupedRetrieval{HeadRanking{layer.ranking},
                                  {.heads_per_layer = c.heads_per_layer,
                                   .window = c.window,
                                   .pool = c.pool,
                                   .pool_width = c.pool_width}},
          select::GroupedTopK{}, budget::Uniform{Budget::tokens_per_layer(c.capacity)}};
}

struct Expected {
  std::vector<std::vector<double>> scores;  // [kv_head][evictable row]
  std::vector<std::vector<double>> slack;   // rounding allowed
  std::size_t fallbacks = 0;                // KV heads that no scoring head reads
};

/// The definition, word by word. `positions[kv_head][row]` are the true positions of the cache's rows.
Expected expected_scores(const Layer<float>& layer, const std::vector<Rows>& positions) {
  const LayerCase& c = layer.sizes;
  std::size_t shortest = positions[0].size();
  for (const Rows& head : positions) {
    shortest = std::min(shortest, head.size());
  }
  const std::size_t window = std::min(c.window, shortest);
  struct Head {
    std::size_t kv_head;
    std::map<std::size_t, double> at;  // pooled, by position
    double tolerance;
  };
  std::vector<Head> heads;
  for (std::size_t i = 0; i < c.heads_per_layer; ++i) {
    const std::size_t head = layer.ranking[0][i];
    const std::size_t kv_head = head / c.group;
    const std::size_t rows = positions[kv_head].size();
    const std::size_t skipped = layer.shown() - window;
    const auto seen = reference::window_attention(
        [&](std::size_t row, std::size_t dim) { return layer.key(kv_head, row, dim); },
        [&](std::size_t q, std::size_t dim) {
          return static_cast<double>(layer.queries[(head * layer.shown() + skipped + q) * c.head_dim + dim]);
        },
        rows, window, c.head_dim, layer.scale());
    const auto pooled = reference::pooled(reference::window_sums(seen.weights), c.pool, c.pool_width);
    Head entry{.kv_head = kv_head,
               .at = {},
               .tolerance = reference::score_tolerance(c.head_dim, rows, window, c.pool_width,
                                                       c.heads_per_layer, seen.largest_logit_mass)};
    for (std::size_t t = 0; t < pooled.size(); ++t) {
      entry.at[positions[kv_head][t]] = pooled[t];
    }
    heads.push_back(entry);
  }
  Expected out;
  for (std::size_t kv_head = 0; kv_head < c.kv_heads; ++kv_head) {
    std::vector<Head> chosen;
    for (const Head& head : heads) {
      if (head.kv_head == kv_head) {
        chosen.push_back(head);
      }
    }
    if (chosen.empty()) {
      chosen = heads;
      ++out.fallbacks;
    }
    const std::size_t evictable = positions[kv_head].size() - window;
    out.scores.emplace_back(evictable, 0.0);
    out.slack.emplace_back(evictable, 1e-36);
    for (std::size_t t = 0; t < evictable; ++t) {
      for (const Head& head : chosen) {
        const auto found = head.at.find(positions[kv_head][t]);
        if (found != head.at.end()) {
          const double share = found->second / static_cast<double>(chosen.size());
          out.scores.back()[t] += share;
          out.slack.back()[t] += head.tolerance * share;
        }
      }
    }
  }
  return out;
}

void expect_near(const Scores<Granularity::kv_head>& scores, const Expected& expected) {
  ASSERT_EQ(scores.rows(), expected.scores.size());
  for (std::size_t head = 0; head < scores.rows(); ++head) {
    ASSERT_EQ(scores.tokens(head), expected.scores[head].size());
    for (std::size_t t = 0; t < scores.tokens(head); ++t) {
      ASSERT_NEAR(static_cast<double>(scores.row(head)[t]), expected.scores[head][t], expected.slack[head][t])
          << "KV head " << head << " row " << t;
    }
  }
}

/// The full sort's choice from the library's own scores, a KV head.
std::vector<Rows> best_rows(const Scores<Granularity::kv_head>& scores, std::size_t capacity) {
  std::vector<Rows> lists;
  for (std::size_t head = 0; head < scores.rows(); ++head) {
    const std::vector<float> row(scores.row(head).begin(), scores.row(head).end());
    lists.push_back(
        reference::rows_to_keep(row, scores.window(head), std::min(capacity, scores.cached(head))));
  }
  return lists;
}

Rows positions_of(const Retained& retained, std::size_t head) {
  return {retained.positions(head).begin(), retained.positions(head).end()};
}

TEST(GroupedRetrieval, IsTheReferenceOverGeneratedLayers) {
  std::size_t fallbacks = 0;
  for (const LayerCase& c : reference::layer_cases(60, 31)) {
    SCOPED_TRACE(c);
    Layer<float> layer(c);
    const auto plan = plan_of(layer);
    Rows all(c.rows);
    std::iota(all.begin(), all.end(), 0U);
    const Expected expected = expected_scores(layer, std::vector<Rows>(c.kv_heads, all));
    fallbacks += expected.fallbacks;
    Compressor compressor{plan};
    compressor.begin(c.rows);
    const auto scores = compressor.score(0, layer.cache.view(), layer.observation());
    expect_near(scores, expected);

    const std::size_t capacity = std::min(c.capacity, c.rows);
    const auto lists = best_rows(scores, capacity);
    const auto original = layer.cache;
    const Retained& kept = compressor.compress(0, layer.cache.view(), layer.observation());
    for (std::size_t head = 0; head < c.kv_heads; ++head) {
      EXPECT_EQ(positions_of(kept, head), lists[head]);
    }
    EXPECT_EQ(kept.rows(), capacity) << "every head keeps as many";
    EXPECT_EQ(kept.next_position(), c.rows);
    EXPECT_EQ(layer.cache, original.compacted([&](std::size_t head) { return lists[head]; }));
  }
  EXPECT_GT(fallbacks, 10U) << "the cases must have groups without a scoring head";
}

TEST(GroupedRetrieval, HeadsThatHoldDifferentRowsAreMatchedByPosition) {
  for (std::uint64_t seed = 0; seed < 12; ++seed) {
    const LayerCase c{.group = 2,
                      .kv_heads = 3,
                      .head_dim = 16,
                      .rows = 120,
                      .capacity = 30,
                      .heads_per_layer = 1 + seed % 4,
                      .pool_width = seed % 2 == 0 ? 5U : 1U,
                      .seed = 100 + seed};
    SCOPED_TRACE(c);
    Layer<float> layer(c);
    const auto plan = plan_of(layer);
    Random random(seed);
    // Each head has lost rows of its own, some of them all but a few.
    std::vector<Rows> positions(3);
    std::vector<std::size_t> lengths(3);
    for (std::size_t head = 0; head < 3; ++head) {
      for (std::uint32_t row = 0; row < 120; ++row) {
        if (row == 119 || random.below(head == 2 ? 8 : 3) == 0) {
          positions[head].push_back(row);
        }
      }
      lengths[head] = positions[head].size();
    }
    Compressor compressor{plan};
    compressor.begin(120);
    compressor.compact(0, layer.cache.view(), Selection::per_head(positions));
    KvShape ragged = layer.cache.shape;
    ragged.allocated_rows = 120;
    ragged.head_rows = lengths;
    const StridedKv<float> view(layer.cache.keys.data(), layer.cache.values.data(), ragged,
                                layer.cache.strides);
    const Expected expected = expected_scores(layer, positions);
    const auto scores = compressor.score(0, view, layer.observation());
    expect_near(scores, expected);

    const auto lists = best_rows(scores, 30);
    const auto before = layer.cache;
    const Retained& kept = compressor.compress(0, view, layer.observation());
    for (std::size_t head = 0; head < 3; ++head) {
      Rows stay;
      for (const std::uint32_t row : lists[head]) {
        stay.push_back(positions[head][row]);
      }
      EXPECT_EQ(positions_of(kept, head), stay) << "positions stay true, KV head " << head;
      EXPECT_EQ(kept.rows(head), std::min<std::size_t>(30, lengths[head]));
    }
    EXPECT_EQ(layer.cache, before.compacted([&](std::size_t head) { return lists[head]; }));
  }
}

TEST(GroupedRetrieval, OneSetOfRowsForAllHeadsNeedsEqualLengths) {
  Layer<float> layer({.kv_heads = 2, .rows = 40});
  Compressor compressor{layer.plan};
  compressor.begin(40);
  compressor.compact(0, layer.cache.view(), Selection::per_head(std::vector<Rows>{{1, 39}, {2, 3, 39}}));
  const std::vector<std::size_t> lengths{30, 31};
  KvShape ragged = layer.cache.shape;
  ragged.head_rows = lengths;
  const StridedKv<float> view(layer.cache.keys.data(), layer.cache.values.data(), ragged,
                              layer.cache.strides);
  const auto before = layer.cache;
  expect_error<ArgumentError>([&] { compressor.compress(0, view, layer.observation()); },
                              {"KV head 1 of layer 0 has 31 rows, KV head 0 has 30", "scores a KV head"});
  EXPECT_EQ(layer.cache, before);
}

TEST(GroupedRetrieval, RejectsAShard) {
  expect_error<ArgumentError>(
      [] {
        score::GroupedRetrieval(HeadRanking{{{0, 1}}},
                                {.heads_per_layer = 1, .shard = {.first_head = 0, .heads = 1}});
      },
      {"GroupedRetrieval does not support a shard", "use SemanticRetrieval"});
}

TEST(GroupedTopK, TakesOnlyScoresAKvHead) {
  static_assert(select::Selector<select::GroupedTopK>);
  static_assert(select::GroupedTopK::accepts(Granularity::kv_head) &&
                !select::GroupedTopK::accepts(Granularity::layer));
}

TEST(GroupedTopK, EachHeadKeepsItsBestTiesToTheLowerRow) {
  std::vector<float> values{1, 5, 2, 5, 5, 7, 7, 7, 9, 3};
  const std::vector<std::size_t> ends{5, 8, 10};
  const std::vector<std::size_t> windows(3, 2);
  Workspace workspace;
  Selection selection;
  select::GroupedTopK{}.select(Scores<Granularity::kv_head>(values, ends, windows), 4, workspace, selection);
  EXPECT_EQ(selection, Selection::per_head(std::vector<Rows>{{1, 3, 5, 6}, {0, 1, 3, 4}, {0, 1, 2, 3}}));
  select::GroupedTopK{}.select(Scores<Granularity::kv_head>(values, ends, windows), 2, workspace, selection);
  EXPECT_EQ(selection, Selection::per_head(std::vector<Rows>{{5, 6}, {3, 4}, {2, 3}}));
}

}  // namespace
}  // namespace compresskv
