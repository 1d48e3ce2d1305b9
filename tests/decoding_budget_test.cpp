// A budget while decoding: after every n generated tokens the cache shrinks to its capacity again, however
// long the answer becomes.

#include <gtest/gtest.h>

#include <compresskv/compresskv.hpp>
#include <cstdint>
#include <numeric>
#include <vector>

#include "reference/cache.hpp"
#include "reference/random.hpp"

namespace compresskv {
namespace {

using reference::Random;
using Rows = std::vector<std::uint32_t>;

constexpr std::size_t layers = 2;
constexpr std::size_t prompt = 150;
constexpr std::size_t generated = 1000;
constexpr std::size_t capacity = 64;
constexpr std::size_t window = 8;
constexpr std::size_t head_dim = 16;
constexpr ModelShape shape{.layers = layers, .query_heads = 4, .kv_heads = 2, .head_dim = head_dim};
// A token of the prompt that every query looks at.
constexpr std::size_t wanted = 70;

struct EngineLayer {
  reference::Cache<float> cache{
      {.kv_heads = 2, .rows = 1, .head_dim = head_dim, .allocated_rows = prompt + 64},
      reference::Arrangement::token_head_dim};
  RecentQueries<float> recent{{.query_heads = 4, .queries = window, .head_dim = head_dim}};
  std::size_t rows = 0;

  /// The keys, values and queries of one token; the first element of a value is the token's position.
  void append(std::size_t position, Random& random) {
    cache.fill_rows(random, rows, rows + 1);
    std::vector<float> queries(4 * head_dim);
    for (float& x : queries) {
      x = random.gaussian();
    }
    for (std::size_t head = 0; head < 4; ++head) {
      queries[head * head_dim] = 8.0F;
    }
    for (std::size_t head = 0; head < 2; ++head) {
      cache.keys[cache.at(head, rows, 0)] = position == wanted ? 8.0F : 0.0F;
      cache.values[cache.value_at(head, rows, 0)] = static_cast<float>(position);
    }
    recent.append(queries.data(), 1, {.head = head_dim, .query = head_dim});
    ++rows;
  }

  StridedKv<float> view() {
    cache.shape.rows = rows;
    return cache.view();
  }
};

/// Generates with a compression after every `every` tokens; `check(kept, layer, next)` sees each.
template <class S, class T, class Check>
void generate(const S& scorer, const T& selector, std::size_t every, Check&& check) {
  const Plan plan{shape, scorer, selector, budget::Uniform{Budget::tokens_per_layer(capacity)}};
  Random random(5);
  std::vector<EngineLayer> engine(layers);
  Compressor compressor{plan};
  std::size_t next = 0;
  const auto append = [&] {
    for (EngineLayer& layer : engine) {
      layer.append(next, random);
    }
    ++next;
  };
  const auto compress = [&] {
    for (std::size_t l = 0; l < layers; ++l) {
      const Retained& kept = compressor.compress(l, engine[l].view(), engine[l].recent.view());
      engine[l].rows = kept.rows();
      check(kept, engine[l], next);
    }
  };
  while (next < prompt) {
    append();
  }
  compressor.begin(prompt);
  compress();
  for (std::size_t step = 1; step <= generated; ++step) {
    append();
    ASSERT_LE(engine[0].rows, capacity + every);
    if (step % every == 0) {
      compressor.begin_turn(next);
      compress();
    }
  }
}

/// Calls `f(scorer, selector, looks)` for each method that decodes on a budget.
template <class F>
void for_each_decoder(F&& f) {
  {
    SCOPED_TRACE("SnapKV");
    f(score::SnapKv{{.window = window}}, select::GroupedTopK{}, true);
  }
  {
    SCOPED_TRACE("CompressKV");
    const HeadRanking heads{std::vector<std::vector<std::uint32_t>>(layers, {3, 1, 0, 2})};
    f(score::SemanticRetrieval{heads, {.heads_per_layer = 2, .window = window}}, select::SharedTopK{}, true);
  }
  SCOPED_TRACE("StreamingLLM");
  f(score::StreamingLlm{{.window = window}}, select::SharedTopK{}, false);
}

TEST(DecodingBudget, NeverHoldsMoreThanItsCapacityAndNRows) {
  for_each_decoder([](const auto& scorer, const auto& selector, bool) {
    for (const std::size_t every : {1U, 16U, 33U}) {
      SCOPED_TRACE(every);
      std::size_t compressions = 0;
      generate(scorer, selector, every,
               [&](const Retained& kept, const EngineLayer& layer, std::size_t next) {
                 ++compressions;
                 ASSERT_EQ(kept.rows(0), capacity);
                 ASSERT_EQ(kept.rows(1), capacity);
                 ASSERT_EQ(kept.next_position(), next);
                 for (std::size_t head = 0; head < 2; ++head) {
                   std::size_t row = 0;
                   for (const std::uint32_t position : kept.positions(head)) {
                     ASSERT_EQ(layer.cache.values[layer.cache.value_at(head, row, 0)],
                               static_cast<float>(position))
                         << "positions stay true: KV head " << head << " row " << row;
                     ++row;
                   }
                   for (std::size_t back = 1; back <= window; ++back) {
                     ASSERT_TRUE(kept.row(next - back, head).has_value()) << "the window is whole";
                   }
                 }
               });
      EXPECT_EQ(compressions, layers * (1 + generated / every));
    }
  });
}

TEST(DecodingBudget, KeepsWhatIsLookedAtThroughoutAndStreamingDoesNot) {
  for_each_decoder([](const auto& scorer, const auto& selector, bool looks) {
    generate(scorer, selector, 16, [&](const Retained& kept, const EngineLayer&, std::size_t next) {
      for (std::size_t head = 0; head < 2; ++head) {
        ASSERT_EQ(kept.row(wanted, head).has_value(), looks) << "after " << next;
      }
    });
  });
}

TEST(DecodingBudget, StreamingHoldsTheSinksAndTheMostRecent) {
  generate(score::StreamingLlm{{.window = window}}, select::SharedTopK{}, 16,
           [](const Retained& kept, const EngineLayer&, std::size_t next) {
             Rows expected{0, 1, 2, 3};
             expected.resize(capacity);
             std::iota(expected.begin() + 4, expected.end(),
                       static_cast<std::uint32_t>(next - (capacity - 4)));
             ASSERT_EQ(Rows(kept.positions().begin(), kept.positions().end()), expected);
           });
}

}  // namespace
}  // namespace compresskv
