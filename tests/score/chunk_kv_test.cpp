// ChunkKV, and HeadMean, the other wrapper of scorers.

#include <gtest/gtest.h>

#include <algorithm>
#include <compresskv/compresskv.hpp>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "reference/errors.hpp"
#include "reference/methods.hpp"

namespace compresskv {
namespace {

using reference::expect_error;
using reference::Layer;
using reference::LayerCase;
using reference::ScoreRows;
using score::ChunkKv;
using score::HeadMean;
using ChunkRows = std::vector<std::uint32_t>;

/// What `scorer` gives of a layer, and where its tokens stand.
template <class S>
struct Scored {
  ScoreRows scores;
  std::vector<std::vector<std::size_t>> positions;

  Scored(const S& scorer, Layer<float>& layer) {
    const auto selector = [] {
      if constexpr (S::granularity == Granularity::layer) {
        return select::SharedTopK{};
      } else {
        return select::GroupedTopK{};
      }
    }();
    const Plan plan{layer.shape, scorer, selector,
                    budget::Uniform{Budget::tokens_per_layer(scorer.window())}};
    Compressor compressor{plan};
    compressor.begin(layer.sizes.rows);
    const auto of = compressor.score(0, layer.cache.view(), layer.observation());
    for (std::size_t row = 0; row < of.rows(); ++row) {
      scores.emplace_back(of.row(row).begin(), of.row(row).end());
      positions.emplace_back();
      for (std::size_t t = 0; t < of.tokens(row); ++t) {
        positions.back().push_back(t);
      }
    }
  }
};

template <class S>
void expect_chunks_of(const S& scorer, const LayerCase& c) {
  for (const std::size_t chunk : {1U, 3U, 20U, 10000U}) {
    SCOPED_TRACE(testing::Message() << c << " chunk " << chunk);
    Layer<float> layer(c);
    const Scored<S> plain(scorer, layer);
    reference::expect_scores(ChunkKv{scorer, {.chunk = chunk}}, layer,
                             reference::chunk_kv(plain.scores, plain.positions, chunk), 1e-6, 0.0);
  }
}

TEST(ChunkKv, IsTheMeanOfChunksOfAnyScorer) {
  std::vector<LayerCase> cases = reference::layer_cases(12, 95);
  std::erase_if(cases, [](const LayerCase& c) { return c.rows > 800 || c.kv_heads > 8; });
  for (LayerCase c : cases) {
    c.extra_queries = c.rows - c.observed();
    expect_chunks_of(score::SnapKv{{.window = c.window, .pool_width = c.pool_width}}, c);
    expect_chunks_of(score::Random{{.window = c.window}}, c);
    expect_chunks_of(score::Knorm{{.window = c.window}}, c);
    expect_chunks_of(score::Cur{{.window = c.window}}, c);
    expect_chunks_of(score::StreamingLlm{{.window = c.window}}, c);  // a row for the layer
    expect_chunks_of(HeadMean{score::Random{{.window = c.window}}}, c);
  }
}

/// Whole chunks, of the last one the first rows, and exactly the capacity.
TEST(ChunkKv, KeepsWholeChunksAndMeetsTheCapacity) {
  // 7 chunks of 20 and one of 3 before the window.
  Layer<float> layer({.group = 2, .kv_heads = 2, .rows = 151, .window = 8, .capacity = 8});
  for (std::size_t capacity = 8; capacity <= 151; ++capacity) {
    SCOPED_TRACE(capacity);
    const Plan plan{layer.shape, ChunkKv{score::SnapKv{{}}}, select::GroupedTopK{},
                    budget::Uniform{Budget::tokens_per_layer(capacity)}};
    Compressor compressor{plan};
    compressor.begin(151);
    const Selection& kept =
        compressor.select(0, compressor.score(0, layer.cache.view(), layer.observation()));
    for (std::size_t head = 0; head < 2; ++head) {
      ASSERT_EQ(kept.rows(head).size(), capacity);
      std::size_t in_part = 0;
      for (std::uint32_t chunk = 0; chunk < 8; ++chunk) {
        const std::uint32_t last = std::min(20 * chunk + 20, 143U);
        ChunkRows rows;
        for (const std::uint32_t row : kept.rows(head)) {
          if (row >= 20 * chunk && row < last) {
            rows.push_back(row);
          }
        }
        in_part += !rows.empty() && rows.size() < last - 20 * chunk ? 1U : 0U;
        for (std::size_t i = 0; i < rows.size(); ++i) {
          ASSERT_EQ(rows[i], 20 * chunk + i) << "of a chunk that does not fit the first rows stay";
        }
      }
      EXPECT_LE(in_part, 1U);
    }
  }
}

TEST(ChunkKv, AdaptiveHeadsKeepWholeChunksToo) {
  Layer<float> layer({.group = 2, .kv_heads = 3, .rows = 208, .window = 8, .capacity = 8});
  const Plan plan{layer.shape, ChunkKv{score::SnapKv{{}}}, select::Adaptive{},
                  budget::Uniform{Budget::tokens_per_layer(88)}};  // own share: 16 rows a head
  Compressor compressor{plan};
  compressor.begin(208);
  const Selection& kept = compressor.select(0, compressor.score(0, layer.cache.view(), layer.observation()));
  std::size_t total = 0;
  std::size_t in_part = 0;
  for (std::size_t head = 0; head < 3; ++head) {
    total += kept.rows(head).size();
    std::vector<std::size_t> of_chunk(10, 0);
    for (const std::uint32_t row : kept.rows(head)) {
      if (row < 200) {
        ++of_chunk[row / 20];
      }
    }
    for (const std::size_t rows : of_chunk) {
      in_part += rows != 0 && rows != 20 ? 1U : 0U;
      EXPECT_TRUE(rows == 0 || rows == 20 || rows < 20);
    }
  }
  EXPECT_EQ(total, 3 * 88U);
  EXPECT_LE(in_part, 4U) << "one a head by its own share, and one of the layer";
}

/// Chunks are of positions: what a chunk has lost, or what was appended, moves no other.
TEST(ChunkKv, ChunksKeepTheirPositionsOverTurns) {
  Layer<float> layer({.kv_heads = 2, .rows = 120, .window = 4, .capacity = 40});
  const Plan plan{layer.shape, ChunkKv{score::Random{{.window = 4}}}, select::GroupedTopK{},
                  budget::Uniform{Budget::tokens_per_layer(40)}};
  const Plan plain{layer.shape, score::Random{{.window = 4}}, select::GroupedTopK{},
                   budget::Uniform{Budget::tokens_per_layer(40)}};
  std::vector<ChunkRows> rows(2);
  for (std::uint32_t row = 0; row < 90; ++row) {
    for (std::uint32_t head = 0; head < 2; ++head) {
      if ((row + head) % 3 > 0 || row > 80) {
        rows[head].push_back(row);
      }
    }
  }
  const auto after = [&](auto& compressor) {
    Layer<float> own = layer;
    own.cache.shape.rows = 90;
    own.cache.shape.allocated_rows = 120;
    compressor.begin(90);
    compressor.compact(0, own.cache.view(), Selection::per_head(rows));
    EXPECT_EQ(compressor.truncate(85).rows(0, 1), rows[1].size() - 5);
    compressor.begin_turn(101);
    own.cache.shape.rows = 120;
    own.cache.set_rows({rows[0].size() - 5 + 16, rows[1].size() - 5 + 16});
    const auto scores = compressor.score(0, own.cache.view());
    ScoreRows values;
    for (std::size_t head = 0; head < 2; ++head) {
      values.emplace_back(scores.row(head).begin(), scores.row(head).end());
    }
    return values;
  };
  Compressor of_plain{plain};
  Compressor of_chunks{plan};
  const ScoreRows scores = after(of_plain);
  std::vector<std::vector<std::size_t>> positions(2);
  for (std::size_t head = 0; head < 2; ++head) {
    for (std::size_t t = 0; t < scores[head].size(); ++t) {
      positions[head].push_back(of_plain.retained(0).position(t, head));
    }
    EXPECT_EQ(positions[head].back(), 96U);
  }
  const ScoreRows expected = reference::chunk_kv(scores, positions, 20);
  const ScoreRows chunks = after(of_chunks);
  for (std::size_t head = 0; head < 2; ++head) {
    ASSERT_EQ(chunks[head].size(), expected[head].size());
    for (std::size_t t = 0; t < expected[head].size(); ++t) {
      EXPECT_NEAR(chunks[head][t], expected[head][t], 1e-7);
    }
  }
}

TEST(ChunkKv, ProtectedTokensStayWithoutTheirChunks) {
  Layer<float> layer({.kv_heads = 1, .rows = 108, .window = 8, .capacity = 8});
  const Plan plan{layer.shape, ChunkKv{score::SnapKv{{}}}, select::GroupedTopK{},
                  budget::Uniform{Budget::tokens_per_layer(28)}};
  Compressor compressor{plan};
  compressor.begin(108);
  const Selection best = compressor.select(0, compressor.score(0, layer.cache.view(), layer.observation()));
  const std::uint32_t chunk = best.rows(0)[0] / 20;
  const std::uint32_t other = chunk == 0 ? 70 : 10;
  const std::vector<std::uint32_t> listed{other};
  compressor.begin(108, {.positions = listed});
  const auto kept =
      compressor.select(0, compressor.score(0, layer.cache.view(), layer.observation())).rows(0);
  EXPECT_EQ(
      std::count_if(kept.begin(), kept.end(), [&](std::uint32_t row) { return row / 20 == other / 20; }), 1);
  EXPECT_EQ(std::count_if(kept.begin(), kept.end(), [&](std::uint32_t row) { return row / 20 == chunk; }),
            19);
}

/// A scorer whose scores are what the values of the first element say.
struct FirstElement : score::WindowScorer<Granularity::kv_head, Needs::keys_and_values> {
  using WindowScorer::WindowScorer;
  template <class Kv, class O, class X>
  void score(const kernel::LayerInput<Kv, O>& in, Workspace& workspace, X&,
             const Scores<Granularity::kv_head>& scores) const {
    const std::span<float> buffer = workspace.take(Workspace::Slot::key_rows, in.shape.head_dim);
    for (std::size_t head = 0; head < scores.rows(); ++head) {
      kernel::RowReader<kernel::Part::values, Kv>(in.kv, head, buffer.data())
          .read_to(scores.tokens(head),
                   [&](std::size_t t, const float* value) { scores.row(head)[t] = value[0]; });
    }
  }
};

TEST(ChunkKv, TheTokenThatIsNotFiniteIsNamed) {
  for (const float poison :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    Layer<float> layer({.kv_heads = 2, .rows = 108, .window = 8, .capacity = 40});
    layer.cache.values[layer.cache.value_at(1, 47, 0)] = poison;
    const Plan plan{layer.shape, ChunkKv{FirstElement{}}, select::GroupedTopK{},
                    budget::Uniform{Budget::tokens_per_layer(40)}};
    Compressor compressor{plan};
    compressor.begin(108);
    expect_error<ScoreError>([&] { compressor.compress(0, layer.cache.view()); },
                             {"score of layer 0 row 1 token 47 is"});
  }
}

TEST(ChunkKv, TakesItsRequirementsFromTheScorer) {
  using Snap = ChunkKv<score::SnapKv>;
  static_assert(score::Scorer<Snap> && Snap::needs == Needs::window_attention);
  static_assert(Snap::granularity == Granularity::kv_head);
  static_assert(ChunkKv<score::Tova>::granularity == Granularity::layer);
  static_assert(ChunkKv<score::LagKv>::needs == Needs::keys_and_values);
  EXPECT_EQ(ChunkKv{score::Tova{}}.window(), 1U);
  EXPECT_EQ(ChunkKv{score::Knorm{{.window = 12}}}.window(), 12U);
  expect_error<ArgumentError>(
      [] {
        ChunkKv{score::SnapKv{}, {.chunk = 0}};
      },
      {"chunk is 0", "1 position or more"});
  const ModelShape shape{.layers = 2, .query_heads = 4, .kv_heads = 2, .head_dim = 8};
  expect_error<ArgumentError>(
      [&] {
        Plan(shape, ChunkKv{score::SemanticRetrieval{HeadRanking{{{0, 1, 2, 3}}}, {}}}, select::SharedTopK{},
             budget::Uniform{Budget::tokens_per_layer(16)});
      },
      {"layers"});
}

// ---- HeadMean ----

TEST(HeadMean, IsTheMeanOverKvHeads) {
  std::vector<LayerCase> cases = reference::layer_cases(10, 96);
  std::erase_if(cases, [](const LayerCase& c) { return c.rows > 800; });
  for (const LayerCase& c : cases) {
    SCOPED_TRACE(c);
    Layer<float> layer(c);
    const auto check = [&](const auto& scorer) {
      const Scored of_heads(scorer, layer);
      ScoreRows mean(1, std::vector<double>(of_heads.scores[0].size(), 0.0));
      for (const auto& row : of_heads.scores) {
        for (std::size_t t = 0; t < row.size(); ++t) {
          mean[0][t] += row[t] / static_cast<double>(of_heads.scores.size());
        }
      }
      reference::expect_scores(HeadMean{scorer}, layer, mean, 1e-6, 1e-30);
    };
    check(score::SnapKv{{.window = c.window}});
    check(score::LagKv{{.lag = 16, .window = c.window}});
    check(score::Cur{{.window = c.window}});
    check(ChunkKv{score::SnapKv{{.window = c.window}}});
  }
}

TEST(HeadMean, KeepsOneSetForAllKvHeads) {
  Layer<float> layer({.group = 2, .kv_heads = 3, .rows = 100, .window = 8, .capacity = 30});
  const Plan plan{layer.shape, HeadMean{ChunkKv{score::SnapKv{{}}}}, select::SharedTopK{},
                  budget::Uniform{Budget::tokens_per_layer(30)}};
  Compressor compressor{plan};
  compressor.begin(100);
  const Retained& kept = compressor.compress(0, layer.cache.view(), layer.observation());
  EXPECT_TRUE(kept.shared());
  EXPECT_EQ(kept.rows(), 30U);
}

}  // namespace
}  // namespace compresskv
