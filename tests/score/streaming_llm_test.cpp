#include <gtest/gtest.h>

#include <compresskv/compresskv.hpp>
#include <cstdint>
#include <vector>

#include "reference/cache.hpp"

namespace compresskv {
namespace {

using Rows = std::vector<std::uint32_t>;

/// Positions that stay of `tokens`, and a check that the rows there are theirs.
Rows kept(std::size_t tokens, std::size_t capacity, const score::StreamingLlm::Options& options) {
  const Plan plan{ModelShape{.layers = 1, .query_heads = 4, .kv_heads = 2, .head_dim = 3},
                  score::StreamingLlm{options}, select::SharedTopK{},
                  budget::Uniform{Budget::tokens_per_layer(capacity)}};
  reference::Cache<float> cache({.kv_heads = 2, .rows = tokens, .head_dim = 3},
                                reference::Arrangement::token_head_dim);
  reference::Random random(tokens);
  cache.fill(random);
  const auto original = cache;
  Compressor compressor{plan};
  compressor.begin(tokens);
  const Retained& retained = compressor.compress(0, cache.view());
  const auto positions = retained.positions();
  const Rows rows(positions.begin(), positions.end());
  EXPECT_EQ(cache, original.compacted([&](std::size_t) { return rows; }));
  EXPECT_EQ(retained.next_position(), tokens) << "true positions";
  return rows;
}

TEST(StreamingLlm, KeepsSinksAndTheMostRecent) {
  EXPECT_EQ(kept(20, 10, {.sinks = 4, .window = 2}), (Rows{0, 1, 2, 3, 14, 15, 16, 17, 18, 19}));
  EXPECT_EQ(kept(20, 10, {.sinks = 0, .window = 2}), (Rows{10, 11, 12, 13, 14, 15, 16, 17, 18, 19}));
  EXPECT_EQ(kept(20, 4, {.sinks = 2, .window = 2}), (Rows{0, 1, 18, 19}));
}

TEST(StreamingLlm, TheWindowGoesBeforeTheSinks) {
  EXPECT_EQ(kept(20, 5, {.sinks = 4, .window = 3}), (Rows{0, 1, 17, 18, 19}));
  EXPECT_EQ(kept(20, 3, {.sinks = 4, .window = 3}), (Rows{17, 18, 19}));
}

TEST(StreamingLlm, ShortPromptsStayWhole) {
  EXPECT_EQ(kept(3, 8, {}), (Rows{0, 1, 2}));
  EXPECT_EQ(kept(12, 12, {}).size(), 12U);
}

}  // namespace
}  // namespace compresskv
