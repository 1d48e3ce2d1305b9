#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <compresskv/compresskv.hpp>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "reference/cache.hpp"
#include "reference/errors.hpp"
#include "reference/layer_case.hpp"
#include "reference/pool.hpp"
#include "reference/random.hpp"
#include "reference/scattered_kv.hpp"

// Every view crossed with methods: what a method makes of a cache does not depend on where its rows lie, not
// by one bit, and nothing but the kept rows is written.
//
// A new method is a struct and a place in a list of methods in view/every_view*_test.cpp; a new layout is a
// line in `Memories`; a new view a member there, of a type with those members of `Cache` that `result_of`
// asks for.

namespace compresskv::reference {

using Rows = std::vector<std::uint32_t>;

// ---- what methods are made from ----

inline score::SemanticRetrieval::Options retrieval(const LayerCase& c) {
  return {
      .heads_per_layer = c.heads_per_layer, .window = c.window, .pool = c.pool, .pool_width = c.pool_width};
}

inline budget::Uniform budget_of(const LayerCase& c) {
  return budget::Uniform{Budget::tokens_per_layer(c.capacity)};
}

struct MethodNames {
  template <class M>
  static std::string GetName(int) {
    return M::name;
  }
};

// ---- views: the rows of one layer in the memory of each ----

/// `[dim / x][row][x]`, x a divisor of the row.
inline layout::Strides split(const layout::Extents& e) {
  return layout::SplitDim{e.units % 8 == 0 ? std::size_t{8} : std::size_t{2}}(e);
}

/// The rows of a layer in each memory, with its name.
struct Memories {
  template <class Memory>
  using Named = std::vector<std::pair<std::string, Memory>>;

  Named<Cache<float>> strided;
  Named<Pool> paged;
  Named<ScatteredMemory<float>> scattered;

  Memories(const Layer<float>& layer, Random& random) {
    for (const Arrangement arrangement : all_arrangements) {
      add_strided(layer, random, "keys and values alike", arranged(arrangement), arranged(arrangement));
    }
    add_strided(layer, random, "values transposed", layout::head_token_dim, layout::head_dim_token);
    add_strided(layer, random, "keys by token, values transposed", layout::token_head_dim,
                layout::head_dim_token);
    add_strided(layer, random, "keys split, values with gaps", split, arranged(Arrangement::padded_heads));
    add_strided(layer, random, "keys transposed", layout::head_dim_token, layout::token_head_dim);

    for (const std::size_t block : {1U, 16U, 256U}) {
      const auto add_paged = [&](const std::string& name, PoolLayout layout) {
        layout.block_rows = block;
        paged.emplace_back("paged, blocks of " + std::to_string(block) + ", " + name,
                           Pool(layer.cache, layout, random));
      };
      add_paged("[head][row][dim]", {});
      add_paged("[row][head][dim]", {.keys = layout::token_head_dim, .values = layout::token_head_dim});
      add_paged("keys split, values transposed", {.keys = split, .values = layout::head_dim_token});
      add_paged("keys and values in turns",
                {.keys = split, .values = layout::token_head_dim, .one_buffer = true});
      add_paged("a pool for each head", {.heads_apart = true});
      add_paged("gaps between rows",
                {.keys = arranged(Arrangement::padded_rows), .values = arranged(Arrangement::spread_dims)});
    }

    scattered.emplace_back("scattered",
                           ScatteredMemory<float>(layer.cache, random, 9, layer.cache.shape.head_dim));
    scattered.emplace_back("scattered, split rows", ScatteredMemory<float>(layer.cache, random, 70, 3));
  }

  /// Calls `check(memory)` with each.
  template <class Check>
  void each(Check&& check) const {
    const auto all_of = [&](const auto& memories) {
      for (const auto& [name, memory] : memories) {
        SCOPED_TRACE(name);
        check(memory);
      }
    };
    all_of(strided);
    all_of(paged);
    all_of(scattered);
  }

 private:
  void add_strided(const Layer<float>& layer, Random& random, const std::string& name,
                   const LayoutFunction& keys, const LayoutFunction& values) {
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
    strided.emplace_back("strided, " + name, std::move(cache));
  }
};

// ---- what must not depend on the view ----

struct Result {
  std::vector<float> scores;
  std::vector<Rows> rows;       // [kv_head], kept
  std::vector<Rows> positions;  // [kv_head], of the rows kept
  std::size_t next_position = 0;
  std::size_t bytes_freed = 0;

  friend bool operator==(const Result& a, const Result& b) {
    return same_bytes(a.scores, b.scores) && a.rows == b.rows && a.positions == b.positions &&
           a.next_position == b.next_position && a.bytes_freed == b.bytes_freed;
  }
};

inline std::vector<Rows> positions_of(const Retained& retained, std::size_t kv_heads) {
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
  expect_error<ArgumentError>(
      [&] { compressor.compress(0, memory.view(), layer.observation()); },
      {"rows, KV head 0 has ", "one set of rows for all heads needs equal lengths", "scores a KV head"});
  EXPECT_TRUE(memory == original);
  EXPECT_EQ(positions_of(compressor.retained(0), layer.shape.kv_heads), positions);
}

inline std::vector<LayerCase> every_view_cases() {
  std::vector<LayerCase> list{
      {.rows = 1, .window = 1, .capacity = 1},
      {.kv_heads = 2, .rows = 17, .window = 8, .capacity = 8},   // one row more than a block of 16
      {.kv_heads = 2, .rows = 16, .window = 8, .capacity = 30},  // all stay
      {.group = 3, .kv_heads = 3, .head_dim = 64, .rows = 150, .capacity = 60, .heads_per_layer = 4},
      {.group = 2, .kv_heads = 2, .head_dim = 12, .rows = 270, .capacity = 130, .heads_per_layer = 2}};
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
    c.pool = static_cast<kernel::Pool>(random.between(0, 2));
    c.seed = random.bits();
    list.push_back(c);
  }
  for (LayerCase& c : list) {
    // All queries are shown, for methods that want more than the window's.
    c.extra_queries = c.rows - c.observed();
  }
  return list;
}

// ---- the tests ----

/// Every view gives the plain cache's result, or the same refusal.
template <class M>
void expect_one_result(const Layer<float>& layer, const std::vector<Rows>& before, Random& random) {
  const auto plan = M::plan(layer);
  const Memories memories(layer, random);
  if constexpr (decltype(M::plan(layer))::scorer_type::granularity == Granularity::layer) {
    if (std::any_of(before.begin(), before.end(),
                    [&](const Rows& rows) { return rows.size() != before[0].size(); })) {
      memories.each([&](const auto& memory) { expect_refusal(plan, layer, memory, before); });
      return;
    }
  }
  const Result plain = result_of(plan, layer, layer.cache, before);
  EXPECT_FALSE(plain.rows[0].empty());
  memories.each([&](const auto& memory) { EXPECT_TRUE(result_of(plan, layer, memory, before) == plain); });
}

/// Of whole caches.
template <class M>
void expect_one_result_of_all_views() {
  for (const LayerCase& c : every_view_cases()) {
    SCOPED_TRACE(c);
    Random random(c.seed);
    expect_one_result<M>(Layer<float>(c), {}, random);
  }
}

/// After each KV head lost rows of its own: heads then differ in length.
template <class M>
void expect_one_result_of_all_ragged_views() {
  for (const LayerCase& c : every_view_cases()) {
    SCOPED_TRACE(c);
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
    expect_one_result<M>(Layer<float>(c), before, random);
  }
}

}  // namespace compresskv::reference
