// Every view crossed with every selector and with a scorer of each granularity: what a method makes of a
// cache does not depend on where its rows lie, not by one bit, and nothing but the kept rows is written.
//
// A new method is a struct and a place in `Methods`; a new layout is a line in `for_each_cache`; a new view a
// type with the members of `reference::Cache` that `result_of` asks for, and a line there.

#include <gtest/gtest.h>

#include <algorithm>
#include <compresskv/compresskv.hpp>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "reference/errors.hpp"
#include "reference/layer_case.hpp"
#include "reference/pool.hpp"
#include "reference/scattered_kv.hpp"

namespace compresskv {
namespace {

using reference::arranged;
using reference::Arrangement;
using reference::Cache;
using reference::Layer;
using reference::LayerCase;
using reference::LayoutFunction;
using reference::Pool;
using reference::PoolLayout;
using reference::Random;
using reference::ScatteredMemory;
using Rows = std::vector<std::uint32_t>;

// ---- methods: a scorer and a selector ----

score::SemanticRetrieval::Options retrieval(const LayerCase& c) {
  return {
      .heads_per_layer = c.heads_per_layer, .window = c.window, .pool = c.pool, .pool_width = c.pool_width};
}

budget::Uniform budget_of(const LayerCase& c) {
  return budget::Uniform{Budget::tokens_per_layer(c.capacity)};
}

struct SemanticRetrieval {
  static constexpr const char* name = "SemanticRetrieval";
  static auto plan(const Layer<float>& layer) {
    return Plan{layer.shape, score::SemanticRetrieval{HeadRanking{layer.ranking}, retrieval(layer.sizes)},
                select::SharedTopK{}, budget_of(layer.sizes)};
  }
};

struct StreamingLlm {
  static constexpr const char* name = "StreamingLlm";
  static auto plan(const Layer<float>& layer) {
    return Plan{layer.shape, score::StreamingLlm{{.sinks = 3, .window = layer.sizes.window}},
                select::SharedTopK{}, budget_of(layer.sizes)};
  }
};

struct GroupedRetrieval {
  static constexpr const char* name = "GroupedRetrieval";
  static auto plan(const Layer<float>& layer) {
    return Plan{layer.shape, score::GroupedRetrieval{HeadRanking{layer.ranking}, retrieval(layer.sizes)},
                select::GroupedTopK{}, budget_of(layer.sizes)};
  }
};

struct SnapKv {
  static constexpr const char* name = "SnapKv";
  static auto plan(const Layer<float>& layer) {
    return Plan{layer.shape, score::SnapKv{{.window = layer.sizes.window}}, select::GroupedTopK{},
                budget_of(layer.sizes)};
  }
};

struct AdaKv {
  static constexpr const char* name = "AdaKv";
  static auto plan(const Layer<float>& layer) {
    return Plan{layer.shape, score::SnapKv{{.window = layer.sizes.window}}, select::Adaptive{},
                budget_of(layer.sizes)};
  }
};

struct AdaCompressKv {
  static constexpr const char* name = "AdaCompressKv";
  static auto plan(const Layer<float>& layer) {
    return Plan{layer.shape, score::GroupedRetrieval{HeadRanking{layer.ranking}, retrieval(layer.sizes)},
                select::Adaptive{}, budget_of(layer.sizes)};
  }
};

struct Cake {
  static constexpr const char* name = "Cake";
  static auto plan(const Layer<float>& layer) {
    return Plan{layer.shape, score::Cake{{.window = layer.sizes.window}}, select::GroupedTopK{},
                budget_of(layer.sizes)};
  }
};

struct H2O {
  static constexpr const char* name = "H2O";
  static auto plan(const Layer<float>& layer) {
    return Plan{layer.shape, score::H2O{{.window = layer.sizes.window}}, select::GroupedTopK{},
                budget_of(layer.sizes)};
  }
};

struct Tova {
  static constexpr const char* name = "Tova";
  static auto plan(const Layer<float>& layer) {
    return Plan{layer.shape, score::Tova{}, select::SharedTopK{}, budget_of(layer.sizes)};
  }
};

struct Knorm {
  static constexpr const char* name = "Knorm";
  static auto plan(const Layer<float>& layer) {
    return Plan{layer.shape, score::Knorm{{.window = layer.sizes.window}}, select::GroupedTopK{},
                budget_of(layer.sizes)};
  }
};

struct KeyDiff {
  static constexpr const char* name = "KeyDiff";
  static auto plan(const Layer<float>& layer) {
    return Plan{layer.shape, score::KeyDiff{{.window = layer.sizes.window}}, select::GroupedTopK{},
                budget_of(layer.sizes)};
  }
};

struct RandomRows {
  static constexpr const char* name = "RandomRows";
  static auto plan(const Layer<float>& layer) {
    return Plan{layer.shape, score::Random{{.window = layer.sizes.window}}, select::GroupedTopK{},
                budget_of(layer.sizes)};
  }
};

using Methods = testing::Types<SemanticRetrieval, StreamingLlm, GroupedRetrieval, SnapKv, AdaKv,
                               AdaCompressKv, Cake, H2O, Tova, Knorm, KeyDiff, RandomRows>;

struct MethodNames {
  template <class M>
  static std::string GetName(int) {
    return M::name;
  }
};

// ---- views: the rows of one layer in the memory of each ----

/// `[dim / x][row][x]`, x a divisor of the row.
layout::Strides split(const layout::Extents& e) {
  return layout::SplitDim{e.units % 8 == 0 ? std::size_t{8} : std::size_t{2}}(e);
}

/// Calls `visit(name, memory)` with the rows of `layer` in each memory.
template <class Visit>
void for_each_cache(const Layer<float>& layer, Random& random, Visit&& visit) {
  const auto strided = [&](const char* name, const LayoutFunction& keys, const LayoutFunction& values) {
    KvShape shape = layer.cache.shape;
    shape.allocated_rows = shape.rows + random.below(4);
    const layout::Extents extents{
        .kv_heads = shape.kv_heads, .rows = shape.allocated_rows, .units = shape.head_dim};
    Cache<float> cache(shape, keys(extents), values(extents));
    for (std::size_t head = 0; head < shape.kv_heads; ++head) {
      for (std::size_t row = 0; row < shape.rows; ++row) {
        for (std::size_t dim = 0; dim < shape.head_dim; ++dim) {
          cache.keys[cache.at(head, row, dim)] = layer.cache.keys[layer.cache.at(head, row, dim)];
          cache.values[cache.value_at(head, row, dim)] =
              layer.cache.values[layer.cache.value_at(head, row, dim)];
        }
      }
    }
    visit(name, cache);
  };
  for (const Arrangement arrangement : reference::all_arrangements) {
    strided("strided, keys and values alike", arranged(arrangement), arranged(arrangement));
  }
  strided("strided, values transposed", layout::head_token_dim, layout::head_dim_token);
  strided("strided, keys by token, values transposed", layout::token_head_dim, layout::head_dim_token);
  strided("strided, keys split, values with gaps", split, arranged(Arrangement::padded_heads));
  strided("strided, keys transposed", layout::head_dim_token, layout::token_head_dim);

  for (const std::size_t block : {1U, 16U, 256U}) {
    const auto paged = [&](const char* name, PoolLayout layout) {
      layout.block_rows = block;
      visit((name + (", blocks of " + std::to_string(block))).c_str(), Pool(layer.cache, layout, random));
    };
    paged("paged, [head][row][dim]", {});
    paged("paged, [row][head][dim]", {.keys = layout::token_head_dim, .values = layout::token_head_dim});
    paged("paged, keys split, values transposed", {.keys = split, .values = layout::head_dim_token});
    paged("paged, keys and values in turns",
          {.keys = split, .values = layout::token_head_dim, .one_buffer = true});
    paged("paged, a pool for each head", {.heads_apart = true});
    paged("paged, gaps between rows",
          {.keys = arranged(Arrangement::padded_rows), .values = arranged(Arrangement::spread_dims)});
  }

  visit("scattered", ScatteredMemory<float>(layer.cache, random, 9, layer.cache.shape.head_dim));
  visit("scattered, split rows", ScatteredMemory<float>(layer.cache, random, 70, 3));
}

// ---- what must not depend on the view ----

struct Result {
  std::vector<float> scores;
  std::vector<Rows> rows;       // [kv_head], kept
  std::vector<Rows> positions;  // [kv_head], of the rows kept
  std::size_t next_position = 0;
  std::size_t bytes_freed = 0;

  friend bool operator==(const Result& a, const Result& b) {
    return reference::same_bytes(a.scores, b.scores) && a.rows == b.rows && a.positions == b.positions &&
           a.next_position == b.next_position && a.bytes_freed == b.bytes_freed;
  }
};

std::vector<Rows> positions_of(const Retained& retained, std::size_t kv_heads) {
  std::vector<Rows> lists;
  for (std::size_t head = 0; head < kv_heads; ++head) {
    const auto& positions = retained.positions(head);
    lists.emplace_back(positions.begin(), positions.end());
  }
  return lists;
}

/// Begins; where `before` is not empty each KV head then keeps the rows that it lists.
template <class P, class Memory>
Compressor<P> begun(const P& plan, const Layer<float>& layer, Memory& memory,
                    const std::vector<Rows>& before) {
  Compressor compressor{plan};
  compressor.begin(layer.sizes.rows);
  if (!before.empty()) {
    const Memory expected = memory.compacted([&](std::size_t head) { return before[head]; });
    compressor.compact(0, memory.view(), Selection::per_head(before));
    EXPECT_TRUE(memory == expected) << "the first, ragged selection";
    std::vector<std::size_t> lengths;
    for (const Rows& rows : before) {
      lengths.push_back(rows.size());
    }
    memory.set_rows(lengths);
  }
  return compressor;
}

/// Compresses what `memory` holds; checks that the kept rows moved as bytes and all else stayed.
template <class P, class Memory>
Result result_of(const P& plan, const Layer<float>& layer, Memory memory, const std::vector<Rows>& before) {
  const std::size_t kv_heads = layer.shape.kv_heads;
  auto compressor = begun(plan, layer, memory, before);
  Result result;
  const std::vector<Rows> old_positions = positions_of(compressor.retained(0), kv_heads);
  const Memory original = memory;
  const auto scores = compressor.score(0, memory.view(), layer.observation());
  result.scores.assign(scores.values().begin(), scores.values().end());
  const Selection& selection = compressor.select(0, scores);
  for (std::size_t head = 0; head < kv_heads; ++head) {
    const auto rows = selection.rows(head);
    result.rows.emplace_back(rows.begin(), rows.end());
  }
  EXPECT_TRUE(memory == original) << "scores and selections only read";

  const Retained& retained = compressor.compress(0, memory.view(), layer.observation());
  EXPECT_TRUE(memory == original.compacted([&](std::size_t head) { return result.rows[head]; }))
      << "the kept rows, byte for byte, and nothing else";
  result.positions = positions_of(retained, kv_heads);
  result.next_position = retained.next_position();
  result.bytes_freed = retained.bytes_freed();
  for (std::size_t head = 0; head < kv_heads; ++head) {
    Rows expected;
    for (const std::uint32_t row : result.rows[head]) {
      expected.push_back(old_positions[head][row]);
    }
    EXPECT_EQ(result.positions[head], expected) << "KV head " << head;
  }
  return result;
}

/// One set of rows for all heads cannot be had from heads of different lengths.
template <class P, class Memory>
void expect_refusal(const P& plan, const Layer<float>& layer, Memory memory,
                    const std::vector<Rows>& before) {
  auto compressor = begun(plan, layer, memory, before);
  const Memory original = memory;
  const auto positions = positions_of(compressor.retained(0), layer.shape.kv_heads);
  reference::expect_error<ArgumentError>(
      [&] { compressor.compress(0, memory.view(), layer.observation()); },
      {"rows, KV head 0 has ", "one set of rows for all heads needs equal lengths", "scores a KV head"});
  EXPECT_TRUE(memory == original);
  EXPECT_EQ(positions_of(compressor.retained(0), layer.shape.kv_heads), positions);
}

std::vector<LayerCase> cases() {
  std::vector<LayerCase> list{
      {.rows = 1, .window = 1, .capacity = 1},
      {.kv_heads = 2, .rows = 17, .window = 8, .capacity = 8},   // one row more than a block of 16
      {.kv_heads = 2, .rows = 16, .window = 8, .capacity = 30},  // all stay
      {.group = 3, .kv_heads = 3, .head_dim = 64, .rows = 300, .capacity = 60, .heads_per_layer = 4},
      {.group = 2, .kv_heads = 2, .head_dim = 12, .rows = 530, .capacity = 257, .heads_per_layer = 2}};
  Random random(31);
  for (std::size_t i = 0; i < 8; ++i) {
    LayerCase c;
    c.group = random.between(1, 3);
    c.kv_heads = random.between(1, 4);
    c.head_dim = random.pick(std::vector<std::size_t>{4, 8, 20, 64});
    c.rows = random.between(2, 200);
    c.window = random.pick(std::vector<std::size_t>{1, 2, 8, 13});
    c.capacity = random.between(c.window, std::max(c.window, c.rows));
    c.heads_per_layer = random.between(1, c.query_heads());
    c.pool = random.coin() ? kernel::Pool::average : kernel::Pool::max;
    c.seed = random.bits();
    list.push_back(c);
  }
  for (LayerCase& c : list) {
    // All queries are shown, for methods that want more than the window's.
    c.extra_queries = c.rows - c.observed();
  }
  return list;
}

template <class M>
struct EveryView : testing::Test {
  using P = decltype(M::plan(std::declval<const Layer<float>&>()));
  static constexpr Granularity granularity = P::scorer_type::granularity;

  /// Every view gives the plain cache's result.
  static void expect_one_result(const Layer<float>& layer, const std::vector<Rows>& before, Random& random) {
    const auto plan = M::plan(layer);
    const Result plain = result_of(plan, layer, layer.cache, before);
    std::size_t kept = 0;
    for (const Rows& rows : plain.rows) {
      kept += rows.size();
    }
    EXPECT_GT(kept, 0U);
    for_each_cache(layer, random, [&](const char* name, const auto& memory) {
      SCOPED_TRACE(name);
      EXPECT_TRUE(result_of(plan, layer, memory, before) == plain);
    });
  }
};
TYPED_TEST_SUITE(EveryView, Methods, MethodNames);

TYPED_TEST(EveryView, GivesThePlainCachesResult) {
  for (const LayerCase& c : cases()) {
    SCOPED_TRACE(c);
    const Layer<float> layer(c);
    Random random(c.seed);
    TestFixture::expect_one_result(layer, {}, random);
  }
}

TYPED_TEST(EveryView, TakesHeadsOfDifferentLengthsOrSaysThatItCannot) {
  for (const LayerCase& c : cases()) {
    SCOPED_TRACE(c);
    const Layer<float> layer(c);
    Random random(c.seed + 1);
    std::vector<Rows> before(c.kv_heads);
    for (Rows& rows : before) {
      const std::size_t of_four = random.between(1, 4);
      for (std::uint32_t row = 0; row < c.rows; ++row) {
        if (random.below(4) < of_four || row + 1 == c.rows) {
          rows.push_back(row);
        }
      }
    }
    const bool differ = std::any_of(before.begin(), before.end(),
                                    [&](const Rows& rows) { return rows.size() != before[0].size(); });
    if (TestFixture::granularity == Granularity::kv_head || !differ) {
      TestFixture::expect_one_result(layer, before, random);
      continue;
    }
    for_each_cache(layer, random, [&](const char* name, const auto& memory) {
      SCOPED_TRACE(name);
      expect_refusal(TypeParam::plan(layer), layer, memory, before);
    });
  }
}

}  // namespace
}  // namespace compresskv
