// Compression in libllama on the real model: nothing is lost where all is kept, what is kept is what our own
// engine keeps, and a sequence goes on, is copied, cut, and left alone where something fails.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <compresskv/adapt/llama_cpp.hpp>
#include <compresskv/core/budget.hpp>
#include <compresskv/core/error.hpp>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "llama_fixture.hpp"
#include "message_of.hpp"

namespace adapt_test {
namespace {

using compresskv::ArgumentError;
using compresskv::Budget;
using compresskv::Error;
using compresskv::test::message_of;
using compresskv::test::says;
using llama_cpp::Observer;
using llama_cpp::Sequence;

class LlamaCpp : public RealModel {};

TEST_F(LlamaCpp, ShapeIsTheModels) {
  const ModelShape shape = llama_cpp::model_shape(model());
  EXPECT_EQ(shape.layers, 30U);
  EXPECT_EQ(shape.query_heads, 9U);
  EXPECT_EQ(shape.kv_heads, 3U);
  EXPECT_EQ(shape.head_dim, 64U);
  EXPECT_EQ(shape.kv_row_bytes, 256U);
  EXPECT_EQ(llama_cpp::model_shape(model(), GGML_TYPE_Q8_0, GGML_TYPE_F32).kv_row_bytes, 68U + 256U);
}

TEST_F(LlamaCpp, WhereAllRowsAreKeptLogitsAreTheSameBits) {
  for (const bool flash_attention : {true, false}) {
    Observer observer{llama_cpp::model_shape(model()), 8};
    const Context context = make_context(model(), &observer, {.flash_attention = flash_attention});
    const std::vector<llama_token> prompt = some_tokens(300);
    Sequence sequence{plan("full", Budget::kept_ratio(1.0)), observer, {.context = context.get()}};
    sequence.read(prompt);
    const std::vector<std::uint8_t> before = state_of(context.get(), 0);
    const auto expected = greedy(context.get(), 0, 500, 32);
    sequence.truncate(300);
    ASSERT_EQ(state_of(context.get(), 0), before);

    const auto result = sequence.compress();
    EXPECT_EQ(result.rows_before, 300U);
    EXPECT_EQ(result.rows_after, 300U);
    EXPECT_EQ(result.bytes_after, result.bytes_before);
    EXPECT_EQ(state_of(context.get(), 0), before);
    EXPECT_TRUE(greedy(context.get(), 0, 500, 32) == expected) << "flash attention " << flash_attention;
  }
}

TEST_F(LlamaCpp, GoesOnFromFewRows) {
  for (const bool flash_attention : {true, false}) {
    Observer observer{llama_cpp::model_shape(model()), 8};
    const Context context =
        make_context(model(), &observer, {.sequences = 2, .flash_attention = flash_attention});
    const llama_memory_t memory = llama_get_memory(context.get());
    const llama_cpp::Place read{.context = context.get()};
    const llama_cpp::Place copied{.context = context.get(), .sequence = 1};
    Sequence{plan("full", Budget::kept_ratio(1.0)), observer, read}.read(some_tokens(400));
    for (const char* method :
         {"compresskv", "compresskv-grouped", "snapkv", "tova", "streaming", "random", "knorm", "keydiff",
          "lagkv", "cur", "chunkkv", "carried", "model-wide", "blend", "blend-carried", "rkv"}) {
      llama_memory_seq_cp(memory, 0, 1, -1, -1);
      observer.copy(read, copied);
      Sequence sequence{plan(method, Budget::tokens_per_layer(20)), observer, copied};
      const auto result = sequence.compress();
      EXPECT_EQ(result.rows_after, 20U) << method;
      EXPECT_LT(result.bytes_after * 19, result.bytes_before) << method;
      EXPECT_EQ(sequence.next_position(), 400U) << method;
      EXPECT_EQ(greedy(context.get(), 1, 500, 4).size(), 4U);
      EXPECT_EQ(sequence.next_position(), 404U);
      llama_memory_seq_rm(memory, 1, -1, -1);
    }
  }
}

// ---- what is observed ----

/// What was kept, of layers and heads one after the other.
std::vector<std::uint32_t> kept_by(const Sequence& sequence) {
  std::vector<std::uint32_t> all;
  for (std::size_t layer = 0; layer < sequence.plan().shape().layers; ++layer) {
    const compresskv::Retained& retained = sequence.compressor().retained(layer);
    for (std::size_t list = 0; list < retained.lists(); ++list) {
      all.insert(all.end(), retained.positions(list).begin(), retained.positions(list).end());
    }
  }
  return all;
}

double share_of_same(const std::vector<std::uint32_t>& a, const std::vector<std::uint32_t>& b) {
  std::size_t same = 0;
  for (std::size_t i = 0; i < (std::min)(a.size(), b.size()); ++i) {
    same += a[i] == b[i] ? 1U : 0U;
  }
  return static_cast<double>(same) / static_cast<double>((std::max)(a.size(), b.size()));
}

std::vector<float> window_of(const Observer& observer, const llama_cpp::Place& place, std::size_t layer) {
  const auto queries = observer.queries(place, layer);
  std::vector<float> all;
  for (std::size_t head = 0; head < queries.query_heads(); ++head) {
    const auto run = queries.query_run(head);
    for (std::size_t row = 0; row < run.rows; ++row) {
      all.insert(all.end(), run.row(row), run.row(row) + queries.head_dim());
    }
  }
  return all;
}

double difference(const std::vector<float>& a, const std::vector<float>& b) {
  EXPECT_EQ(a.size(), b.size());
  double most = 0.0;
  double largest = 0.0;
  for (std::size_t i = 0; i < (std::min)(a.size(), b.size()); ++i) {
    most = (std::max)(most, static_cast<double>(std::abs(a[i] - b[i])));
    largest = (std::max)(largest, static_cast<double>(std::abs(a[i])));
  }
  return most / largest;
}

TEST_F(LlamaCpp, WindowIsTheSameHoweverTheLastTokensAreCut) {
  const std::vector<llama_token> prompt = some_tokens(200);
  for (const bool flash_attention : {true, false}) {
    Observer whole{llama_cpp::model_shape(model()), 8};
    const Context one = make_context(model(), &whole, {.flash_attention = flash_attention});
    Sequence sequence{plan("snapkv", Budget::tokens_per_layer(60)), whole, {.context = one.get()}};
    sequence.read(prompt);
    ASSERT_EQ(whole.seen(sequence.place(), 200), 8U);
    EXPECT_FLOAT_EQ(whole.queries(sequence.place(), 7).scale(), 0.125F);
    // Micro-batches of 33: the last has 2 tokens. And token by token at the end.
    for (const std::size_t last : {std::size_t{0}, std::size_t{3}}) {
      Observer cut{llama_cpp::model_shape(model()), 8};
      const Context other =
          make_context(model(), &cut, {.flash_attention = flash_attention, .micro_batch = 33});
      Sequence pieces{plan("snapkv", Budget::tokens_per_layer(60)), cut, {.context = other.get()}};
      pieces.read(std::span(prompt).first(200 - last));
      for (std::size_t i = 200 - last; i < 200; ++i) {
        pieces.read(std::span(prompt).subspan(i, 1));
      }
      ASSERT_EQ(cut.seen(pieces.place(), 200), 8U);
      for (std::size_t layer = 0; layer < 30; ++layer) {
        EXPECT_LT(
            difference(window_of(whole, sequence.place(), layer), window_of(cut, pieces.place(), layer)),
            0.05)
            << "layer " << layer << ", last " << last << ", flash attention " << flash_attention;
      }
    }
  }
}

TEST_F(LlamaCpp, SequencesOfOneBatchAreToldApart) {
  const std::vector<std::vector<llama_token>> prompts = {some_tokens(90, 1), some_tokens(70, 2),
                                                         some_tokens(90, 3)};
  const ModelShape shape = llama_cpp::model_shape(model());
  std::vector<std::vector<float>> alone;
  {
    Observer observer{shape, 8};
    const Context context = make_context(model(), &observer);
    for (const auto& prompt : prompts) {
      Sequence sequence{plan("snapkv", Budget::tokens_per_layer(60)), observer, {.context = context.get()}};
      sequence.read(prompt);
      alone.push_back(window_of(observer, sequence.place(), 11));
      llama_memory_seq_rm(llama_get_memory(context.get()), 0, -1, -1);
    }
  }
  for (const bool unified : {true, false}) {
    Observer observer{shape, 8};
    const Context context =
        make_context(model(), &observer, {.sequences = 4, .unified = unified, .micro_batch = 64});
    std::vector<llama_token> tokens;
    std::vector<llama_pos> positions;
    std::vector<llama_seq_id> numbers = {0, 1, 2};
    std::vector<llama_seq_id*> ids;
    for (std::size_t i = 0; i < prompts.size(); ++i) {
      for (std::size_t at = 0; at < prompts[i].size(); ++at) {
        tokens.push_back(prompts[i][at]);
        positions.push_back(static_cast<llama_pos>(at));
        ids.push_back(&numbers[i]);
      }
    }
    std::vector<std::int32_t> ones(tokens.size(), 1);
    std::vector<std::int8_t> logits(tokens.size(), 1);
    ASSERT_EQ(observer.decode(context.get(), llama_batch{.n_tokens = static_cast<std::int32_t>(tokens.size()),
                                                         .token = tokens.data(),
                                                         .embd = nullptr,
                                                         .pos = positions.data(),
                                                         .n_seq_id = ones.data(),
                                                         .seq_id = ids.data(),
                                                         .logits = logits.data()}),
              0);
    for (std::size_t i = 0; i < prompts.size(); ++i) {
      const llama_cpp::Place place{.context = context.get(), .sequence = numbers[i]};
      ASSERT_EQ(observer.seen(place, prompts[i].size()), 8U) << unified;
      EXPECT_LT(difference(window_of(observer, place, 11), alone[i]), 0.05)
          << "sequence " << i << ", unified " << unified;
      Sequence sequence{plan("snapkv", Budget::tokens_per_layer(40)), observer, place};
      EXPECT_EQ(sequence.compress().rows_after, 40U);
      EXPECT_EQ(sequence.next_position(), prompts[i].size());
    }
    for (const llama_seq_id id : numbers) {
      greedy(context.get(), id, 500, 3);
    }
  }
}

TEST_F(LlamaCpp, RotatedQuantisedKeysMeetRotatedQueries) {
  const std::vector<llama_token> prompt = some_tokens(600);
  std::vector<std::vector<std::uint32_t>> kept;
  for (const ggml_type type : {GGML_TYPE_F16, GGML_TYPE_Q8_0}) {
    const ModelShape shape = llama_cpp::model_shape(model(), type, type);
    Observer observer{shape, 8};
    const Context context = make_context(model(), &observer, {.type_k = type, .type_v = type});
    Sequence sequence{AnyPlan(shape, "snapkv", {.budget = Budget::tokens_per_layer(120)}),
                      observer,
                      {.context = context.get()}};
    sequence.read(prompt);
    EXPECT_EQ(sequence.compress().rows_after, 120U);
    kept.push_back(kept_by(sequence));
    greedy(context.get(), 0, 500, 4);
  }
  std::vector<std::uint32_t> both;
  EXPECT_GT(share_of_same(kept[0], kept[1]), 0.5);
}

// ---- a sequence goes on ----

TEST_F(LlamaCpp, TurnsAreCompressedAgain) {
  for (const char* method : {"compresskv", "snapkv", "model-wide", "full"}) {
    Observer observer{llama_cpp::model_shape(model()), 8};
    const Context context = make_context(model(), &observer, {.micro_batch = 128});
    Sequence sequence{plan(method, Budget::tokens_per_layer(100)), observer, {.context = context.get()}};
    std::size_t total = 0;
    std::size_t rows = 0;
    const bool full = sequence.plan().method().method == compresskv::Method::full;
    for (std::uint32_t turn = 0; turn < 4; ++turn) {
      const std::size_t tokens = 300 - 80 * turn;
      sequence.read(some_tokens(tokens, turn + 1));
      total += tokens;
      const auto result = sequence.compress();
      EXPECT_EQ(result.rows_before, rows + tokens) << method << " turn " << turn;
      EXPECT_EQ(result.rows_after, full ? result.rows_before : 100U) << method << " turn " << turn;
      greedy(context.get(), 0, 500, 5);
      total += 5;
      rows = result.rows_after + 5;
      EXPECT_EQ(sequence.next_position(), total);
    }
  }
}

TEST_F(LlamaCpp, DraftsAreTakenBack) {
  Observer observer{llama_cpp::model_shape(model()), 8};
  const Context context = make_context(model(), &observer);
  Sequence sequence{plan("snapkv", Budget::tokens_per_layer(60)), observer, {.context = context.get()}};
  sequence.read(some_tokens(300));
  sequence.compress();
  const std::vector<std::uint8_t> before = state_of(context.get(), 0);
  const auto expected = greedy(context.get(), 0, 500, 6);
  sequence.truncate(300);
  EXPECT_EQ(state_of(context.get(), 0), before);
  EXPECT_TRUE(greedy(context.get(), 0, 500, 6) == expected);
  sequence.truncate(303);
  sequence.truncate(296);  // into the window
  EXPECT_EQ(sequence.next_position(), 296U);
  EXPECT_TRUE(
      says(message_of<ArgumentError>([&] { sequence.truncate(150); }), {"position is 150", "evicted"}));
  EXPECT_EQ(sequence.next_position(), 296U);
  sequence.read(some_tokens(40, 5));
  const auto again = sequence.compress();
  EXPECT_EQ(again.rows_before, 60U - 4U + 40U);
  EXPECT_EQ(again.rows_after, 60U);
  EXPECT_TRUE(says(message_of<ArgumentError>([&] { sequence.truncate(0); }), {"position is 0"}));
  EXPECT_TRUE(says(message_of<ArgumentError>([&] { sequence.truncate(900); }), {"position is 900", "336"}));
}

TEST_F(LlamaCpp, CopiesGoTheirOwnWay) {
  Observer observer{llama_cpp::model_shape(model()), 8};
  const Context context = make_context(model(), &observer, {.sequences = 3});
  Sequence sequence{plan("snapkv", Budget::tokens_per_layer(60)), observer, {.context = context.get()}};
  sequence.read(some_tokens(300));
  Sequence early = sequence.copy_to(2);  // before anything is compressed
  sequence.compress();
  Sequence late = sequence.copy_to(1);
  EXPECT_EQ(kept_by(sequence), kept_by(late));
  EXPECT_EQ(early.compress().rows_before, 300U);
  EXPECT_EQ(kept_by(early), kept_by(sequence));
  EXPECT_TRUE(says(message_of<ArgumentError>([&] { sequence.copy_to(1); }), {"sequence 1 holds tokens"}));
  const auto expected = greedy(context.get(), 0, 500, 4);
  EXPECT_TRUE(greedy(context.get(), 1, 500, 4).size() == expected.size());
  late.read(some_tokens(50, 7));
  EXPECT_EQ(late.compress().rows_after, 60U);
  EXPECT_EQ(sequence.next_position(), 304U);
  EXPECT_EQ(late.next_position(), 354U);
}

TEST_F(LlamaCpp, MovesToASmallContextOfOtherStreams) {
  const ModelShape shape = llama_cpp::model_shape(model());
  Observer observer{shape, 8};
  std::vector<std::vector<float>> expected;
  for (const bool moved : {false, true}) {
    const Context large = make_context(model(), &observer, {.cells = 1024});
    const Context small = make_context(model(), &observer, {.cells = 1024, .sequences = 4, .unified = false});
    Sequence sequence{plan("model-wide", Budget::tokens_per_layer(60)), observer, {.context = large.get()}};
    sequence.read(some_tokens(900));
    if (moved) {
      sequence.compress_into({.context = small.get(), .sequence = 2});
      EXPECT_EQ(llama_memory_seq_pos_max(llama_get_memory(large.get()), 0), -1);
      EXPECT_TRUE(greedy(small.get(), 2, 500, 8) == expected);
      sequence.read(some_tokens(40, 3));  // observed there as well
      EXPECT_EQ(sequence.compress().rows_after, 60U);
      EXPECT_EQ(sequence.next_position(), 948U);
    } else {
      sequence.compress();
      expected = greedy(large.get(), 0, 500, 8);
    }
  }
}

// ---- what cannot be ----

TEST_F(LlamaCpp, WhatFailsLeavesTheSequenceAsItWas) {
  const ModelShape shape = llama_cpp::model_shape(model());
  Observer observer{shape, 8};
  const Context context = make_context(model(), &observer, {.sequences = 2});
  const Context other = make_context(model(), nullptr, {.flash_attention = false});
  const Context tiny = make_context(model(), nullptr, {.cells = 256});
  const llama_cpp::Place place{.context = context.get()};
  Sequence sequence{plan("snapkv", Budget::tokens_per_layer(400)), observer, place};
  EXPECT_TRUE(says(message_of<ArgumentError>([&] { sequence.compress(); }), {"sequence 0 holds no tokens"}));
  EXPECT_TRUE(says(message_of<ArgumentError>([&] { sequence.read({}); }), {"tokens are none"}));
  sequence.read(some_tokens(900));
  const std::vector<std::uint8_t> before = state_of(context.get(), 0);
  const auto untouched = [&] {
    EXPECT_EQ(state_of(context.get(), 0), before);
    EXPECT_EQ(observer.seen(place, 900), 8U);
  };

  EXPECT_TRUE(says(message_of<Error>([&] { sequence.compress_into({.context = other.get()}); }),
                   {"did not take the state", "flash attention"}));
  EXPECT_EQ(llama_memory_seq_pos_max(llama_get_memory(other.get()), 0), -1);
  untouched();
  EXPECT_TRUE(says(message_of<Error>([&] { sequence.compress_into({.context = tiny.get()}); }),
                   {"too few free cells"}));
  untouched();
  EXPECT_TRUE(says(
      message_of<ArgumentError>([&] { sequence.compress_into({.context = context.get(), .sequence = 2}); }),
      {"sequence is 2", "0 to 1"}));
  const std::vector<std::uint32_t> out_of_order = {8, 3};
  EXPECT_NE(message_of<ArgumentError>([&] { sequence.compress({.positions = out_of_order}); }),
            "(nothing was thrown)");
  untouched();

  for (const char* method : {"adakv", "pyramidkv", "cake", "compresskv-adaptive", "duoattention"}) {
    Sequence uneven{plan(method, Budget::tokens_per_layer(100)), observer, place};
    EXPECT_TRUE(
        says(message_of<ArgumentError>([&] { uneven.compress(); }), {method, "rows of layer", "uniform"}))
        << method;
    untouched();
  }
  EXPECT_TRUE(says(message_of<ArgumentError>([&] {
                     Sequence{plan("h2o", Budget::tokens_per_layer(100)), observer, place};
                   }),
                   {"h2o", "attention of all queries"}));
  EXPECT_TRUE(says(message_of<ArgumentError>([&] {
                     Sequence{plan("snapkv", Budget::tokens_per_layer(100), 16), observer, place};
                   }),
                   {"holds 8 queries", "window is 16"}));
  ModelShape wrong = shape;
  wrong.layers = 29;
  EXPECT_TRUE(says(message_of<ArgumentError>([&] {
                     Sequence{AnyPlan(wrong, "snapkv", {.budget = Budget::kept_ratio(0.5)}), observer, place};
                   }),
                   {"plan is for 29 layers", "model_shape"}));
}

TEST_F(LlamaCpp, CopiesWithoutRoomStayAsTheyWere) {
  Observer observer{llama_cpp::model_shape(model()), 8};
  const Context context = make_context(model(), &observer, {.cells = 1024, .sequences = 3});
  Sequence sequence{plan("snapkv", Budget::tokens_per_layer(400)), observer, {.context = context.get()}};
  sequence.read(some_tokens(900));
  Sequence copy = sequence.copy_to(2);
  const std::vector<std::uint8_t> before = state_of(context.get(), 2);
  // The copy's cells stay the other's: there are 124 for 400 rows.
  EXPECT_TRUE(says(message_of<Error>([&] { copy.compress(); }), {"sequence 2", "too few free cells"}));
  EXPECT_EQ(state_of(context.get(), 2), before);
  EXPECT_EQ(llama_memory_seq_pos_max(llama_get_memory(context.get()), 1), -1);
  greedy(context.get(), 2, 500, 3);
  copy.truncate(900);
  // Without a spare sequence it is lost, and that is said.
  Sequence third = sequence.copy_to(1);
  EXPECT_TRUE(says(message_of<Error>([&] { copy.compress(); }), {"could not be put back", "now empty"}));
  EXPECT_EQ(llama_memory_seq_pos_max(llama_get_memory(context.get()), 2), -1);
  EXPECT_EQ(sequence.next_position(), 900U);
}

TEST_F(LlamaCpp, TokensThatNobodySawAreAnError) {
  Observer observer{llama_cpp::model_shape(model()), 8};
  const Context context = make_context(model(), &observer);
  Sequence sequence{plan("snapkv", Budget::tokens_per_layer(60)), observer, {.context = context.get()}};
  sequence.read(some_tokens(100));
  greedy(context.get(), 0, 500, 3);
  EXPECT_TRUE(says(message_of<ArgumentError>([&] { sequence.compress(); }),
                   {"last 8 tokens", "0 were observed", "Observer::decode"}));
  sequence.read(some_tokens(5));
  EXPECT_TRUE(says(message_of<ArgumentError>([&] { sequence.compress(); }), {"5 were observed"}));
  sequence.read(some_tokens(3));
  EXPECT_EQ(sequence.compress().rows_after, 60U);
  // Methods that look at no queries need none.
  Observer idle{llama_cpp::model_shape(model()), 1};
  const Context blind = make_context(model(), nullptr);
  Sequence keys{plan("keydiff", Budget::tokens_per_layer(60)), idle, {.context = blind.get()}};
  greedy(blind.get(), 0, 500, 80);
  EXPECT_EQ(keys.compress().rows_after, 60U);
}

TEST_F(LlamaCpp, SequencesChangedByOthersAreRefused) {
  Observer observer{llama_cpp::model_shape(model()), 8};
  const Context context = make_context(model(), &observer);
  Sequence sequence{plan("snapkv", Budget::tokens_per_layer(60)), observer, {.context = context.get()}};
  sequence.read(some_tokens(300));
  llama_memory_seq_rm(llama_get_memory(context.get()), 0, 10, 20);
  EXPECT_TRUE(says(message_of<ArgumentError>([&] { sequence.compress(); }),
                   {"290 cells", "position is 299", "by others"}));
  llama_memory_seq_rm(llama_get_memory(context.get()), 0, -1, -1);
  sequence.read(some_tokens(300));
  sequence.compress();
  sequence.read(some_tokens(20));
  llama_memory_seq_rm(llama_get_memory(context.get()), 0, 0, 200);
  EXPECT_TRUE(
      says(message_of<ArgumentError>([&] { sequence.compress(); }), {"80 were expected", "truncate"}));
}

}  // namespace
}  // namespace adapt_test
