// Which blocks become free, and that those of another sequence are never written. What every view has in
// common, paged ones too: every_view_test.cpp.

#include <gtest/gtest.h>

#include <compresskv/compresskv.hpp>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "reference/cache.hpp"
#include "reference/errors.hpp"
#include "reference/layer_case.hpp"
#include "reference/pool.hpp"

namespace compresskv {
namespace {

using reference::Blocks;
using reference::Cache;
using reference::expect_error;
using reference::Pool;
using reference::Random;
using Rows = std::vector<std::uint32_t>;

Rows positions_of(const Retained& retained, std::size_t head = 0) {
  return {retained.positions(head).begin(), retained.positions(head).end()};
}

struct Sequence {
  Cache<float> cache{{.kv_heads = 2, .rows = 22, .head_dim = 4}, reference::Arrangement::head_token_dim};
  reference::SemanticPlan plan{{.layers = 1, .query_heads = 2, .kv_heads = 2, .head_dim = 4},
                               score::SemanticRetrieval{HeadRanking{{{0, 1}}}, {.heads_per_layer = 1}},
                               select::SharedTopK{},
                               budget::Uniform{Budget::tokens_per_layer(10)}};
  Random random{3};
  Pool pool;

  explicit Sequence(std::size_t block_rows) : pool(filled(), {.block_rows = block_rows}, random) {}

 private:
  const Cache<float>& filled() {
    cache.fill(random);
    return cache;
  }
};

TEST(PagedKv, BlocksBehindTheKeptRowsAreFree) {
  for (const std::size_t block_rows : {1U, 3U, 4U, 16U, 256U}) {
    Sequence s(block_rows);
    Compressor compressor{s.plan};
    compressor.begin(22);
    for (const std::size_t kept : {22U, 10U, 4U, 1U}) {
      Rows rows(kept);
      std::iota(rows.begin(), rows.end(), 0U);
      const auto view = s.pool.view();
      const auto free = view.free_blocks(compressor.compact(0, view, Selection::shared_by_heads(rows)));
      const std::size_t used = (kept + block_rows - 1) / block_rows;
      EXPECT_EQ(Blocks(free.begin(), free.end()),
                Blocks(s.pool.table.begin() + static_cast<std::ptrdiff_t>(used), s.pool.table.end()))
          << kept << " rows in blocks of " << block_rows;
      s.pool.shape.rows = kept;
      s.pool.table.resize(used);
    }
  }
}

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
  compressor.begin_turn(24);
  s.pool.table.resize(3);
  s.pool.set_rows({5, 11});
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
    EXPECT_TRUE(s.pool == before);
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
  EXPECT_TRUE(s.pool == before);
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
  expect_error<ArgumentError>([&] { view.copy_on_write(selection, unused, s.pool.table); },
                              {"copy_on_write's table is the view's own", "give another"});
}

// A table as engines keep it: one row of as many entries as a sequence may ever need.
TEST(PagedKv, EntriesBehindTheRowsAreNotLookedAt) {
  constexpr std::int32_t lowest = std::numeric_limits<std::int32_t>::min();
  constexpr std::int32_t highest = std::numeric_limits<std::int32_t>::max();
  Rows kept(10);
  std::iota(kept.begin(), kept.end(), 12U);
  const Selection selection = Selection::shared_by_heads(kept);
  for (const Blocks& tail :
       {Blocks{}, Blocks(9, -1), Blocks(9, 0), Blocks{lowest, highest, 14, 14}, Blocks{0, 1, 2, 3, 4}}) {
    for (const bool ragged : {false, true}) {
      SCOPED_TRACE(testing::PrintToString(tail));
      Sequence s(4);
      const Blocks used = s.pool.table;
      s.pool.table.insert(s.pool.table.end(), tail.begin(), tail.end());
      s.pool.table.insert(s.pool.table.end(), used.begin(), used.end());  // stale: once this sequence's own
      if (ragged) {  // the longest head decides, whatever `rows` says
        s.pool.shape.rows = 1000;
        s.pool.set_rows({22, 22});
      }
      s.pool.references.assign(s.pool.shape.pool_blocks, 2);
      for (const std::int32_t block : used) {
        s.pool.references[static_cast<std::size_t>(block)] = 1;
      }
      const auto view = s.pool.view();
      EXPECT_FALSE(view.shared(6)) << "of an entry that nothing uses";
      EXPECT_EQ(view.copies_needed(selection), 0U);
      Compressor compressor{s.plan};
      compressor.begin(22);
      const Retained& retained = compressor.compact(0, view, selection);
      EXPECT_TRUE(s.pool.holds(s.cache.compacted([&](std::size_t) { return kept; }), used, {10, 10}));
      const auto free = view.free_blocks(retained);
      EXPECT_EQ(Blocks(free.begin(), free.end()), Blocks(used.begin() + 3, used.end())) << "none of the tail";
    }
  }
}

TEST(PagedKv, CopyOnWriteTakesAndWritesOnlyWhatTheRowsNeed) {
  Sequence s(4);
  const Blocks used = s.pool.table;
  s.pool.references.assign(s.pool.shape.pool_blocks, 0);
  for (const std::int32_t block : used) {
    s.pool.references[static_cast<std::size_t>(block)] = 2;
  }
  Blocks unused;
  for (std::int32_t block = 0; static_cast<std::size_t>(block) < s.pool.shape.pool_blocks; ++block) {
    if (s.pool.references[static_cast<std::size_t>(block)] == 0) {
      unused.push_back(block);
    }
  }
  // The tail names the very blocks that are free: stale entries of a sequence that gave them back.
  s.pool.table.insert(s.pool.table.end(), unused.begin(), unused.end());
  const Rows rows{2, 4, 6, 8, 10};
  const Selection selection = Selection::shared_by_heads(rows);
  const auto view = s.pool.view();
  ASSERT_EQ(view.copies_needed(selection), 2U);
  Blocks table(8, -7);
  Compressor compressor{s.plan};
  compressor.begin(22);
  compressor.gather(0, view, selection, view.copy_on_write(selection, unused, table));
  EXPECT_TRUE(s.pool.holds(s.cache.compacted([&](std::size_t) { return rows; }), table, {5, 5}));
  EXPECT_TRUE(s.pool.holds(s.cache, used, {22, 22})) << "the other sequence reads what it read";
  EXPECT_EQ(table[6], -7) << "an entry a block of the rows, and no more";
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
  shape = good;
  shape.block_rows = std::size_t{1} << 63U;  // twice as many would be no rows at all
  expect_error<ArgumentError>(
      [&] {
        make(shape, {4, 0});
      },
      {"PagedKv keys: 2 KV heads of 9223372036854775808"});
  shape.block_rows = std::numeric_limits<std::size_t>::max();
  expect_error<ArgumentError>([&] { make(shape, {4, 0}); }, {"do not fit in memory"});
  shape = good;
  shape.rows = std::size_t{1} << 32U;
  shape.block_rows = std::size_t{1} << 31U;
  expect_error<ArgumentError>([&] { make(shape, table); },
                              {"PagedKv: 4294967296 rows in use", "at most 4294967295"});
  shape = good;
  shape.rows = std::numeric_limits<std::size_t>::max() - 1;  // rounding up to blocks would wrap
  expect_error<ArgumentError>([&] { make(shape, table); }, {"18446744073709551614 rows in use"});
  shape = good;
  shape.pool_blocks = std::size_t{1} << 31U;
  shape.value_block_stride = std::size_t{1} << 33U;
  expect_error<ArgumentError>([&] { make(shape, table); },
                              {"PagedKv values: block stride 8589934592 times 2147483648", "in memory"});
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
                              {"PagedKv keys: block stride is 31", "covers 32 units", "overlap"});
  expect_error<ArgumentError>(
      [&] { PagedKv(pool.data(), pool.data(), good, table, layout::Strides{.head = 15, .row = 4}); },
      {"PagedKv keys: head stride is 15", "covers 16"});
  expect_error<ArgumentError>([&] { PagedKv(pool.data(), pool.data(), good, table, layout::SplitDim{3}); },
                              {"PagedKv keys: chunks of 3 do not divide a row of 4 units"});
  const auto sized = [&](std::size_t key_units, std::size_t value_units) {
    PagedKv(std::span(pool).first(key_units), std::span(pool).first(value_units), good, table,
            layout::head_token_dim);
  };
  EXPECT_NO_THROW(sized(160, 160));
  expect_error<ArgumentError>([&] { sized(159, 160); },
                              {"PagedKv keys: 5 blocks at stride 32 reach 160 units, the pool has 159",
                               "give the whole pool, or lower pool_blocks"});
  expect_error<ArgumentError>([&] { sized(160, 0); }, {"PagedKv values: 5 blocks", "the pool has 0"});
  shape = good;
  shape.pool_blocks = std::size_t{1} << 60U;
  expect_error<ArgumentError>(
      [&] {
        make(shape, {1, 2, 3});
      },
      {"PagedKv keys: block stride 32 times 1152921504606846976", "in memory"});
  shape = good;
  shape.pool_blocks = 200000;  // never read: a view only points
  expect_error<ArgumentError>([&] { make(shape, {199999, 5, 199999}); }, {"block 199999 stands twice"});
  EXPECT_NO_THROW(make(shape, {199999, 5, 134463}));
}

TEST(PagedKv, BlocksWithGapsLieBehindEachOther) {
  std::vector<float> pool(1000);
  const PagedShape shape{.kv_heads = 2, .rows = 10, .head_dim = 4, .block_rows = 4, .pool_blocks = 5};
  const Blocks table{4, 0, 2};
  // The last row of a block ends 20 + 3 * 5 + 4 units behind the start of its first.
  const PagedKv view(pool.data(), pool.data(), shape, table, layout::Strides{.head = 20, .row = 5});
  EXPECT_EQ(view.key_run(1, 0).base, pool.data() + 4 * 39 + 20);
}

}  // namespace
}  // namespace compresskv
