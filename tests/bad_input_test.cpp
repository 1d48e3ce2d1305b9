// One table of bad inputs: each is an error that names the values, and leaves every byte of the caches and
// all that the compressors know as it was.

#include <gtest/gtest.h>

#include <compresskv/compresskv.hpp>
#include <cstdint>
#include <functional>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "message_of.hpp"
#include "reference/layer_case.hpp"
#include "reference/pool.hpp"

namespace compresskv {
namespace {

using reference::Blocks;
using reference::Cache;
using reference::Pool;
using reference::Random;
using reference::SemanticPlan;
using GroupedPlan = Plan<score::GroupedRetrieval, select::GroupedTopK, budget::Uniform>;
using Rows = std::vector<std::uint32_t>;
using Lengths = std::vector<std::size_t>;

constexpr float nan = std::numeric_limits<float>::quiet_NaN();
constexpr float inf = std::numeric_limits<float>::infinity();

constexpr ModelShape shape{.layers = 2, .query_heads = 4, .kv_heads = 2, .head_dim = 8};
constexpr std::size_t tokens = 40;
constexpr std::size_t window = 4;
constexpr KvShape kv_shape{.kv_heads = 2, .rows = tokens, .head_dim = 8};
constexpr std::size_t units = 2 * tokens * 8;  // of keys or values

/// Retrieval heads 1 and 2 of layer 0, one on each KV head; both on KV head 1 in layer 1.
const HeadRanking ranking{{{1, 2, 0, 3}, {3, 2, 0, 1}}};
const score::SemanticRetrieval::Options options{.heads_per_layer = 2, .window = window};
const budget::Uniform budget{Budget::tokens_per_layer(10)};
const SemanticPlan semantic{shape, score::SemanticRetrieval{ranking, options}, select::SharedTopK{}, budget};
const GroupedPlan grouped{shape, score::GroupedRetrieval{ranking, options}, select::GroupedTopK{}, budget};

/// What a `Retained` says, to compare.
struct Known {
  std::vector<Rows> positions;
  std::size_t next_position;
  std::size_t bytes_freed;
  bool shared;

  explicit Known(const Retained& retained)
      : next_position(retained.next_position()),
        bytes_freed(retained.bytes_freed()),
        shared(retained.shared()) {
    for (std::size_t head = 0; head < shape.kv_heads; ++head) {
      const auto& of_head = retained.positions(head);
      positions.emplace_back(of_head.begin(), of_head.end());
    }
  }
  friend bool operator==(const Known&, const Known&) = default;
};

struct Int8Memory {
  std::vector<std::int8_t> data = std::vector<std::int8_t>(units);
  std::vector<float> scales = std::vector<float>(2 * tokens, 0.02F);
  std::vector<float> zeros = std::vector<float>(2 * tokens, 1.0F);

  Int8Rows rows() { return {.data = data, .scales = scales, .zeros = zeros}; }
  friend bool operator==(const Int8Memory& a, const Int8Memory& b) {
    return a.data == b.data && reference::same_bytes(a.scales, b.scales) &&
           reference::same_bytes(a.zeros, b.zeros);
  }
};

/// All that a call may not change: one layer's rows in three caches, what is seen of it, and two compressors
/// that have begun and compressed layer 1.
struct World {
  Random random{5};
  Cache<float> cache{kv_shape, reference::Arrangement::head_token_dim};
  Pool pool{filled(), {.block_rows = 4}, random};
  Int8Memory int8_keys;
  Int8Memory int8_values;
  std::vector<float> queries = noise(4 * window * 8);
  std::vector<float> attention = noise(4 * window * tokens);
  std::vector<float> sums = noise(4 * tokens);
  std::vector<float> scores = noise(tokens - window);
  std::vector<std::size_t> score_ends{tokens - window};
  std::vector<std::size_t> score_windows{window};
  Scores<Granularity::layer> given_scores() { return {scores, score_ends, score_windows}; }
  Blocks new_table = Blocks(10, -7);
  Blocks bad_table;  // views point to it, and to lengths
  Lengths lengths;
  Compressor<SemanticPlan> compressor{semantic};
  Compressor<GroupedPlan> per_head{grouped};

  World() {
    for (std::int8_t& quant : int8_keys.data) {
      quant = static_cast<std::int8_t>(static_cast<int>(random.below(256)) - 128);
    }
    const auto layer_1 = [&](auto& any) {
      Cache<float> copy = cache;
      any.begin(tokens);
      any.compact(1, copy.view(), Selection::per_head(std::vector<Rows>{{1, 5, 20, 39}, {2, 38}}));
    };
    layer_1(compressor);
    layer_1(per_head);
  }

  std::span<float> keys() { return cache.keys; }
  std::span<float> values() { return cache.values; }
  QueryWindow<float> observation() const {
    return {queries.data(), {.query_heads = 4, .queries = window, .head_dim = 8}};
  }
  AttentionMatrix<float> matrix() const {
    return {attention.data(), {.query_heads = 4, .queries = window, .tokens = tokens}};
  }
  AttentionSums summed() const {
    return {sums.data(), {.query_heads = 4, .queries = window, .tokens = tokens}};
  }

  PagedKv<float> paged(const PagedShape& paged_shape, const Blocks& table) {
    return {pool.keys,        pool.values,        paged_shape,    table,
            pool.key_strides, pool.value_strides, pool.references};
  }

  Selection selection() const { return Selection::shared_by_heads(Rows{2, 4, 6, 8, 10}); }

  /// Blocks that no sequence uses, once the pool counts references.
  Blocks share_all_blocks() {
    pool.references.assign(pool.shape.pool_blocks, 0);
    for (const std::int32_t block : pool.table) {
      pool.references[static_cast<std::size_t>(block)] = 2;
    }
    Blocks unused;
    for (std::size_t block = 0; block < pool.shape.pool_blocks; ++block) {
      if (pool.references[block] == 0) {
        unused.push_back(static_cast<std::int32_t>(block));
      }
    }
    return unused;
  }

  /// What must be the same before and after.
  struct Snapshot {
    std::vector<std::vector<float>> floats;
    Int8Memory int8_keys;
    Int8Memory int8_values;
    Blocks new_table;
    Blocks table;
    Blocks references;
    std::vector<Known> known;
    Lengths capacities;

    friend bool operator==(const Snapshot& a, const Snapshot& b) {
      bool same = a.floats.size() == b.floats.size();
      for (std::size_t i = 0; same && i < a.floats.size(); ++i) {
        same = reference::same_bytes(a.floats[i], b.floats[i]);
      }
      return same && a.int8_keys == b.int8_keys && a.int8_values == b.int8_values &&
             a.new_table == b.new_table && a.table == b.table && a.references == b.references &&
             a.known == b.known && a.capacities == b.capacities;
    }
  };
  Snapshot snapshot() const {
    const auto capacities = compressor.capacities();
    return {.floats = {cache.keys, cache.values, pool.keys, pool.values, queries, attention, sums, scores},
            .int8_keys = int8_keys,
            .int8_values = int8_values,
            .new_table = new_table,
            .table = pool.table,
            .references = pool.references,
            .known = {Known(compressor.retained(0)), Known(compressor.retained(1)),
                      Known(per_head.retained(0)), Known(per_head.retained(1))},
            .capacities = {capacities.begin(), capacities.end()}};
  }

 private:
  const Cache<float>& filled() {
    cache.fill(random);
    return cache;
  }
  std::vector<float> noise(std::size_t count) {
    std::vector<float> values(count);
    for (float& x : values) {
      x = random.gaussian();
    }
    return values;
  }
};

struct BadInput {
  const char* name;
  std::vector<std::string> says;
  std::function<std::function<void()>(World&)> prepare;  // what goes wrong when it is called
};

/// A view that is wrong in itself: the call makes it and compresses by it.
template <class Make>
BadInput bad_view(const char* name, std::vector<std::string> says, Make make) {
  return {name, std::move(says),
          [make](World& w) { return [make, &w] { w.compressor.compress(0, make(w), w.observation()); }; }};
}

StridedKv<float> strided(World& w, const layout::Strides& keys, const layout::Strides& values) {
  return {w.keys(), w.values(), kv_shape, keys, values};
}
constexpr layout::Strides plain{.head = tokens * 8, .row = 8};

std::vector<BadInput> bad_strides() {
  return {
      bad_view("rows of keys overlap", {"StridedKv keys: row stride is 7", "covers 8", "rows would overlap"},
               [](World& w) { return strided(w, {.head = 320, .row = 7}, plain); }),
      bad_view("rows of values overlap", {"StridedKv values: row stride is 0", "covers 8"},
               [](World& w) { return strided(w, plain, {.head = 320, .row = 0}); }),
      bad_view("heads overlap", {"StridedKv keys: head stride is 319", "covers 320"},
               [](World& w) { return strided(w, {.head = 319, .row = 8}, plain); }),
      bad_view("transposed values overlap", {"StridedKv values: chunk stride is 39", "covers 40"},
               [](World& w) {
                 return strided(w, plain, {.head = 320, .row = 1, .chunk = 1, .chunk_stride = 39});
               }),
      bad_view("chunks that do not divide a row", {"StridedKv keys: chunks of 3", "8 units"},
               [](World& w) {
                 return strided(w, {.head = 320, .row = 3, .chunk = 3, .chunk_stride = 120}, plain);
               }),
      bad_view("keys leave their buffer", {"StridedKv keys", "40 rows reach 641 units", "the buffer has 640"},
               [](World& w) { return strided(w, {.head = 321, .row = 8}, plain); }),
      bad_view("values leave their buffer", {"StridedKv values", "reach 640 units", "the buffer has 639"},
               [](World& w) {
                 return StridedKv<float>(w.keys(), w.values().first(units - 1), kv_shape,
                                         layout::head_token_dim);
               }),
      bad_view("transposed rows leave their buffer", {"StridedKv keys", "reach 648 units", "has 640"},
               [](World& w) {
                 return strided(w, {.head = 328, .row = 1, .chunk = 1, .chunk_stride = 40}, plain);
               }),
      bad_view("strides that no memory has", {"StridedKv keys: head stride 4611686018427387904 times 2"},
               [](World& w) { return strided(w, {.head = std::size_t{1} << 62U, .row = 8}, plain); }),
      bad_view("int8 rows overlap", {"Int8Kv", "row stride is 7", "covers 8"},
               [](World& w) {
                 return Int8Kv(w.int8_keys.rows(), w.int8_values.rows(), kv_shape,
                               layout::Strides{.head = 320, .row = 7});
               }),
      bad_view("int8 values leave their buffer", {"Int8Kv values", "reach 640", "the buffer has 639"},
               [](World& w) {
                 Int8Rows values = w.int8_values.rows();
                 values.data = values.data.first(units - 1);
                 return Int8Kv(w.int8_keys.rows(), values, kv_shape, layout::head_token_dim);
               }),
      bad_view("too few scales", {"Int8Kv: keys have 79 scales and 80 zero points", "need 80 of each"},
               [](World& w) {
                 Int8Rows keys = w.int8_keys.rows();
                 keys.scales = keys.scales.first(79);
                 return Int8Kv(keys, w.int8_values.rows(), kv_shape, layout::head_token_dim);
               }),
  };
}

/// Heads of these lengths in memory for `allocated` rows.
StridedKv<float> ragged(World& w, const Lengths& lengths, std::size_t allocated = tokens) {
  w.lengths = lengths;
  return {w.keys(),
          w.values(),
          {.kv_heads = 2, .head_dim = 8, .allocated_rows = allocated, .head_rows = w.lengths},
          layout::head_token_dim,
          layout::head_token_dim};
}

std::vector<BadInput> bad_lengths() {
  return {
      bad_view("a head longer than its memory", {"StridedKv: 41 rows in use, only 40 allocated"},
               [](World& w) {
                 return ragged(w, {12, 41});
               }),
      bad_view("a head longer than the buffer", {"StridedKv keys", "41 rows reach 656", "has 640"},
               [](World& w) {
                 return ragged(w, {12, 41}, 0);
               }),
      bad_view("a head without rows", {"StridedKv: head_rows of KV head 1 is 0", "at least one row"},
               [](World& w) {
                 return ragged(w, {40, 0});
               }),
      bad_view("a length too few", {"StridedKv: 1 head_rows for 2 KV heads", "one length a head"},
               [](World& w) { return ragged(w, {40}); }),
      bad_view("a paged head longer than its blocks", {"PagedKv: 41 rows in use, only 40 allocated"},
               [](World& w) {
                 w.lengths = {12, 41};
                 PagedShape ragged = w.pool.shape;
                 ragged.head_rows = w.lengths;
                 return w.paged(ragged, w.pool.table);
               }),
      bad_view("an int8 head longer than its memory", {"Int8Kv: 41 rows in use, only 40 allocated"},
               [](World& w) {
                 w.lengths = {12, 41};
                 return Int8Kv(
                     w.int8_keys.rows(), w.int8_values.rows(),
                     {.kv_heads = 2, .head_dim = 8, .allocated_rows = tokens, .head_rows = w.lengths},
                     layout::head_token_dim);
               }),
      {"fewer rows than the layer holds",
       {"layer 1 KV head 0 has 3 rows, expected at least 4"},
       [](World& w) { return [&w] {
                        w.per_head.compress(1, ragged(w, {3, 2}), w.observation());
                      }; }},
      {"rows appended to one head only",
       {"layer 1 KV head 1 has 9 rows appended, KV head 0 has 8", "append every token to all heads"},
       [](World& w) { return [&w] {
                        w.per_head.compress(1, ragged(w, {12, 11}), w.observation());
                      }; }},
      {"one set of rows for heads of different lengths",
       {"KV head 1 of layer 1 has 10 rows, KV head 0 has 12", "equal lengths"},
       [](World& w) { return [&w] {
                        w.compressor.compress(1, ragged(w, {12, 10}), w.observation());
                      }; }},
  };
}

/// A table that differs from the sequence's in one place.
template <class Change>
auto paged_of(Change change) {
  return [change](World& w) {
    PagedShape paged = w.pool.shape;
    w.bad_table = w.pool.table;
    change(paged, w.bad_table);
    return w.paged(paged, w.bad_table);
  };
}

std::vector<BadInput> bad_blocks() {
  const auto copy = [](const char* name, std::vector<std::string> says, auto blocks_of) {
    return BadInput{name, std::move(says), [blocks_of](World& w) {
                      const Blocks unused = w.share_all_blocks();
                      return [&w, blocks = blocks_of(w, unused)] {
                        const auto view = w.pool.view();
                        w.compressor.gather(0, view, w.selection(),
                                            view.copy_on_write(w.selection(), blocks, w.new_table));
                      };
                    }};
  };
  return {
      bad_view("a block twice", {"PagedKv: block ", "stands twice in the table, again at place 7"},
               paged_of([](PagedShape&, Blocks& table) { table[7] = table[2]; })),
      bad_view("a block beyond the pool", {"PagedKv: block 23 is outside the pool of 23 blocks"},
               paged_of([](PagedShape&, Blocks& table) { table[9] = 23; })),
      bad_view("a negative block", {"PagedKv: block -1 is outside the pool of 23 blocks"},
               paged_of([](PagedShape&, Blocks& table) { table[0] = -1; })),
      bad_view("a table too short", {"PagedKv: 40 rows in use, only 36 allocated"},
               paged_of([](PagedShape&, Blocks& table) { table.pop_back(); })),
      bad_view("no table", {"PagedKv: the block table is empty"},
               paged_of([](PagedShape&, Blocks& table) { table.clear(); })),
      bad_view("blocks of keys overlap", {"PagedKv keys: block stride is 63", "covers 64"},
               paged_of([](PagedShape& paged, Blocks&) { paged.key_block_stride = 63; })),
      bad_view("blocks of values overlap", {"PagedKv values: block stride is 8", "rows would overlap"},
               paged_of([](PagedShape& paged, Blocks&) { paged.value_block_stride = 8; })),
      bad_view("a pool of keys too small",
               {"PagedKv keys: 24 blocks at stride 64 reach 1536 units, the pool has 1472"},
               paged_of([](PagedShape& paged, Blocks&) { paged.pool_blocks = 24; })),
      bad_view("a pool of values too small", {"PagedKv values: 23 blocks", "the pool has 1471"},
               [](World& w) {
                 return PagedKv<float>(w.pool.keys, std::span(w.pool.values).first(1471), w.pool.shape,
                                       w.pool.table, layout::head_token_dim);
               }),
      bad_view("references of another pool", {"PagedKv: 3 references for a pool of 23 blocks"},
               [](World& w) {
                 static const Blocks references{1, 1, 1};
                 return PagedKv<float>(w.pool.keys, w.pool.values, w.pool.shape, w.pool.table,
                                       layout::head_token_dim, references);
               }),
      {"a shared block in place",
       {"PagedKv: block ", "is shared by 2 sequences and would be written", "copy_on_write()"},
       [](World& w) {
         w.share_all_blocks();
         return [&w] { w.compressor.compress(0, w.pool.view(), w.observation()); };
       }},
      copy("too few blocks to copy to", {"copy_on_write needs 2 free blocks, got 1", "copies_needed()"},
           [](World&, const Blocks& unused) { return Blocks{unused[0]}; }),
      copy("a block to copy to that is in use", {"given to copy_on_write is in use", "give free blocks"},
           [](World& w, const Blocks& unused) {
             return Blocks{unused[0], w.pool.table[9]};
           }),
      copy("a block to copy to twice", {"given to copy_on_write is in use"},
           [](World&, const Blocks& unused) {
             return Blocks{unused[1], unused[1]};
           }),
      copy("a block to copy to beyond the pool", {"PagedKv: block 23 is outside the pool of 23 blocks"},
           [](World&, const Blocks& unused) {
             return Blocks{unused[0], 23};
           }),
  };
}

std::vector<BadInput> bad_observations() {
  std::vector<BadInput> list;
  // Each for both methods.
  const auto add = [&](const char* name, std::vector<std::string> says, auto observation) {
    list.push_back({name, says, [observation](World& w) {
                      return [&w, observation] { w.compressor.compress(0, w.cache.view(), observation(w)); };
                    }});
    list.push_back({name, says, [observation](World& w) {
                      return [&w, observation] { w.per_head.compress(0, w.cache.view(), observation(w)); };
                    }});
  };
  const auto queries = [](const QueryShape& query) {
    return [query](World& w) { return QueryWindow<float>(w.queries.data(), query); };
  };
  add("fewer queries than the window", {"observation shows 3 queries", "the last 4"}, queries({4, 3, 8}));
  add("queries of another number of heads", {"observation has 2 query heads", "the plan's model has 4"},
      queries({2, 4, 8}));
  add("queries of another length", {"queries have 4 elements", "head_dim is 8"}, queries({4, 4, 4}));
  const auto matrix = [](const AttentionShape& attention) {
    return [attention](World& w) { return AttentionMatrix<float>(w.attention.data(), attention); };
  };
  add("attention of fewer queries", {"observation shows 3 queries", "the last 4"}, matrix({4, 3, 40}));
  add("attention to fewer rows", {"attention has 39 columns, the layer has 40 rows"}, matrix({4, 4, 39}));
  add("attention of other heads", {"observation has 3 query heads"}, matrix({3, 4, 40}));
  const auto sums = [](const AttentionShape& attention) {
    return [attention](World& w) { return AttentionSums(w.sums.data(), attention); };
  };
  add("sums over fewer queries", {"attention sums are over 3 queries, the window has 4"}, sums({4, 3, 40}));
  add("sums of fewer rows", {"attention has 39 columns"}, sums({4, 4, 39}));
  return list;
}

std::vector<BadInput> no_numbers() {
  std::vector<BadInput> list;
  for (const float poison : {nan, inf, -inf}) {
    const auto add = [&](const char* name, std::vector<std::string> says, auto place, auto call) {
      list.push_back({name, std::move(says), [poison, place, call](World& w) {
                        place(w) = poison;
                        return [&w, call] { call(w); };
                      }});
    };
    const auto by_queries = [](World& w) { w.compressor.compress(0, w.cache.view(), w.observation()); };
    const auto by_queries_per_head = [](World& w) {
      w.per_head.compress(0, w.cache.view(), w.observation());
    };
    const auto key = [](World& w) -> float& { return w.cache.keys[w.cache.at(1, 11, 3)]; };
    // An infinite key draws all attention or none: the sums over its head are then no numbers, at any token.
    const std::vector<std::string> key_says{"score of layer 0 query head 2 token ", "finite"};
    add("keys", key_says, key, by_queries);
    add("keys, a head", key_says, key, by_queries_per_head);
    add(
        "keys of the window", key_says, [](World& w) -> float& { return w.cache.keys[w.cache.at(1, 38, 3)]; },
        by_queries);
    add(
        "keys in pages", key_says, [](World& w) -> float& { return w.pool.key(w.pool.table, 1, 11, 3); },
        [](World& w) { w.compressor.compress(0, w.pool.view(), w.observation()); });
    add(
        "scales of int8 keys", key_says, [](World& w) -> float& { return w.int8_keys.scales[tokens + 11]; },
        [](World& w) {
          w.compressor.compress(
              0, Int8Kv(w.int8_keys.rows(), w.int8_values.rows(), kv_shape, layout::head_token_dim),
              w.observation());
        });
    const auto query = [](World& w) -> float& { return w.queries[(1 * window + 2) * 8 + 5]; };
    add("queries", {"score of layer 0 query head 1 token ", "finite"}, query, by_queries);
    add("queries, a head", {"score of layer 0 query head 1 token ", "finite"}, query, by_queries_per_head);
    const auto weight = [](World& w) -> float& { return w.attention[(1 * window + 2) * tokens + 11]; };
    const std::vector<std::string> attention_says{"score of layer 0", "token", "finite"};
    add("attention", attention_says, weight,
        [](World& w) { w.compressor.compress(0, w.cache.view(), w.matrix()); });
    add("attention, a head", attention_says, weight,
        [](World& w) { w.per_head.compress(0, w.cache.view(), w.matrix()); });
    add("attention alone", attention_says, weight, [](World& w) { w.compressor.select(0, w.matrix()); });
    const auto sum = [](World& w) -> float& { return w.sums[1 * tokens + 11]; };
    add("sums", attention_says, sum, [](World& w) { w.compressor.compress(0, w.cache.view(), w.summed()); });
    add("sums, a head", attention_says, sum,
        [](World& w) { w.per_head.compress(0, w.cache.view(), w.summed()); });
    add("sums alone", attention_says, sum, [](World& w) { w.compressor.select(0, w.summed()); });
    add(
        "scores", {"score of layer 0 row 0 token 9 is ", "must be finite", "nothing was changed"},
        [](World& w) -> float& { return w.scores[9]; },
        [](World& w) { w.compressor.select(0, w.given_scores()); });
    list.push_back(
        {"ranks' scores", {"score of layer 0 row 1 token 0 is ", "must be finite"}, [poison](World& w) {
           return [&w, poison] {
             w.per_head.compress(0, w.cache.view(), w.observation(),
                                 [&](std::span<float> scores) { scores[tokens - window] = poison; });
           };
         }});
  }
  return list;
}

std::vector<BadInput> bad_heads() {
  const auto plan = [](ModelShape model) {
    return [model](World&) {
      return [model] { Plan(model, score::StreamingLlm{}, select::SharedTopK{}, budget); };
    };
  };
  return {
      {"KV heads that do not divide the query heads",
       {"query_heads is 4", "multiple of kv_heads 3"},
       plan({.layers = 2, .query_heads = 4, .kv_heads = 3, .head_dim = 8})},
      {"more KV heads than query heads",
       {"query_heads is 2", "multiple of kv_heads 4"},
       plan({.layers = 2, .query_heads = 2, .kv_heads = 4, .head_dim = 8})},
      {"no KV heads", {"kv_heads", "0"}, plan({.layers = 2, .query_heads = 2, .kv_heads = 0, .head_dim = 8})},
      bad_view("a view of more KV heads", {"kv view has 4 KV heads, the plan's model has 2"},
               [](World& w) {
                 return StridedKv<float>(w.keys(), w.values(),
                                         KvShape{.kv_heads = 4, .rows = 20, .head_dim = 8},
                                         layout::head_token_dim);
               }),
      bad_view("a view of other rows", {"kv view has rows of 4 elements", "head_dim is 8"},
               [](World& w) {
                 return StridedKv<float>(w.keys(), w.values(),
                                         KvShape{.kv_heads = 2, .rows = tokens, .head_dim = 4},
                                         layout::head_token_dim);
               }),
      {"a selection of one head",
       {"selection has lists for 1 KV heads, the layer has 2"},
       [](World& w) {
         return [&w] {
           w.compressor.compact(0, w.cache.view(), Selection::per_head(std::vector<Rows>{{0, 1}}));
         };
       }},
  };
}

/// Positions that a compressor gives when all goes well from here on.
template <class C>
std::vector<Rows> goes_on(C compressor) {
  World well;
  return Known(compressor.compress(0, well.cache.view(), well.observation())).positions;
}

void expect_refused(const std::vector<BadInput>& inputs) {
  const World clean;
  const auto expected = goes_on(clean.compressor);
  const auto expected_per_head = goes_on(clean.per_head);
  for (const BadInput& input : inputs) {
    SCOPED_TRACE(input.name);
    World world;
    const auto call = input.prepare(world);
    const World::Snapshot before = world.snapshot();
    const std::string message = test::message_of<Error>(call);
    for (const std::string& part : input.says) {
      EXPECT_TRUE(test::says(message, {part}));
    }
    EXPECT_TRUE(world.snapshot() == before) << "something was changed";
    EXPECT_EQ(goes_on(world.compressor), expected);
    EXPECT_EQ(goes_on(world.per_head), expected_per_head);
  }
}

TEST(BadInput, Strides) { expect_refused(bad_strides()); }
TEST(BadInput, LengthsOfHeads) { expect_refused(bad_lengths()); }
TEST(BadInput, Blocks) { expect_refused(bad_blocks()); }
TEST(BadInput, Observations) { expect_refused(bad_observations()); }
TEST(BadInput, NoNumbers) { expect_refused(no_numbers()); }
TEST(BadInput, CountsOfHeads) { expect_refused(bad_heads()); }

}  // namespace
}  // namespace compresskv
