// Two promises: from the second sequence of the same shape on nothing is allocated, and all that a compressor
// holds stays within 1 % of the model's cache.

#include <gtest/gtest.h>
#include <malloc.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <compresskv/compresskv.hpp>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <numeric>
#include <vector>

#include "reference/allocations.hpp"
#include "reference/cache.hpp"
#include "reference/random.hpp"

namespace compresskv::reference {

std::atomic<std::size_t> allocations{0};
std::atomic<std::size_t> alive{0};
std::atomic<std::size_t> most_alive{0};
std::atomic<std::size_t> failing_allocation{0};

}  // namespace compresskv::reference

namespace {

using compresskv::reference::alive;
using compresskv::reference::allocations;
using compresskv::reference::failing_allocation;
using compresskv::reference::most_alive;

void* counted(std::size_t size, std::size_t alignment) {
  if (++allocations == failing_allocation) {
    throw std::bad_alloc();
  }
  const std::size_t rounded = (std::max<std::size_t>(size, 1) + alignment - 1) / alignment * alignment;
  if (void* memory = std::aligned_alloc(alignment, rounded)) {
    alive += malloc_usable_size(memory);
    most_alive = std::max(most_alive.load(), alive.load());
    return memory;
  }
  throw std::bad_alloc();
}

void counted_free(void* memory) {
  alive -= memory == nullptr ? 0 : malloc_usable_size(memory);
  std::free(memory);
}

}  // namespace

// The whole test program allocates through these; the array forms end up here as well (with
// a sanitizer, in the sanitizer's own). Not inlined, as g++ 12
// would else see `free` of what came from `new` and warn.
[[gnu::noinline]] void* operator new(std::size_t size) { return counted(size, alignof(std::max_align_t)); }
[[gnu::noinline]] void* operator new(std::size_t size, std::align_val_t alignment) {
  return counted(size, static_cast<std::size_t>(alignment));
}
[[gnu::noinline]] void* operator new(std::size_t size, const std::nothrow_t&) noexcept {
  try {
    return counted(size, alignof(std::max_align_t));
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { counted_free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::size_t) noexcept { counted_free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::align_val_t) noexcept { counted_free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::size_t, std::align_val_t) noexcept {
  counted_free(memory);
}

namespace compresskv {
namespace {

using reference::Cache;
using reference::Random;

template <class T>
struct Memory : testing::Test {};
using Elements = testing::Types<float, half, bfloat16>;
TYPED_TEST_SUITE(Memory, Elements);

HeadRanking ranking_of(const ModelShape& shape) {
  std::vector<std::uint32_t> heads(shape.query_heads);
  std::iota(heads.begin(), heads.end(), 0U);
  return HeadRanking(std::vector<std::vector<std::uint32_t>>(shape.layers, heads));
}

TYPED_TEST(Memory, TheSecondSequenceAllocatesNothing) {
  constexpr ModelShape shape{.layers = 3, .query_heads = 6, .kv_heads = 2, .head_dim = 24};
  constexpr std::size_t tokens = 300;
  const LayerErrors errors({0.6, 0.3, 0.1}, {});
  // One capacity is above the prompt's length, so that a layer stays whole; one has the least.
  for (const std::size_t mean : {40U, 200U, 299U}) {
    const Plan plan{shape, score::SemanticRetrieval{ranking_of(shape), {}}, select::SharedTopK{},
                    budget::ErrorAware{errors, Budget::tokens_per_layer(mean)}};
    Cache<TypeParam> original({.kv_heads = 2, .rows = tokens, .head_dim = 24, .allocated_rows = tokens + 20},
                              reference::Arrangement::head_token_dim);
    Random random(1);
    original.fill(random);
    std::vector<TypeParam> queries(6 * 8 * 24, static_cast<TypeParam>(0.5F));
    const QueryWindow<TypeParam> observation(queries.data(),
                                             {.query_heads = 6, .queries = 8, .head_dim = 24});
    std::vector<float> weights(6 * 8 * tokens, 0.01F);
    const AttentionMatrix<float> attention(weights.data(),
                                           {.query_heads = 6, .queries = 8, .tokens = tokens});
    Cache<TypeParam> cache = original;
    const auto view_of = [&](std::size_t rows) {
      KvShape now = cache.shape;
      now.rows = rows;
      return StridedKv<TypeParam>(cache.keys.data(), cache.values.data(), now, cache.strides);
    };
    // By queries; the same layer again after it has grown; by attention; by a selection from outside.
    const auto sequence = [&](Compressor<std::remove_const_t<decltype(plan)>>& compressor,
                              const Selection& selection) {
      compressor.begin(tokens);
      const std::size_t rows = compressor.compress(0, view_of(tokens), observation).rows();
      compressor.begin_turn(tokens + 10);
      compressor.compress(0, view_of(std::min(rows + 10, tokens)), observation);
      compressor.compress(1, view_of(tokens), attention);
      compressor.score(2, view_of(tokens), observation);
      compressor.compact(2, view_of(tokens), selection);
    };
    std::vector<std::uint32_t> best(30);
    std::iota(best.begin(), best.end(), 100U);
    const Selection shared = Selection::shared_by_heads(best);
    const Selection split = Selection::per_head(std::vector<std::vector<std::uint32_t>>(2, best));
    Compressor compressor{plan};
    for (const Selection* selection : {&shared, &split}) {
      for (int repeat = 0; repeat < 3; ++repeat) {
        std::copy(original.keys.begin(), original.keys.end(), cache.keys.begin());
        const std::size_t before = allocations;
        sequence(compressor, *selection);
        const std::size_t made = allocations - before;
        if (repeat == 0) {
          continue;
        }
        EXPECT_EQ(made, 0U) << "mean " << mean << ", repeat " << repeat;
      }
    }
  }
}

TEST(Memory, TurnsOnPagedCachesAllocateNothingOnceTheirSizesWereSeen) {
  constexpr std::size_t tokens = 120;
  constexpr std::size_t block_rows = 16;
  const Plan plan{ModelShape{.layers = 1, .query_heads = 6, .kv_heads = 2, .head_dim = 24},
                  score::GroupedRetrieval{HeadRanking{{{0, 4, 1, 2}}}, {.heads_per_layer = 3}},
                  select::GroupedTopK{}, budget::Uniform{Budget::kept_ratio(0.25)}};
  std::vector<std::int32_t> table(tokens / block_rows + 1);
  std::iota(table.rbegin(), table.rend(), 0);
  std::vector<float> original(table.size() * 2 * block_rows * 24);
  Random random(2);
  for (float& x : original) {
    x = random.gaussian();
  }
  std::vector<float> queries(6 * 8 * 24, 0.5F);
  const QueryShape query_shape{.query_heads = 6, .queries = 8, .head_dim = 24, .sliding_window = 50};
  const QueryWindow<float> observation(queries.data(), query_shape);
  const std::vector<std::uint32_t> listed{7, 30};
  std::vector<float> keys;
  const auto view_of = [&](std::size_t rows) {
    return PagedKv<float>(keys.data(), keys.data(),
                          PagedShape{.kv_heads = 2,
                                     .rows = rows,
                                     .head_dim = 24,
                                     .block_rows = block_rows,
                                     .pool_blocks = table.size()},
                          table, layout::SplitDim{8});
  };
  Compressor compressor{plan};
  RecentQueries<float> recent(query_shape);
  for (int repeat = 0; repeat < 3; ++repeat) {
    keys = original;
    const std::size_t before = allocations;
    recent.clear();
    recent.append(queries.data(), 5, {.head = 8 * 24, .query = 24});
    recent.append(queries.data(), 8, {.head = 8 * 24, .query = 24});
    compressor.begin(100, {.keep_first = 2, .positions = listed});
    std::size_t rows = compressor.compress(0, view_of(100), recent.view()).rows();
    for (const std::size_t total : {120U, 160U, 200U}) {
      const std::size_t appended = total - compressor.retained(0).next_position();
      compressor.begin_turn(total, {.keep_first = 1, .keep_last = 10, .positions = listed});
      const Retained& kept = compressor.compress(0, view_of(rows + appended), observation);
      rows = kept.rows();
      EXPECT_EQ(view_of(rows).free_blocks(kept).size(), 0U);
    }
    compressor.truncate(195);
    const std::size_t made = allocations - before;
    if (repeat > 0) {
      EXPECT_EQ(made, 0U) << "repeat " << repeat;
    }
  }
}

TEST(Memory, CountingCounts) {
  const std::size_t before = allocations;
  void* memory = ::operator new(3);  // a call of the function, which no compiler may leave out
  EXPECT_EQ(allocations - before, 1U);
  ::operator delete(memory);
}

/// One layer's cache of zeros in an element type, all of it in use.
template <class T>
struct Layer {
  KvShape shape;
  std::vector<T> keys;
  std::vector<T> values;

  explicit Layer(const KvShape& kv) : shape(kv) {
    const std::size_t units = kv.kv_heads * kv.rows * kv.head_dim / elements_per_unit<T>();
    keys.assign(units, T{});
    values.assign(units, T{});
  }
  StridedKv<T> view() { return {keys.data(), values.data(), shape, layout::head_token_dim}; }
};

template <>
struct Layer<AffineInt8> {
  KvShape shape;
  std::vector<std::int8_t> keys;
  std::vector<std::int8_t> values;
  std::vector<float> parameters;

  explicit Layer(const KvShape& kv) : shape(kv), parameters(kv.kv_heads * kv.rows, 1.0F) {
    keys.assign(kv.kv_heads * kv.rows * kv.head_dim, 0);
    values = keys;
  }
  Int8Kv view() {
    return {{keys, parameters, parameters}, {values, parameters, parameters}, shape, layout::head_token_dim};
  }
};

/// Compresses every layer of a prompt and gives the bytes that were alive at most, as a share of the model's
/// cache.
template <class T, class S, class Select>
double share_alive(const ModelShape& shape, std::size_t tokens, std::size_t mean, const S& scorer,
                   const Select& selector) {
  const Plan plan{shape, scorer, selector, budget::Uniform{Budget::tokens_per_layer(mean)}};
  // All layers share one cache of zeros, and only the first is scored: what is held depends on neither.
  Layer<T> cache({.kv_heads = shape.kv_heads, .rows = tokens, .head_dim = shape.head_dim});
  const auto kv = cache.view();
  std::vector<float> queries(shape.query_heads * 8 * shape.head_dim, 0.0F);
  const QueryWindow observation{
      queries.data(), QueryShape{.query_heads = shape.query_heads, .queries = 8, .head_dim = shape.head_dim}};
  std::vector<std::uint32_t> rows(mean);
  std::iota(rows.begin(), rows.end(), 0U);  // rows that lie where they go: nothing is copied
  const Selection selection =
      S::granularity == Granularity::layer
          ? Selection::shared_by_heads(rows)
          : Selection::per_head(std::vector<std::vector<std::uint32_t>>(shape.kv_heads, rows));

  const std::size_t before = alive;
  most_alive = before;
  Compressor compressor{plan};
  compressor.begin(tokens);
  compressor.compress(0, kv, observation);
  for (std::size_t layer = 1; layer < shape.layers; ++layer) {
    compressor.compact(layer, kv, selection);
  }
  EXPECT_LE(compressor.memory_bytes(), alive - before) << "what it says it holds, it holds";
  const std::size_t model_cache = shape.layers * tokens * shape.kv_heads * kv_row_bytes(kv);
  return static_cast<double>(most_alive - before) / static_cast<double>(model_cache);
}

template <class T>
struct MemoryPromise : testing::Test {};
using StoredTypes = testing::Types<float, half, bfloat16, BlockQ8_0, BlockQ4_0, AffineInt8>;
struct StoredNames {
  template <class T>
  static std::string GetName(int i) {
    return std::array{"float", "half", "bfloat16", "q8_0", "q4_0", "int8"}[static_cast<std::size_t>(i)];
  }
};
TYPED_TEST_SUITE(MemoryPromise, StoredTypes, StoredNames);

TYPED_TEST(MemoryPromise, HoldsAtMostAHundredthOfTheModelsCache) {
  struct Model {
    const char* name;
    ModelShape shape;
  };
  const Model models[] = {
      {"SmolLM2-135M", {.layers = 30, .query_heads = 9, .kv_heads = 3, .head_dim = 64}},
      {"Llama-3.1-8B", {.layers = 32, .query_heads = 32, .kv_heads = 8, .head_dim = 128}}};
  double largest = 0.0;
  for (const Model& model : models) {
    for (const std::size_t tokens : {4096U, 16384U}) {
      for (const std::size_t mean : {std::size_t{256}, tokens / 8, tokens / 2, tokens - 1}) {
        SCOPED_TRACE(testing::Message() << model.name << " S " << tokens << " rows a layer " << mean);
        const HeadRanking ranking = ranking_of(model.shape);
        const double shared = share_alive<TypeParam>(
            model.shape, tokens, mean, score::SemanticRetrieval{ranking, {}}, select::SharedTopK{});
        EXPECT_LE(shared, 0.01);
        const double grouped = share_alive<TypeParam>(
            model.shape, tokens, mean, score::GroupedRetrieval{ranking, {}}, select::GroupedTopK{});
        EXPECT_LE(grouped, 0.01) << "scores a KV head";
        largest = std::max({largest, shared, grouped});
      }
    }
  }
  EXPECT_GT(largest, 0.001) << "a bound that means something";
  this->RecordProperty("largest_share", std::to_string(largest));
}

}  // namespace
}  // namespace compresskv
