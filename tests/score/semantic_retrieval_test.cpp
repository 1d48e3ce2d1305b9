// How SemanticRetrieval is set up; what it computes: compressor_cases_test.cpp.

#include <gtest/gtest.h>

#include <compresskv/score/semantic_retrieval.hpp>
#include <compresskv/score/streaming_llm.hpp>
#include <cstdint>
#include <vector>

#include "reference/errors.hpp"

namespace compresskv::score {
namespace {

using reference::expect_error;
using Heads = std::vector<std::uint32_t>;

const HeadRanking& ranking() {
  static const HeadRanking two_layers{{{3, 1, 0, 2}, {7, 0, 5, 4, 1, 2, 3, 6}}};
  return two_layers;
}

Heads heads_of(const SemanticRetrieval& scorer, std::size_t layer) {
  return {scorer.heads(layer).begin(), scorer.heads(layer).end()};
}

TEST(SemanticRetrieval, TakesTheFirstHeadsOfTheRankingInHeadOrder) {
  const SemanticRetrieval two{ranking(), {.heads_per_layer = 2}};
  EXPECT_EQ(heads_of(two, 0), (Heads{1, 3}));
  EXPECT_EQ(heads_of(two, 1), (Heads{0, 7}));
  const SemanticRetrieval one{ranking(), {.heads_per_layer = 1}};
  EXPECT_EQ(heads_of(one, 0), (Heads{3}));
  EXPECT_EQ(one.window(), 8U);
  EXPECT_EQ(one.options().pool_width, 5U);
}

TEST(SemanticRetrieval, RawScoresRankThemselves) {
  const HeadScores scores{1, 3, {{0.5, 0.1}, {0.2, 0.9}, {0.1, 0.2}}};
  const SemanticRetrieval scorer{scores, {.heads_per_layer = 2}};
  EXPECT_EQ(heads_of(scorer, 0), (Heads{0, 1}));
}

TEST(SemanticRetrieval, AShardKeepsItsOwnHeadsRenumbered) {
  const SemanticRetrieval low{ranking(), {.heads_per_layer = 3, .shard = {.first_head = 0, .heads = 4}}};
  const SemanticRetrieval high{ranking(), {.heads_per_layer = 3, .shard = {.first_head = 4, .heads = 4}}};
  EXPECT_EQ(heads_of(low, 0), (Heads{0, 1, 3}));
  EXPECT_EQ(heads_of(high, 0), (Heads{})) << "a rank may hold none of a layer's heads";
  EXPECT_EQ(heads_of(low, 1), (Heads{0}));
  EXPECT_EQ(heads_of(high, 1), (Heads{1, 3}));
}

TEST(SemanticRetrieval, RejectsOptionsByName) {
  expect_error<ArgumentError>([] { SemanticRetrieval(ranking(), {.heads_per_layer = 0}); },
                              {"heads_per_layer is 0", "at least one head"});
  expect_error<ArgumentError>([] { SemanticRetrieval(ranking(), {.heads_per_layer = 5}); },
                              {"heads_per_layer is 5", "layer 0 lists 4 heads", "at most"});
  expect_error<ArgumentError>([] { SemanticRetrieval(ranking(), {.window = 0}); },
                              {"window is 0", "last query must observe"});
  expect_error<ArgumentError>([] { SemanticRetrieval(ranking(), {.pool_width = 4}); },
                              {"pooling width is 4", "must be odd"});
}

TEST(SemanticRetrieval, RejectsAnotherModel) {
  const SemanticRetrieval scorer{ranking(), {}};
  EXPECT_NO_THROW(scorer.validate({.layers = 2, .query_heads = 8, .kv_heads = 2, .head_dim = 1}));
  expect_error<ArgumentError>(
      [&] { scorer.validate({.layers = 3, .query_heads = 8, .kv_heads = 2, .head_dim = 1}); },
      {"head ranking has 2 layers", "the model has 3", "calibrated for this model"});
  expect_error<ArgumentError>(
      [&] { scorer.validate({.layers = 2, .query_heads = 6, .kv_heads = 2, .head_dim = 1}); },
      {"head ranking names head 7", "heads 0 to 5"});
  const SemanticRetrieval rank{ranking(), {.shard = {.first_head = 4, .heads = 4}}};
  EXPECT_NO_THROW(rank.validate({.layers = 2, .query_heads = 4, .kv_heads = 1, .head_dim = 1}));
  expect_error<ArgumentError>(
      [&] { rank.validate({.layers = 2, .query_heads = 8, .kv_heads = 2, .head_dim = 1}); },
      {"shard holds 4 query heads", "query_heads is 8", "counts its own heads"});
  const SemanticRetrieval askew{ranking(), {.shard = {.first_head = 3, .heads = 4}}};
  expect_error<ArgumentError>(
      [&] { askew.validate({.layers = 2, .query_heads = 4, .kv_heads = 2, .head_dim = 1}); },
      {"shard starts at query head 3", "inside a group of 2", "whole groups"});
}

TEST(StreamingLlm, RejectsNoWindow) {
  expect_error<ArgumentError>([] { StreamingLlm({.window = 0}); }, {"window is 0", "last token must stay"});
}

}  // namespace
}  // namespace compresskv::score
