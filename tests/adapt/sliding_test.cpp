// Models some of whose layers see a window of tokens alone: which ones they are is learnt from a graph, the
// others are compressed, and their own part of the state stays.

#include <gtest/gtest.h>
#include <llama.h>

#include <algorithm>
#include <cmath>
#include <compresskv/adapt/llama_cpp.hpp>
#include <compresskv/core/budget.hpp>
#include <compresskv/core/error.hpp>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "any_model.hpp"
#include "llama_fixture.hpp"
#include "message_of.hpp"
#include "sliding_models.hpp"
#include "tiny_model.hpp"

namespace adapt_test {
namespace {

using compresskv::ArgumentError;
using compresskv::Budget;
using compresskv::test::message_of;
using compresskv::test::says;

class LlamaCppSliding : public testing::TestWithParam<Sliding> {
 protected:
  void SetUp() override { model_ = make(GetParam().tiny); }

  llama_model* model() const { return model_.get(); }
  ModelShape shape(const ContextOptions& of = {}) const {
    return llama_cpp::model_shape(model(), of.type_k, of.type_v);
  }
  bool takes(const ContextOptions& options) const {
    return options.flash_attention || GetParam().plain_is_observed;
  }
  /// Caches of both kinds, equally large and not.
  static std::vector<ContextOptions> contexts() {
    return {{.micro_batch = 48, .swa_full = true},
            {.micro_batch = 48, .swa_full = false},
            {.flash_attention = false, .micro_batch = 48, .swa_full = false},
            {.type_k = GGML_TYPE_Q8_0, .type_v = GGML_TYPE_Q8_0, .micro_batch = 48, .swa_full = false}};
  }

 private:
  Model model_;
};

TEST_P(LlamaCppSliding, FirstGraphShowsWhichLayersSlide) {
  const std::vector<ContextOptions> all = {
      {.swa_full = true},
      {.swa_full = false},
      {.flash_attention = !GetParam().plain_is_observed, .swa_full = true},
      {.cells = 512, .sequences = 4, .unified = false, .swa_full = false},
      {.cells = 1024, .sequences = 3, .unified = false, .type_k = GGML_TYPE_Q8_0, .type_v = GGML_TYPE_Q8_0},
      {.cells = 256, .micro_batch = 16, .swa_full = false}};
  for (const ContextOptions& options : all) {
    for (const std::size_t first : {std::size_t{1}, std::size_t{20}, std::size_t{100}}) {
      llama_cpp::Observer observer{shape(options), window};
      const Context context = make_context(model(), &observer, options);
      EXPECT_TRUE(says(message_of<ArgumentError>([&] { observer.global_layers(model()); }),
                       {"sliding-window layers of 32 tokens", "no graph has shown yet", "Observer::decode"}));
      const auto last = static_cast<llama_seq_id>(options.sequences - 1);
      llama_cpp::Sequence sequence{
          plan_of(shape(options), "snapkv", 30), observer, {.context = context.get(), .sequence = last}};
      sequence.read(prompt_of(model(), first));
      EXPECT_TRUE(std::ranges::equal(sequence.layers(), GetParam().global)) << first;
    }
  }
}

TEST_P(LlamaCppSliding, CellsThatOtherPromptsLeftDoNotMislead) {
  ContextOptions options{.micro_batch = 48, .swa_full = false};
  llama_cpp::Observer observer{shape(), window};
  const Context context = make_context(model(), &observer, options);
  // Not observed; the first layer's keys of the same tokens at the same places are the same.
  decode_batch(context.get(), prompt_of(model(), 120));
  llama_memory_seq_rm(llama_get_memory(context.get()), 0, -1, -1);
  decode_batch(context.get(), prompt_of(model(), 60, 2));
  llama_memory_seq_rm(llama_get_memory(context.get()), 0, -1, -1);
  llama_cpp::Sequence sequence{plan_of(shape(), "snapkv", 30), observer, {.context = context.get()}};
  sequence.read(prompt_of(model(), 120));
  EXPECT_TRUE(std::ranges::equal(sequence.layers(), GetParam().global));
}

TEST_P(LlamaCppSliding, NothingIsLostWhereAllIsKept) {
  for (const ContextOptions& options : contexts()) {
    if (!takes(options)) {
      continue;
    }
    llama_cpp::Observer observer{shape(options), window};
    const Context context = make_context(model(), &observer, options);
    llama_cpp::Sequence sequence{plan_of(shape(options), "full", 1), observer, {.context = context.get()}};
    sequence.read(prompt_of(model()));
    const std::vector<std::uint8_t> before = state_of(context.get(), 0);
    const auto result = sequence.compress();
    EXPECT_EQ(result.rows_before, prompt_tokens);
    EXPECT_EQ(result.rows_after, prompt_tokens);
    ASSERT_EQ(state_of(context.get(), 0), before);
    const auto logits = greedy(context.get(), 0, 107, 40);

    // libllama itself lays the window's cells closer together where a state is read: so they are added up in
    // another order than without that, and in the same as after a compression.
    const Context other = make_context(model(), nullptr, options);
    decode_batch(other.get(), prompt_of(model()));
    const auto untouched = decode_one(other.get(), 0, 107);
    llama_memory_seq_rm(llama_get_memory(other.get()), 0, prompt_tokens, -1);
    ASSERT_EQ(state_of(other.get(), 0), before);
    ASSERT_EQ(llama_state_seq_set_data(other.get(), before.data(), before.size(), 0), before.size());
    EXPECT_TRUE(greedy(other.get(), 0, 107, 40) == logits);
    EXPECT_LT(difference(untouched, logits[0]), logits_off);
  }
}

TEST_P(LlamaCppSliding, ObservedQueriesAreTheGraphs) {
  expect_observed_queries_are_the_graphs(model(), GGML_TYPE_F32,
                                         {.observes_plain = GetParam().plain_is_observed});
}

TEST_P(LlamaCppSliding, DecodingSeesWhatIsKept) {
  for (const ContextOptions& options : contexts()) {
    if (!takes(options)) {
      continue;
    }
    // 20 rows are fewer than the window of the others.
    for (const std::size_t rows : {std::size_t{40}, std::size_t{20}}) {
      llama_cpp::Observer observer{shape(options), window};
      const Context context = make_context(model(), &observer, options);
      llama_cpp::Sequence sequence{
          plan_of(shape(options), "streaming", rows), observer, {.context = context.get()}};
      sequence.read(prompt_of(model()));
      EXPECT_EQ(sequence.compress().rows_after, rows);
      const auto logits = greedy(context.get(), 0, 107, 40);

      const Context other = make_context(model(), nullptr, options);
      decode_batch(other.get(), prompt_of(model()));
      const auto whole = decode_one(other.get(), 0, 107);
      llama_memory_seq_rm(llama_get_memory(other.get()), 0, prompt_tokens, -1);
      remove_from_global_layers(other.get(), 4, static_cast<llama_pos>(prompt_tokens - rows + 4));
      const auto expected = decode_one(other.get(), 0, 107);
      const double error = difference(expected, logits[0]);
      EXPECT_LT(error, logits_off) << rows;
      EXPECT_GT(difference(expected, whole), 3 * error) << rows << ": the evicted rows made no difference";
      llama_token token = best(logits[0]);
      for (std::size_t i = 1; i < logits.size(); ++i) {
        EXPECT_LT(difference(decode_one(other.get(), 0, token), logits[i]), logits_off)
            << rows << " step " << i;
        token = best(logits[i]);
      }
    }
  }
}

TEST_P(LlamaCppSliding, MethodsGoOnOverTurns) {
  for (const ContextOptions& options : contexts()) {
    if (takes(options)) {
      expect_methods_go_on(model(), options);
    }
  }
}

TEST_P(LlamaCppSliding, LongTurnsPassTheWindowsCache) {
  // The layers that slide have 256 cells: they are used again and again.
  const ContextOptions options{.cells = 1024, .micro_batch = 48, .swa_full = false};
  llama_cpp::Observer observer{shape(), window};
  const Context context = make_context(model(), &observer, options);
  llama_cpp::Sequence sequence{plan_of(shape(), "snapkv", 60), observer, {.context = context.get()}};
  std::size_t rows = 0;
  for (std::uint32_t turn = 0; turn < 6; ++turn) {
    sequence.read(prompt_of(model(), 130, turn + 1));
    const auto result = sequence.compress();
    EXPECT_EQ(result.rows_before, rows + 130);
    EXPECT_EQ(result.rows_after, 60U);
    EXPECT_LT(result.bytes_after, result.bytes_before);
    for (const auto& logits : greedy(context.get(), 0, 107, 30)) {
      EXPECT_TRUE(std::ranges::all_of(logits, [](float x) { return std::isfinite(x); }));
    }
    rows = 60 + 30;
    EXPECT_EQ(sequence.next_position(), (turn + 1) * 160);
  }
}

TEST_P(LlamaCppSliding, SequencesAndCopiesGoTheirOwnWay) {
  for (const bool unified : {true, false}) {
    const ContextOptions options{
        .cells = 2048, .sequences = 4, .unified = unified, .micro_batch = 48, .swa_full = false};
    llama_cpp::Observer observer{shape(), window};
    const Context context = make_context(model(), &observer, options);
    llama_cpp::Sequence one{plan_of(shape(), "snapkv", 40), observer, {.context = context.get()}};
    one.read(prompt_of(model()));
    llama_cpp::Sequence copy = one.copy_to(2);
    llama_cpp::Sequence two{
        plan_of(shape(), "snapkv", 30), observer, {.context = context.get(), .sequence = 1}};
    two.read(prompt_of(model(), 170, 2));
    EXPECT_EQ(one.compress().rows_after, 40U);
    EXPECT_EQ(two.compress().rows_after, 30U);
    EXPECT_EQ(copy.compress().rows_before, prompt_tokens);
    const auto expected = greedy(context.get(), 0, 107, 20);
    const auto again = greedy(context.get(), 2, 107, 20);
    for (std::size_t i = 0; i < expected.size(); ++i) {
      EXPECT_LT(difference(expected[i], again[i]), logits_off);
    }
    copy.read(prompt_of(model(), 60, 3));
    EXPECT_EQ(copy.compress().rows_before, 40U + 20 + 60);
    EXPECT_EQ(two.next_position(), 170U);
    EXPECT_EQ(one.next_position(), prompt_tokens + 20);
  }
}

TEST_P(LlamaCppSliding, MovesToASmallContextOfOtherStreams) {
  llama_cpp::Observer observer{shape(), window};
  std::vector<std::vector<float>> expected;
  for (const bool moved : {false, true}) {
    const Context large = make_context(model(), &observer, {.micro_batch = 48, .swa_full = true});
    const Context small =
        make_context(model(), &observer,
                     {.cells = 1024, .sequences = 4, .unified = false, .micro_batch = 16, .swa_full = false});
    llama_cpp::Sequence sequence{plan_of(shape(), "snapkv", 40), observer, {.context = large.get()}};
    sequence.read(prompt_of(model()));
    if (!moved) {
      sequence.compress();
      expected = greedy(large.get(), 0, 107, 8);
      continue;
    }
    sequence.compress_into({.context = small.get(), .sequence = 2});
    EXPECT_EQ(llama_memory_seq_pos_max(llama_get_memory(large.get()), 0), -1);
    const auto logits = greedy(small.get(), 2, 107, 8);
    for (std::size_t i = 0; i < logits.size(); ++i) {
      EXPECT_LT(difference(expected[i], logits[i]), logits_off);
    }
    sequence.read(prompt_of(model(), 40, 3));
    EXPECT_EQ(sequence.compress().rows_after, 40U);
    EXPECT_EQ(sequence.next_position(), prompt_tokens + 48);
  }
}

// ---- taking tokens back ----

TEST_P(LlamaCppSliding, DraftsAreTakenBackWhereTheWindowIsStillHeld) {
  const ContextOptions options{.micro_batch = 48, .swa_full = false};
  llama_cpp::Observer observer{shape(), window};
  const Context context = make_context(model(), &observer, options);
  llama_cpp::Sequence sequence{plan_of(shape(), "snapkv", 60), observer, {.context = context.get()}};
  sequence.read(prompt_of(model()));
  greedy(context.get(), 0, 107, 6);
  sequence.truncate(prompt_tokens + 2);  // before anything is compressed
  sequence.truncate(prompt_tokens);
  sequence.compress();
  const std::vector<std::uint8_t> before = state_of(context.get(), 0);
  const auto expected = greedy(context.get(), 0, 107, 6);
  sequence.truncate(prompt_tokens);
  EXPECT_EQ(state_of(context.get(), 0), before);
  EXPECT_TRUE(greedy(context.get(), 0, 107, 6) == expected);
  sequence.truncate(prompt_tokens);
  // Into the compression's window the others would go, those that slide have let go of what is before.
  const auto refused = [&](std::size_t position, const std::vector<std::string>& parts) {
    const std::vector<std::uint8_t> held = state_of(context.get(), 0);
    const std::string message = message_of<ArgumentError>([&] { sequence.truncate(position); });
    EXPECT_TRUE(says(message, {"truncate: position is " + std::to_string(position), "sliding window of 32"}))
        << message;
    for (const std::string& part : parts) {
      EXPECT_TRUE(says(message, {part})) << message;
    }
    EXPECT_EQ(state_of(context.get(), 0), held);
  };
  refused(prompt_tokens - 4, {"begins at 115", "holds tokens from 118", "in one batch"});
  // So it is where the cells were used again.
  for (std::uint32_t i = 0; i < 5; ++i) {
    sequence.read(prompt_of(model(), 100, i + 2));
  }
  refused(prompt_tokens + 10, {"begins at 129"});
  sequence.truncate(prompt_tokens + 499);
  EXPECT_EQ(sequence.next_position(), prompt_tokens + 499);
}

TEST_P(LlamaCppSliding, DraftsOfOneBatchAreTakenBackHoweverFullTheCache) {
  const ContextOptions options{.micro_batch = 48, .swa_full = false};
  llama_cpp::Observer observer{shape(), window};
  const Context context = make_context(model(), &observer, options);
  llama_cpp::Sequence sequence{plan_of(shape(), "snapkv", 60), observer, {.context = context.get()}};
  for (std::uint32_t turn = 0; turn < 3; ++turn) {
    sequence.read(prompt_of(model(), 220 + turn, turn + 1));
    sequence.compress();
    const std::size_t position = sequence.next_position();
    const auto expected = decode_one(context.get(), 0, 107);
    for (std::uint32_t draft = 0; draft < 30; ++draft) {
      sequence.truncate(position);
      decode_batch(context.get(), prompt_of(model(), 40, draft + 9));
      sequence.truncate(position);
      EXPECT_LT(difference(expected, decode_one(context.get(), 0, 107)), logits_off) << turn << " " << draft;
    }
    sequence.truncate(position);
    sequence.truncate(position - 1);  // of the compression's window the last token
    EXPECT_TRUE(
        says(message_of<ArgumentError>([&] { sequence.truncate(position - 2); }), {"sliding window"}));
  }
}

// ---- what methods see of the model ----

TEST_P(LlamaCppSliding, HeadsAreThoseOfTheLayersThatSeeAll) {
  const ModelShape of = shape();
  const Layers& global = GetParam().global;
  /// Every layer's head h has score `base`; those of layers that slide are the best.
  const auto scores = [&](double sliding, double of_global) {
    std::vector<std::vector<double>> runs;
    for (std::size_t layer = 0; layer < of.layers; ++layer) {
      const bool sees_all = std::ranges::find(global, layer) != global.end();
      for (std::size_t head = 0; head < of.query_heads; ++head) {
        const auto rank = static_cast<double>((head + layer) % of.query_heads);
        runs.push_back({sees_all ? 0.1 + of_global * rank : sliding * (1.0 + rank)});
      }
    }
    return compresskv::HeadScores(of.layers, of.query_heads, std::move(runs));
  };
  const auto kept = [&](const char* method, const compresskv::HeadScores& by) {
    llama_cpp::Observer observer{of, window};
    const Context context = make_context(model(), &observer, {.micro_batch = 48, .swa_full = false});
    compresskv::MethodSettings settings{.budget = Budget::tokens_per_layer(40), .window = window};
    settings.heads = by.ranking();
    settings.scores = by;
    settings.heads_per_layer = 1;
    settings.model_heads = 2;
    llama_cpp::Sequence sequence{AnyPlan(of, method, settings), observer, {.context = context.get()}};
    sequence.read(prompt_of(model()));
    EXPECT_EQ(sequence.compress().rows_after, 40U);
    EXPECT_EQ(sequence.plan().shape().layers, of.layers);
    EXPECT_EQ(sequence.compressor().plan().shape().layers, global.size());
    std::vector<std::vector<std::uint32_t>> all;
    for (std::size_t i = 0; i < global.size(); ++i) {
      const auto positions = sequence.compressor().retained(i).positions(0);
      all.emplace_back(positions.begin(), positions.end());
    }
    return all;
  };
  for (const char* method : {"compresskv", "carried", "model-wide"}) {
    const auto expected = kept(method, scores(5.0, 0.01));
    EXPECT_EQ(kept(method, scores(0.0, 0.01)), expected) << method;
    EXPECT_NE(kept(method, scores(5.0, -0.01)), expected) << method;
  }
}

TEST_P(LlamaCppSliding, BytesOfABudgetAreThoseOfTheLayersThatSeeAll) {
  const ModelShape of = shape();
  llama_cpp::Observer observer{of, window};
  const Context context = make_context(model(), &observer, {.swa_full = false});
  const std::size_t row = GetParam().global.size() * of.kv_heads * of.kv_row_bytes;
  llama_cpp::Sequence sequence{
      AnyPlan(of, "streaming", {.budget = Budget::bytes(GetParam().tiny.layers * 50 * row)}),
      observer,
      {.context = context.get()}};
  sequence.read(prompt_of(model()));
  EXPECT_EQ(sequence.compress().rows_after,
            (std::min)(prompt_tokens, GetParam().tiny.layers * std::size_t{50}));
}

INSTANTIATE_TEST_SUITE_P(Tiny, LlamaCppSliding, testing::ValuesIn(sliding_models()),
                         [](const auto& test) { return test.param.name; });

}  // namespace
}  // namespace adapt_test
