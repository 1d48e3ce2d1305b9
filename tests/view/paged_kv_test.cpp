// Paged caches give what contiguous ones give, bit for bit, and never write what another sequence reads.

#include <gtest/gtest.h>

#include <compresskv/compresskv.hpp>
#include <cstdint>
#include <numeric>
#include <vector>

#include "reference/cache.hpp"
#include "reference/errors.hpp"
#include "reference/layer_case.hpp"

namespace compresskv {
namespace {

using reference::Cache;
using reference::expect_error;
using reference::Random;
using Rows = std::vector<std::uint32_t>;
using Blocks = std::vector<std::int32_t>;

/// A pool, and a table of one sequence in it. Memory that no sequence holds is filled with noise.
struct Pool {
  PagedShape shape;
  layout::Strides key_strides;
  layout::Strides value_strides;
  Blocks table;
  Blocks references;
  bool one_buffer = false;  // blocks of keys and of values take turns in one pool
  std::vector<float> keys;
  std::vector<float> values;

  std::size_t block_size() const { return shape.kv_heads * shape.block_rows * shape.head_dim; }

  void allocate(Random& random) {
    keys.resize(shape.pool_blocks * block_size() * (one_buffer ? 2 : 1));
    values.resize(one_buffer ? 0 : keys.size());
    for (std::vector<float>* buffer : {&keys, &values}) {
      for (float& x : *buffer) {
        x = random.gaussian();
      }
    }
    if (one_buffer) {
      shape.key_block_stride = 2 * block_size();
      shape.value_block_stride = 2 * block_size();
    }
  }

  float* value_pool() { return one_buffer ? keys.data() + block_size() : values.data(); }

  PagedKv<float> view(std::span<const std::int32_t> blocks) {
    return {keys.data(), value_pool(), shape, blocks, key_strides, value_strides, references};
  }
  PagedKv<float> view() { return view(table); }

  /// The element of a row, told from the shape alone.
  float& at(bool key, const Blocks& blocks, std::size_t head, std::size_t row, std::size_t dim) {
    const layout::Strides& s = key ? key_strides : value_strides;
    const std::size_t chunk = s.chunk == 0 ? shape.head_dim : s.chunk;
    const auto block = static_cast<std::size_t>(blocks[row / shape.block_rows]);
    float* base = key ? keys.data() : value_pool();
    return base[block * block_size() * (one_buffer ? 2 : 1) + head * s.head + row % shape.block_rows * s.row +
                dim / chunk * s.chunk_stride + dim % chunk];
  }

  /// Fills the table's rows with those of a contiguous cache.
  void load(const Cache<float>& cache, const Blocks& blocks) {
    for (std::size_t head = 0; head < shape.kv_heads; ++head) {
      for (std::size_t row = 0; row < cache.shape.rows; ++row) {
        for (std::size_t dim = 0; dim < shape.head_dim; ++dim) {
          at(true, blocks, head, row, dim) = cache.keys[cache.at(head, row, dim)];
          at(false, blocks, head, row, dim) = cache.values[cache.at(head, row, dim)];
        }
      }
    }
  }

  /// Whether the first rows of each head are those of `cache`, bit for bit.
  bool holds(const Cache<float>& cache, const Blocks& blocks, const std::vector<std::size_t>& rows) {
    for (std::size_t head = 0; head < shape.kv_heads; ++head) {
      for (std::size_t row = 0; row < rows[head]; ++row) {
        for (std::size_t dim = 0; dim < shape.head_dim; ++dim) {
          if (at(true, blocks, head, row, dim) != cache.keys[cache.at(head, row, dim)] ||
              at(false, blocks, head, row, dim) != cache.values[cache.at(head, row, dim)]) {
            return false;
          }
        }
      }
    }
    return true;
  }

  bool same_bytes(const Pool& other) const {
    return reference::same_bytes(keys, other.keys) && reference::same_bytes(values, other.values);
  }
};

Blocks shuffled_blocks(std::size_t count, std::size_t pool_blocks, Random& random) {
  Blocks all(pool_blocks);
  std::iota(all.begin(), all.end(), 0);
  for (std::size_t i = pool_blocks; i > 1; --i) {
    std::swap(all[i - 1], all[random.below(i)]);
  }
  all.resize(count);
  return all;
}

Rows positions_of(const Retained& retained, std::size_t head = 0) {
  return {retained.positions(head).begin(), retained.positions(head).end()};
}

/// A pool that holds a sequence of `cache`'s rows in blocks anywhere.
Pool pool_of(const Cache<float>& cache, std::size_t block_rows, Random& random, bool one_buffer = false) {
  const std::size_t blocks = (cache.shape.rows + block_rows - 1) / block_rows;
  Pool pool;
  pool.shape = {.kv_heads = cache.shape.kv_heads,
                .rows = cache.shape.rows,
                .head_dim = cache.shape.head_dim,
                .block_rows = block_rows,
                .pool_blocks = 2 * blocks + 3};
  const layout::Extents block{
      .kv_heads = cache.shape.kv_heads, .rows = block_rows, .units = cache.shape.head_dim};
  pool.key_strides = layout::head_token_dim(block);
  pool.value_strides = layout::head_token_dim(block);
  pool.table = shuffled_blocks(blocks, pool.shape.pool_blocks, random);
  pool.one_buffer = one_buffer;
  pool.allocate(random);
  pool.load(cache, pool.table);
  return pool;
}

TEST(PagedKv, GivesWhatContiguousCachesGiveBitForBit) {
  reference::Layer<float> layer({.group = 2,
                                 .kv_heads = 3,
                                 .head_dim = 16,
                                 .rows = 301,
                                 .capacity = 77,
                                 .heads_per_layer = 3,
                                 .seed = 4});
  Compressor reference{layer.plan};
  reference.begin(301);
  const auto scores = reference.score(0, layer.cache.view(), layer.observation());
  const std::vector<float> expected(scores.values().begin(), scores.values().end());
  auto compacted = layer.cache;
  const Rows kept = positions_of(reference.compress(0, compacted.view(), layer.observation()));

  Random random(9);
  for (const std::size_t block_rows : {1U, 3U, 16U, 256U}) {
    const layout::Extents block{.kv_heads = 3, .rows = block_rows, .units = 16};
    const std::vector<layout::Strides> layouts{layout::head_token_dim(block), layout::token_head_dim(block),
                                               layout::head_dim_token(block), layout::SplitDim{8}(block),
                                               layout::SplitDim{2}(block)};
    for (std::size_t i = 0; i < layouts.size(); ++i) {
      for (const bool one_buffer : {false, true}) {
        SCOPED_TRACE(testing::Message() << "blocks of " << block_rows << ", layout " << i
                                        << (one_buffer ? ", one pool" : ", two pools"));
        Pool pool = pool_of(layer.cache, block_rows, random, one_buffer);
        pool.key_strides = layouts[i];
        pool.value_strides = layouts[(i + 1) % layouts.size()];
        pool.load(layer.cache, pool.table);
        Compressor compressor{layer.plan};
        compressor.begin(301);
        const auto paged = compressor.score(0, pool.view(), layer.observation());
        EXPECT_TRUE(reference::same_bytes({paged.values().begin(), paged.values().end()}, expected));
        Pool after = pool;
        after.load(compacted, after.table);
        const Retained& retained = compressor.compress(0, pool.view(), layer.observation());
        EXPECT_EQ(positions_of(retained), kept);
        EXPECT_TRUE(pool.same_bytes(after)) << "the rows are packed and nothing else is written";

        const auto free = pool.view().free_blocks(retained);
        const std::size_t used = (kept.size() + block_rows - 1) / block_rows;
        EXPECT_EQ(Blocks(free.begin(), free.end()),
                  Blocks(pool.table.begin() + static_cast<std::ptrdiff_t>(used), pool.table.end()));
      }
    }
  }
}

struct Sequence {
  Cache<float> cache{{.kv_heads = 2, .rows = 22, .head_dim = 4}, reference::Arrangement::head_token_dim};
  reference::SemanticPlan plan{{.layers = 1, .query_heads = 2, .kv_heads = 2, .head_dim = 4},
                               score::SemanticRetrieval{HeadRanking{{{0, 1}}}, {.heads_per_layer = 1}},
                               select::SharedTopK{},
                               budget::Uniform{Budget::tokens_per_layer(10)}};
  Random random{3};
  Pool pool;

  explicit Sequence(std::size_t block_rows) {
    cache.fill(random);
    pool = pool_of(cache, block_rows, random);
  }
};

TEST(PagedKv, BlocksAreFreeWhenNoHeadUsesThem) {
  Sequence s(4);  // six blocks
  Compressor compressor{s.plan};
  compressor.begin(22);
  const Retained& first = compressor.compact(
      0, s.pool.view(), Selection::per_head(std::vector<Rows>{{0, 3, 21}, {1, 2, 5, 6, 7, 8, 9, 20, 21}}));
  const auto free = s.pool.view().free_blocks(first);
  EXPECT_EQ(Blocks(free.begin(), free.end()), Blocks(s.pool.table.begin() + 3, s.pool.table.end()))
      << "KV head 1 keeps nine rows in three blocks";

  // The engine goes on with the ragged rows, two tokens later.
  const std::vector<std::size_t> rows{5, 11};
  s.pool.table.resize(3);
  s.pool.shape.head_rows = rows;
  const auto view = s.pool.view();
  EXPECT_EQ(view.run_count(0), 2U);
  EXPECT_EQ(view.key_run(0, 1).rows, 1U);
  EXPECT_EQ(view.run_count(1), 3U);
  EXPECT_EQ(view.value_run(1, 2).rows, 3U);
  const Retained& second =
      compressor.compact(0, view, Selection::per_head(std::vector<Rows>{{2, 3, 4}, {7, 8, 9, 10}}));
  EXPECT_EQ(positions_of(second, 0), (Rows{21, 22, 23}));
  EXPECT_EQ(positions_of(second, 1), (Rows{20, 21, 22, 23}));
  EXPECT_EQ(view.free_blocks(second).size(), 2U);
}

TEST(PagedKv, SharedBlocksAreNotWrittenInPlace) {
  Sequence s(4);
  s.pool.references.assign(s.pool.shape.pool_blocks, 1);
  s.pool.references[static_cast<std::size_t>(s.pool.table[1])] = 3;
  Compressor compressor{s.plan};
  compressor.begin(22);
  const Pool before = s.pool;
  const auto refused = [&](const Selection& selection) {
    expect_error<ArgumentError>([&] { compressor.compact(0, s.pool.view(), selection); },
                                {"PagedKv: block " + std::to_string(s.pool.table[1]),
                                 "rows from 4 of KV head ", "is shared by 3 sequences", "copy_on_write()"});
    EXPECT_TRUE(s.pool.same_bytes(before));
    EXPECT_EQ(compressor.retained(0).rows(), 22U);
  };
  refused(Selection::shared_by_heads(Rows{0, 1, 2, 3, 5, 6}));
  refused(Selection::shared_by_heads(Rows{1, 2, 3, 4, 5}));
  refused(Selection::per_head(std::vector<Rows>{{0, 1}, {0, 1, 2, 3, 4, 9}}));
  // What stays in place is not written, and what is behind the shared block may be.
  const Rows rows{0, 1, 2, 3, 4, 5, 6, 7, 10, 12};
  compressor.compact(0, s.pool.view(), Selection::shared_by_heads(rows));
  EXPECT_TRUE(s.pool.holds(s.cache.compacted([&](std::size_t) { return rows; }), s.pool.table, {10, 10}));
}

TEST(PagedKv, APromptThatStaysWholeMayShareAllItsBlocks) {
  Sequence s(4);
  s.pool.references.assign(s.pool.shape.pool_blocks, 2);
  s.pool.shape.rows = 10;
  s.pool.table.resize(3);
  Compressor compressor{s.plan};
  compressor.begin(10);
  const std::vector<float> queries(2 * 8 * 4);
  const Pool before = s.pool;
  EXPECT_EQ(compressor
                .compress(0, s.pool.view(),
                          QueryWindow(queries.data(), {.query_heads = 2, .queries = 8, .head_dim = 4}))
                .rows(),
            10U);
  EXPECT_TRUE(s.pool.same_bytes(before));
}

TEST(PagedKv, CopyOnWriteLeavesTheOtherSequenceAlone) {
  const std::vector<std::vector<Rows>> selections{
      {{0, 1, 2, 3, 4, 5, 9, 11, 12, 21}},                      // from the middle of block 1 on
      {{3, 4, 8, 13, 14, 15, 16, 20, 21}},                      // all blocks
      {{0, 1, 2, 3, 4, 5, 6, 7}},                               // nothing moves
      {{0, 2, 3, 21}, {0, 1, 2, 3, 4, 5, 6, 7, 8, 9}},          // one head stays in place, longer
      {{0, 1, 2, 3, 4}, {0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11}}};  // and shorter
  for (std::size_t i = 0; i < selections.size(); ++i) {
    SCOPED_TRACE(i);
    const bool ragged = selections[i].size() == 2;
    const Selection selection =
        ragged ? Selection::per_head(selections[i]) : Selection::shared_by_heads(selections[i][0]);
    Sequence s(4);
    // Another sequence shares the first three blocks, 12 rows.
    s.pool.references.assign(s.pool.shape.pool_blocks, 0);
    for (std::size_t block = 0; block < s.pool.table.size(); ++block) {
      s.pool.references[static_cast<std::size_t>(s.pool.table[block])] = block < 3 ? 2 : 1;
    }
    Blocks unused;
    for (std::size_t block = 0; block < s.pool.shape.pool_blocks; ++block) {
      if (s.pool.references[block] == 0) {
        unused.push_back(static_cast<std::int32_t>(block));
      }
    }
    const auto view = s.pool.view();
    const std::size_t needed = view.copies_needed(selection);
    EXPECT_EQ(needed, (std::vector<std::size_t>{2, 3, 0, 3, 2})[i]);
    Blocks table(s.pool.table.size());
    Compressor compressor{s.plan};
    compressor.begin(22);
    const Retained& kept = compressor.gather(
        0, view, selection, view.copy_on_write(selection, std::span(unused).first(needed), table));
    const auto expected =
        s.cache.compacted([&](std::size_t head) { return selections[i][ragged ? head : 0]; });
    EXPECT_TRUE(s.pool.holds(expected, table, {kept.rows(0), kept.rows(1)}));
    EXPECT_EQ(positions_of(kept, 1), selections[i].back());
    const Blocks shared(s.pool.table.begin(), s.pool.table.begin() + 3);
    EXPECT_TRUE(s.pool.holds(s.cache, shared, {12, 12})) << "the other sequence reads what it read";
  }
}

TEST(PagedKv, CopyOnWriteRejectsBlocksThatAreNotFree) {
  Sequence s(4);
  s.pool.references.assign(s.pool.shape.pool_blocks, 0);
  for (const std::int32_t block : s.pool.table) {
    s.pool.references[static_cast<std::size_t>(block)] = 2;
  }
  Blocks unused;
  for (std::int32_t block = 0; static_cast<std::size_t>(block) < s.pool.shape.pool_blocks; ++block) {
    if (s.pool.references[static_cast<std::size_t>(block)] == 0) {
      unused.push_back(block);
    }
  }
  const auto view = s.pool.view();
  const Selection selection = Selection::shared_by_heads(Rows{2, 4, 6, 8, 10});
  ASSERT_EQ(view.copies_needed(selection), 2U);
  Blocks table(6, -7);
  const auto copy = [&](const Blocks& blocks) { view.copy_on_write(selection, blocks, table); };
  expect_error<ArgumentError>([&] { copy({unused[0]}); },
                              {"copy_on_write needs 2 free blocks, got 1", "copies_needed()"});
  expect_error<ArgumentError>([&] { copy({unused[0], s.pool.table[5]}); }, {"is in use", "give free blocks"});
  expect_error<ArgumentError>([&] { copy({unused[0], unused[0]}); }, {"is in use"});
  expect_error<ArgumentError>([&] { copy({unused[0], 99}); }, {"block 99 is outside the pool"});
  s.pool.references[static_cast<std::size_t>(unused[1])] = 1;
  expect_error<ArgumentError>([&] { copy({unused[0], unused[1]}); }, {"is in use"});
  expect_error<ArgumentError>(
      [&] {
        view.copy_on_write(selection, Blocks{unused[0], unused[2]}, std::span(table).first(5));
      },
      {"table has room for 5 blocks, the old one has 6"});
  expect_error<ArgumentError>([&] { view.copies_needed(Selection::shared_by_heads(Rows{22})); },
                              {"keeps row 22"});
  EXPECT_EQ(table, Blocks(6, -7)) << "nothing was written";
}

TEST(PagedKv, RejectsWhatIsNoCache) {
  std::vector<float> pool(1000);
  const PagedShape good{.kv_heads = 2, .rows = 10, .head_dim = 4, .block_rows = 4, .pool_blocks = 5};
  const Blocks table{4, 0, 2};
  float* null = nullptr;
  const auto make = [&](const PagedShape& shape, const Blocks& blocks, const Blocks& references = {}) {
    PagedKv(pool.data(), pool.data(), shape, blocks, layout::head_token_dim, references);
  };
  EXPECT_NO_THROW(make(good, table));
  expect_error<ArgumentError>([&] { PagedKv(null, pool.data(), good, table, layout::head_token_dim); },
                              {"PagedKv: keys is null", "give the layer's pool"});
  expect_error<ArgumentError>([&] { PagedKv(pool.data(), null, good, table, layout::head_token_dim); },
                              {"PagedKv: values is null"});
  PagedShape shape = good;
  shape.block_rows = 0;
  expect_error<ArgumentError>([&] { make(shape, table); }, {"blocks of 0 rows in pools of 5 blocks"});
  shape = good;
  shape.head_dim = 0;
  expect_error<ArgumentError>([&] { make(shape, table); }, {"2 KV heads, 10 rows, head_dim 0"});
  shape = good;
  shape.rows = 13;
  expect_error<ArgumentError>([&] { make(shape, table); }, {"PagedKv: 13 rows in use, only 12 allocated"});
  expect_error<ArgumentError>([&] { make(good, {}); }, {"the block table is empty"});
  expect_error<ArgumentError>([&] { make(good, {4, 5, 2}); }, {"block 5 is outside the pool of 5 blocks"});
  expect_error<ArgumentError>([&] { make(good, {4, -1, 2}); }, {"block -1 is outside the pool"});
  expect_error<ArgumentError>(
      [&] {
        make(good, {4, 0, 4});
      },
      {"block 4 stands twice in the table", "again at place 2"});
  expect_error<ArgumentError>([&] { make(good, table, {1, 1}); }, {"2 references for a pool of 5 blocks"});
  shape = good;
  shape.key_block_stride = 31;
  expect_error<ArgumentError>([&] { make(shape, table); },
                              {"PagedKv key_block_stride is 31, a block has 32 units", "overlap"});
  expect_error<ArgumentError>(
      [&] { PagedKv(pool.data(), pool.data(), good, table, layout::Strides{.head = 15, .row = 4}); },
      {"PagedKv keys: head stride is 15", "covers 16"});
  expect_error<ArgumentError>([&] { PagedKv(pool.data(), pool.data(), good, table, layout::SplitDim{3}); },
                              {"PagedKv keys: chunks of 3 do not divide a row of 4 units"});
  shape = good;
  shape.pool_blocks = 200000;  // never read: a view only points
  expect_error<ArgumentError>([&] { make(shape, {199999, 5, 199999}); }, {"block 199999 stands twice"});
  EXPECT_NO_THROW(make(shape, {199999, 5, 134463}));
}

}  // namespace
}  // namespace compresskv
