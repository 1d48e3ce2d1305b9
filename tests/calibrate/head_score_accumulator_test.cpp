#include "compresskv/calibrate/head_score_accumulator.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <compresskv/view/query_window.hpp>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "message_of.hpp"
#include "reference/cache.hpp"
#include "reference/random.hpp"
#include "reference/scattered_kv.hpp"
#include "reference/scores.hpp"

namespace {

using compresskv::ArgumentError;
using compresskv::Error;
using compresskv::HeadRanking;
using compresskv::HeadScores;
using compresskv::QueryShape;
using compresskv::QueryWindow;
using compresskv::ScoreError;
using compresskv::calibrate::HeadRun;
using compresskv::calibrate::HeadScoreAccumulator;
using compresskv::calibrate::HeadScoreKind;
using compresskv::calibrate::TokenId;
using compresskv::calibrate::TokenSpan;
using compresskv::test::message_of;

using Row = std::vector<float>;

// One layer of one head. Span [1, 4) holds the tokens 7, 9, 7; the steps write 9, 7 and a stranger, 4, and
// put 0.75, 0.5 and 1 on the span. The largest weights lie on a 7, on the 9 and on a 7.
void feed_hand_made_run(HeadScoreAccumulator& accumulator, bool counted) {
  accumulator.begin_run(std::vector<TokenId>{5, 7, 9, 7, 2}, {.first = 1, .last = 4});
  accumulator.add_attention(0, 0, Row{0.125F, 0.25F, 0.25F, 0.25F, 0.125F});
  accumulator.add_token(9);
  accumulator.add_attention(0, 0, Row{0.25F, 0.0F, 0.5F, 0.0F, 0.125F, 0.125F});
  accumulator.add_token(7);
  accumulator.add_attention(0, 0, Row{0.0F, 0.5F, 0.25F, 0.25F, 0.0F, 0.0F, 0.0F});
  accumulator.add_token(4);
  accumulator.end_run(counted);
}

TEST(HeadScoreAccumulator, ByHandOncePerOccurrence) {
  HeadScoreAccumulator accumulator(1, 1);
  feed_hand_made_run(accumulator, true);
  EXPECT_EQ(accumulator.scores(), HeadScores(1, 1, {{0.75 + 2 * 0.5}}));
}

TEST(HeadScoreAccumulator, ByHandOncePerStep) {
  HeadScoreAccumulator accumulator(1, 1);
  feed_hand_made_run(accumulator, true);
  EXPECT_EQ(accumulator.scores(HeadScoreKind::once_per_step), HeadScores(1, 1, {{0.75 + 0.5}}));
}

// One head copies both tokens of the answer, at two of three places; one looks elsewhere the second time; one
// looks at the answer's other token.
TEST(HeadScoreAccumulator, ByHandClassic) {
  HeadScoreAccumulator accumulator(1, 3);
  accumulator.begin_run(std::vector<TokenId>{5, 7, 9, 7, 2}, {.first = 1, .last = 4});
  accumulator.add_attention(0, 0, Row{0.1F, 0.2F, 0.3F, 0.2F, 0.2F});
  accumulator.add_attention(0, 1, Row{0.1F, 0.2F, 0.3F, 0.2F, 0.2F});
  accumulator.add_attention(0, 2, Row{0.1F, 0.4F, 0.1F, 0.2F, 0.2F});
  accumulator.add_token(9);
  accumulator.add_attention(0, 0, Row{0.1F, 0.2F, 0.1F, 0.4F, 0.1F, 0.1F});
  accumulator.add_attention(0, 1, Row{0.4F, 0.2F, 0.1F, 0.1F, 0.1F, 0.1F});
  accumulator.add_attention(0, 2, Row{0.1F, 0.1F, 0.4F, 0.2F, 0.1F, 0.1F});
  accumulator.add_token(7);
  accumulator.end_run(true);
  EXPECT_EQ(accumulator.scores(HeadScoreKind::classic),
            HeadScores(1, 3, {{1.0 / 3 + 1.0 / 3}, {1.0 / 3}, {0.0}}));
}

TEST(HeadScoreAccumulator, RunsThatDoNotCountLeaveNothingBehind) {
  HeadScoreAccumulator accumulator(1, 1);
  feed_hand_made_run(accumulator, false);
  EXPECT_EQ(accumulator.counted_runs(), 0U);
  feed_hand_made_run(accumulator, true);
  feed_hand_made_run(accumulator, false);
  EXPECT_EQ(accumulator.counted_runs(), 1U);
  EXPECT_EQ(accumulator.ended_runs(), 3U);
  EXPECT_EQ(accumulator.scores(), HeadScores(1, 1, {{1.75}}));
}

TEST(HeadScoreAccumulator, EachCountedRunHasItsOwnScoreInOrder) {
  HeadScoreAccumulator accumulator(1, 2);
  for (const float weight : {0.25F, 1.0F, 0.5F}) {
    accumulator.begin_run(std::vector<TokenId>{3, 8}, {.first = 1, .last = 2});
    accumulator.add_attention(0, 1, Row{0.0F, weight});
    accumulator.add_attention(0, 0, Row{1.0F, 0.0F});
    accumulator.add_token(8);
    accumulator.end_run(weight != 1.0F);
  }
  EXPECT_EQ(accumulator.scores(), HeadScores(1, 2, {{0.0, 0.0}, {0.25, 0.5}}));
}

TEST(HeadScoreAccumulator, AttentionThatNoTokenFollowedIsDropped) {
  HeadScoreAccumulator accumulator(1, 1);
  for (int run = 0; run < 2; ++run) {
    accumulator.begin_run(std::vector<TokenId>{3, 8}, {.first = 1, .last = 2});
    accumulator.add_attention(0, 0, Row{0.5F, 0.5F});
    accumulator.add_token(8);
    accumulator.add_attention(0, 0, Row{0.0F, 1.0F, 0.0F});  // the end token came out: nothing is written
    accumulator.end_run(true);
  }
  EXPECT_EQ(accumulator.scores(), HeadScores(1, 1, {{0.5, 0.5}}));
}

// The released code's loop as it is written: over the span's positions, adding the whole mass at each match.
TEST(HeadScoreAccumulator, VsTheLoopOverPositions) {
  std::mt19937_64 random(505);
  for (int trial = 0; trial < 100; ++trial) {
    const auto kind = trial % 2 == 0 ? HeadScoreKind::once_per_occurrence : HeadScoreKind::once_per_step;
    const std::size_t layers = 1 + random() % 3;
    const std::size_t heads = 1 + random() % 4;
    HeadScoreAccumulator accumulator(layers, heads);
    std::vector<std::vector<double>> expected(layers * heads);
    const std::size_t runs = 1 + random() % 3;
    for (std::size_t run = 0; run < runs; ++run) {
      std::vector<TokenId> prompt(2 + random() % 20);
      for (TokenId& token : prompt) {
        token = static_cast<TokenId>(random() % 6);
      }
      const std::size_t first = random() % prompt.size();
      const std::size_t last = first + 1 + random() % (prompt.size() - first);
      const std::size_t steps = 1 + random() % 5;
      const bool counted = run == 0 || random() % 2 == 0;
      std::vector<double> scores(layers * heads, 0.0);
      accumulator.begin_run(prompt, {.first = first, .last = last});
      for (std::size_t step = 0; step < steps; ++step) {
        const auto generated = static_cast<TokenId>(random() % 6);
        for (std::size_t i = 0; i < layers * heads; ++i) {
          Row row(prompt.size() + step);
          for (float& weight : row) {
            weight =
                static_cast<float>(random() % 1024) / 1024.0F;  // exact, so that any order of sums agrees
          }
          for (std::size_t position = first; position < last; ++position) {
            if (prompt[position] == generated) {
              for (std::size_t j = first; j < last; ++j) {
                scores[i] += static_cast<double>(row[j]);
              }
              if (kind == HeadScoreKind::once_per_step) {
                break;
              }
            }
          }
          accumulator.add_attention(i / heads, i % heads, row);
        }
        accumulator.add_token(generated);
      }
      accumulator.end_run(counted);
      for (std::size_t i = 0; counted && i < scores.size(); ++i) {
        expected[i].push_back(scores[i]);
      }
    }
    EXPECT_EQ(accumulator.scores(kind), HeadScores(layers, heads, expected)) << "trial " << trial;
  }
}

// Layer l's retrieval head is planted at (2 l + 1) mod heads. Another head looks at the span harder, but only
// while the model writes something else; a third looks at one token of the span alone, as a copying head
// does.
TEST(HeadScoreAccumulator, FindsPlantedHeads) {
  constexpr std::size_t layers = 5;
  constexpr std::size_t heads = 6;
  std::mt19937_64 random(77);
  HeadScoreAccumulator accumulator(layers, heads);
  for (int run = 0; run < 4; ++run) {
    std::vector<TokenId> prompt(64);
    for (std::size_t i = 0; i < prompt.size(); ++i) {
      prompt[i] = static_cast<TokenId>(i);
    }
    const std::size_t first = random() % 50;
    const TokenSpan answer{.first = first, .last = first + 8};
    accumulator.begin_run(prompt, answer);
    for (std::size_t step = 0; step < 16; ++step) {
      const bool writes_answer = step < answer.size();
      for (std::size_t layer = 0; layer < layers; ++layer) {
        for (std::size_t head = 0; head < heads; ++head) {
          Row row(prompt.size() + step, 0.1F / static_cast<float>(prompt.size() + step));
          const std::size_t planted = (2 * layer + 1) % heads;
          const auto put = [&](std::size_t begin, std::size_t end, float mass) {
            for (std::size_t j = begin; j < end; ++j) {
              row[j] += mass / static_cast<float>(end - begin);
            }
          };
          if (head == planted) {
            put(answer.first, answer.last, 0.6F);
          } else if (head == (planted + 1) % heads && !writes_answer) {
            put(answer.first, answer.last, 0.9F);
          } else if (head == (planted + 2) % heads && writes_answer) {
            put(answer.first + step, answer.first + step + 1, 0.4F);
          }
          accumulator.add_attention(layer, head, row);
        }
      }
      accumulator.add_token(writes_answer ? prompt[answer.first + step] : TokenId{1000});
    }
    accumulator.end_run(true);
  }
  // The classic score sees the copying head alone.
  const HeadRanking classic = accumulator.scores(HeadScoreKind::classic).ranking();
  const HeadRanking ranking = accumulator.scores().ranking();
  for (std::size_t layer = 0; layer < layers; ++layer) {
    EXPECT_EQ(classic.heads(layer)[0], (2 * layer + 3) % heads) << "layer " << layer;
    EXPECT_EQ(ranking.heads(layer)[0], (2 * layer + 1) % heads) << "layer " << layer;
    EXPECT_EQ(ranking.heads(layer)[1], (2 * layer + 3) % heads) << "layer " << layer;
  }
}

// One query's attention in double, as its shape asks for it. `key(row, dim)`, `query(dim)`.
template <class Key, class Query>
Row slow_row(Key&& key, Query&& query, std::size_t rows, std::size_t head, const QueryShape& shape) {
  std::vector<double> logits;
  for (std::size_t row = 0; row < rows; ++row) {
    double dot = 0.0;
    for (std::size_t dim = 0; dim < shape.head_dim; ++dim) {
      dot += query(dim) * key(row, dim);
    }
    dot *= shape.scale == 0.0F ? 1.0 / std::sqrt(static_cast<double>(shape.head_dim))
                               : static_cast<double>(shape.scale);
    const auto cap = static_cast<double>(shape.soft_cap);
    dot = cap > 0.0 ? cap * std::tanh(dot / cap) : dot;
    const bool seen = shape.sliding_window == 0 || row + shape.sliding_window >= rows;
    logits.push_back(seen ? dot : -std::numeric_limits<double>::infinity());
  }
  if (!shape.sinks.empty()) {
    logits.push_back(static_cast<double>(shape.sinks[head]));
  }
  const std::vector<double> weights = compresskv::reference::softmax(logits);
  return Row(weights.begin(), weights.begin() + static_cast<std::ptrdiff_t>(rows));
}

// Queries and keys in any layout give what their attention rows give, the cache growing with each step.
TEST(HeadScoreAccumulator, QueriesAndKeysVsTheirAttentionRows) {
  namespace reference = compresskv::reference;
  reference::Random random(606);
  for (int trial = 0; trial < 40; ++trial) {
    const std::size_t layers = random.between(1, 3);
    const std::size_t kv_heads = random.between(1, 3);
    const std::size_t group = random.pick(std::vector<std::size_t>{1, 3, 9});
    const std::size_t heads = kv_heads * group;
    const std::size_t head_dim = random.pick(std::vector<std::size_t>{1, 20, 64});
    const std::size_t tokens = random.pick(std::vector<std::size_t>{2, 17, 300, 1100});
    const std::vector<float> sinks(heads, 1.5F);
    QueryShape shape{
        .query_heads = heads, .queries = random.between(1, 3), .head_dim = head_dim, .scale = 0.2F};
    shape.scale = random.coin() ? 0.2F : 0.0F;
    shape.soft_cap = random.coin() ? 3.0F : 0.0F;
    shape.sliding_window = random.coin() ? random.between(1, 400) : 0;
    shape.sinks = random.coin() ? std::span<const float>(sinks) : std::span<const float>();
    const std::size_t first = random.below(tokens);
    const TokenSpan answer{.first = first, .last = random.between(first + 1, tokens)};
    std::vector<TokenId> prompt(tokens);
    for (TokenId& token : prompt) {
      token = static_cast<TokenId>(random.below(4));
    }
    HeadScoreAccumulator from_rows(layers, heads);
    HeadScoreAccumulator from_queries(layers, heads);
    from_rows.begin_run(prompt, answer);
    from_queries.begin_run(prompt, answer);
    for (std::size_t step = 0; step < 3; ++step) {
      for (std::size_t layer = 0; layer < layers; ++layer) {
        reference::Cache<compresskv::half> cache(
            {.kv_heads = kv_heads, .rows = tokens + step, .head_dim = head_dim},
            random.pick(reference::all_arrangements));
        cache.fill(random, 1.5F);
        std::vector<float> queries(heads * shape.queries * head_dim);
        for (float& element : queries) {
          element = random.gaussian();
        }
        const QueryWindow observation{queries.data(), shape};
        if (random.coin()) {
          from_queries.add_queries(layer, cache.view(), observation);
        } else {
          reference::ScatteredMemory<compresskv::half> pieces(cache, random, 9, head_dim);
          from_queries.add_queries(layer, pieces.view(), observation);
        }
        for (std::size_t head = 0; head < heads; ++head) {
          const auto key = [&](std::size_t row, std::size_t dim) {
            return static_cast<double>(to_float(cache.keys[cache.at(head / group, row, dim)]));
          };
          const auto query = [&](std::size_t dim) {
            return static_cast<double>(queries[(head * shape.queries + shape.queries - 1) * head_dim + dim]);
          };
          from_rows.add_attention(layer, head, slow_row(key, query, tokens + step, head, shape));
        }
      }
      const TokenId generated = prompt[answer.first];
      from_rows.add_token(generated);
      from_queries.add_token(generated);
    }
    from_rows.end_run(true);
    from_queries.end_run(true);
    const HeadRun& expected = from_rows.runs().at(0);
    const HeadRun& actual = from_queries.runs().at(0);
    EXPECT_EQ(actual.classic, expected.classic) << "trial " << trial;
    for (std::size_t i = 0; i < layers * heads; ++i) {
      // Weights are within some 1e-5 of exact (see score_tolerance).
      ASSERT_NEAR(actual.once_per_step[i], expected.once_per_step[i], 3e-5) << "trial " << trial;
      ASSERT_NEAR(actual.once_per_occurrence[i], expected.once_per_occurrence[i],
                  1e-5 * static_cast<double>(tokens));
    }
  }
}

TEST(HeadScoreAccumulator, RejectedQueriesChangeNothing) {
  namespace reference = compresskv::reference;
  reference::Random random(8);
  HeadScoreAccumulator accumulator(2, 4);
  std::vector<float> queries(6 * 8, 0.5F);
  const auto of = [&](std::size_t layer, std::size_t kv_heads, std::size_t rows, std::size_t query_heads,
                      std::size_t head_dim) {
    reference::Cache<float> cache({.kv_heads = kv_heads, .rows = rows, .head_dim = 8},
                                  reference::Arrangement::head_token_dim);
    cache.fill(random);
    return message_of<ArgumentError>([&] {
      accumulator.add_queries(
          layer, cache.view(),
          QueryWindow{queries.data(),
                      QueryShape{.query_heads = query_heads, .queries = 1, .head_dim = head_dim}});
    });
  };
  EXPECT_EQ(of(0, 2, 3, 4, 8), "attention outside a run: call begin_run first");
  accumulator.begin_run(std::vector<TokenId>{1, 2, 3}, {.first = 1, .last = 3});
  EXPECT_EQ(of(2, 2, 3, 4, 8), "layer is 2, the model has layers 0 to 1");
  EXPECT_EQ(of(1, 3, 3, 4, 8),
            "ModelShape::query_heads is 4, not a multiple of kv_heads 3: each KV head must serve the same "
            "number of query heads");
  const std::string wanted =
      " elements, the model has 4 query heads and keys of 8 elements: give the query of every head whose "
      "logits give the step's token";
  EXPECT_EQ(of(1, 2, 3, 6, 8), "layer 1 shows 1 queries of 6 heads of 8" + wanted);
  EXPECT_EQ(of(1, 2, 3, 4, 4), "layer 1 shows 1 queries of 4 heads of 4" + wanted);
  EXPECT_EQ(
      of(1, 2, 2, 4, 8),
      "attention row of layer 1 head 0 has 2 weights, the full cache has 3 tokens at step 0: give the whole "
      "row of an uncompressed cache, and add_token after each step");
  accumulator.add_attention(0, 3, Row{0.0F, 0.5F, 0.5F});
  EXPECT_EQ(of(0, 2, 3, 4, 8),
            "attention of layer 0 head 3 came twice in step 0: call add_token between two steps");
  EXPECT_NO_THROW(accumulator.add_attention(0, 0, Row{0.0F, 0.5F, 0.5F}));

  // A broken head leaves the run short of it: it cannot go on, and ends without counting.
  reference::Cache<float> cache({.kv_heads = 2, .rows = 3, .head_dim = 8},
                                reference::Arrangement::head_token_dim);
  cache.fill(random);
  queries[2 * 8 + 1] = std::numeric_limits<float>::quiet_NaN();
  const QueryWindow broken{queries.data(), QueryShape{.query_heads = 4, .queries = 1, .head_dim = 8}};
  EXPECT_TRUE(compresskv::test::says(
      message_of<ScoreError>([&] { accumulator.add_queries(1, cache.view(), broken); }),
      {"layer 1 query head 2 token 0", "not finite"}));
  EXPECT_THROW(accumulator.add_token(1), ArgumentError);
  EXPECT_NO_THROW(accumulator.end_run(false));
}

// Fifteen prompts dealt out to three processes, whichever comes first, are one process's to the last bit.
TEST(HeadScoreAccumulator, MergedProcessesAreOne) {
  constexpr std::size_t layers = 3;
  constexpr std::size_t heads = 4;
  const auto feed = [](HeadScoreAccumulator& accumulator, std::size_t run) {
    std::mt19937_64 random(run);
    accumulator.begin_run(run, std::vector<TokenId>{0, 1, 2, 3, 1, 2}, {.first = 1, .last = 5});
    for (std::size_t step = 0; step < 4; ++step) {
      for (std::size_t i = 0; i < layers * heads; ++i) {
        Row row(6 + step);
        for (float& weight : row) {
          weight = static_cast<float>(random() % 100000) / 700000.0F;
        }
        accumulator.add_attention(i / heads, i % heads, row);
      }
      accumulator.add_token(static_cast<TokenId>(random() % 5));
    }
    accumulator.end_run(run % 4 != 1);
  };
  HeadScoreAccumulator whole(layers, heads);
  std::vector<HeadScoreAccumulator> parts(3, HeadScoreAccumulator(layers, heads));
  for (std::size_t run = 0; run < 15; ++run) {
    feed(whole, run);
    feed(parts[run * 7 % 3], 14 - run);
  }
  HeadScoreAccumulator merged(layers, heads);
  for (const std::size_t part : {2U, 0U, 1U}) {
    merged.merge(parts[part]);
  }
  EXPECT_EQ(merged.runs(), whole.runs());
  EXPECT_EQ(merged.counted_runs(), whole.counted_runs());
  for (const auto kind :
       {HeadScoreKind::once_per_occurrence, HeadScoreKind::once_per_step, HeadScoreKind::classic}) {
    EXPECT_EQ(merged.scores(kind), whole.scores(kind));
  }
  // Two halves are scored apart.
  const auto even = [](std::size_t run) { return run % 2 == 0; };
  EXPECT_EQ(merged.scores_of(even).runs(0, 0).size(), 8U);  // of 0, 2, ... 14 all count
  EXPECT_EQ(whole.scores_of(even), merged.scores_of(even));

  // A prompt that two processes have read is refused, and nothing is taken.
  HeadScoreAccumulator twice(layers, heads);
  feed(twice, 20);
  feed(twice, 7);
  EXPECT_EQ(message_of<ArgumentError>([&] { merged.merge(twice); }),
            "run 7 is in both: a prompt is given to one process alone");
  EXPECT_EQ(merged.runs(), whole.runs());
  EXPECT_EQ(
      message_of<ArgumentError>([&] { merged.merge(HeadScoreAccumulator(2, heads)); }),
      "cannot merge scores of 2 layers of 4 heads into those of 3 layers of 4 heads: all must be of one "
      "model");
  twice.begin_run(8, std::vector<TokenId>{1}, {.first = 0, .last = 1});
  EXPECT_EQ(message_of<ArgumentError>([&] { merged.merge(twice); }),
            "merge within a run: call end_run first");
}

TEST(HeadScoreAccumulator, RunsThatWereWrittenDownComeBack) {
  HeadScoreAccumulator accumulator(1, 1);
  feed_hand_made_run(accumulator, true);
  feed_hand_made_run(accumulator, false);
  HeadScoreAccumulator again(1, 1);
  for (const auto& [number, run] : accumulator.runs()) {
    EXPECT_EQ(number, run.run);
    again.add_run(run);
  }
  EXPECT_EQ(again.scores(), accumulator.scores());
  EXPECT_EQ(again.ended_runs(), 2U);

  const auto of = [&](const HeadRun& run) { return message_of<ArgumentError>([&] { again.add_run(run); }); };
  EXPECT_EQ(of({.run = 1}), "run 1 came already: each prompt has a number of its own");
  EXPECT_EQ(of({.run = 2, .counted = true, .once_per_occurrence = {1.0}, .once_per_step = {1.0}}),
            "run 2 has 0 scores, must have 1: one a head of every layer");
  EXPECT_EQ(of({.run = 2, .once_per_occurrence = {1.0}}),
            "run 2 has 1 scores, must have 0, as it did not count");
  const double nan = std::numeric_limits<double>::quiet_NaN();
  EXPECT_EQ(
      of({.run = 2, .counted = true, .once_per_occurrence = {1.0}, .once_per_step = {nan}, .classic = {0.0}}),
      "run 2 has the score nan of layer 0 head 0: every score must be finite");
  EXPECT_EQ(again.runs(), accumulator.runs());
}

TEST(HeadScoreAccumulator, NoCountedRunIsAnError) {
  HeadScoreAccumulator accumulator(1, 1);
  feed_hand_made_run(accumulator, false);
  EXPECT_EQ(
      message_of<Error>([&] { accumulator.scores(); }),
      "no run counted of the 1 that ended: the model must answer at least one needle prompt; use shorter "
      "prompts, easier needles or the model's chat template");
}

TEST(HeadScoreAccumulator, RejectsAModelWithoutHeads) {
  EXPECT_EQ(message_of<ArgumentError>([] { HeadScoreAccumulator(2, 0); }),
            "head score accumulator needs at least one layer and one head, got 2 layers of 0 heads");
}

TEST(HeadScoreAccumulator, RejectsASpanOutsideThePrompt) {
  HeadScoreAccumulator accumulator(1, 1);
  const std::vector<TokenId> prompt{1, 2, 3};
  const auto of = [&](TokenSpan span) {
    return message_of<ArgumentError>([&] { accumulator.begin_run(prompt, span); });
  };
  EXPECT_EQ(
      of({.first = 1, .last = 4}),
      "answer span is [1, 4), must be within the 3 tokens of the prompt and not empty: give the needle's "
      "place");
  accumulator.add_run({.run = 4});
  EXPECT_EQ(message_of<ArgumentError>([&] { accumulator.begin_run(4, prompt, {.first = 0, .last = 1}); }),
            "run 4 came already: each prompt has a number of its own");
  EXPECT_EQ(
      of({.first = 2, .last = 2}),
      "answer span is [2, 2), must be within the 3 tokens of the prompt and not empty: give the needle's "
      "place");
}

TEST(HeadScoreAccumulator, RejectsCallsOutOfOrder) {
  HeadScoreAccumulator accumulator(1, 2);
  EXPECT_EQ(message_of<ArgumentError>([&] { accumulator.add_attention(0, 0, Row{1.0F}); }),
            "attention outside a run: call begin_run first");
  EXPECT_EQ(message_of<ArgumentError>([&] { accumulator.add_token(1); }),
            "add_token outside a run: call begin_run first");
  EXPECT_EQ(message_of<ArgumentError>([&] { accumulator.end_run(true); }),
            "end_run outside a run: call begin_run first");
  const std::vector<TokenId> prompt{1};
  accumulator.begin_run(prompt, {.first = 0, .last = 1});
  EXPECT_EQ(message_of<ArgumentError>([&] { accumulator.begin_run(prompt, {.first = 0, .last = 1}); }),
            "begin_run within a run: call end_run first");
  EXPECT_EQ(message_of<ArgumentError>([&] { accumulator.end_run(true); }),
            "a run without a step cannot count: feed add_attention and add_token first");
  accumulator.add_attention(0, 0, Row{1.0F});
  EXPECT_EQ(message_of<ArgumentError>([&] { accumulator.add_attention(0, 0, Row{1.0F}); }),
            "attention of layer 0 head 0 came twice in step 0: call add_token between two steps");
  EXPECT_EQ(message_of<ArgumentError>([&] { accumulator.add_token(1); }),
            "add_token at step 0 without the attention of layer 0 head 1 (1 of 2 heads came): call "
            "add_attention for "
            "every head first");
}

TEST(HeadScoreAccumulator, RejectedAttentionChangesNothing) {
  HeadScoreAccumulator accumulator(2, 3);
  accumulator.begin_run(std::vector<TokenId>{1, 2, 3}, {.first = 1, .last = 3});
  const auto of = [&](std::size_t layer, std::size_t head, const Row& row) {
    return message_of<ArgumentError>([&] { accumulator.add_attention(layer, head, row); });
  };
  EXPECT_EQ(of(2, 0, {0.0F, 0.0F, 0.0F}), "layer is 2, the model has layers 0 to 1");
  EXPECT_EQ(of(1, 3, {0.0F, 0.0F, 0.0F}), "head is 3, the model has query heads 0 to 2");
  EXPECT_EQ(
      of(1, 2, {0.0F, 0.0F}),
      "attention row of layer 1 head 2 has 2 weights, the full cache has 3 tokens at step 0: give the whole "
      "row of an uncompressed cache, and add_token after each step");
  EXPECT_EQ(
      of(1, 2, {0.0F, 0.0F, 0.0F, 0.0F}),
      "attention row of layer 1 head 2 has 4 weights, the full cache has 3 tokens at step 0: give the whole "
      "row of an uncompressed cache, and add_token after each step");
  EXPECT_EQ(of(1, 2, {0.0F, 0.5F, 2.5F}),
            "attention weight of layer 1 head 2 at position 2 is 2.5: give probabilities, after the softmax");
  EXPECT_EQ(
      of(1, 2, {0.0F, -0.5F, 0.5F}),
      "attention weight of layer 1 head 2 at position 1 is -0.5: give probabilities, after the softmax");
  EXPECT_EQ(of(1, 2, {0.0F, std::numeric_limits<float>::quiet_NaN(), 0.5F}),
            "attention weight of layer 1 head 2 at position 1 is nan: give probabilities, after the softmax");
  EXPECT_NO_THROW(accumulator.add_attention(1, 2, Row{0.0F, 0.5F, 0.5F}));
}

}  // namespace
