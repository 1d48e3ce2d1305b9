// Models some of whose layers see a window of tokens alone: contexts that are short for it, and what is
// refused.

#include <gtest/gtest.h>
#include <llama.h>

#include <algorithm>
#include <compresskv/adapt/llama_cpp.hpp>
#include <compresskv/core/error.hpp>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "any_model.hpp"
#include "llama_fixture.hpp"
#include "message_of.hpp"
#include "sliding_models.hpp"
#include "tiny_model.hpp"

namespace adapt_test {
namespace {

using compresskv::ArgumentError;
using compresskv::Error;
using compresskv::test::message_of;
using compresskv::test::says;

TEST(LlamaCppSlidingContext, MayBeShorterThanTheWindow) {
  Tiny wide = gemma3;
  wide.counts[0].second = 400;
  const Model model = make(wide);
  const ModelShape shape = llama_cpp::model_shape(model.get());
  for (const bool swa_full : {true, false}) {
    const ContextOptions options{.cells = 256, .micro_batch = 48, .swa_full = swa_full};
    llama_cpp::Observer observer{shape, window};
    const Context context = make_context(model.get(), &observer, options);
    llama_cpp::Sequence sequence{plan_of(shape, "streaming", 40), observer, {.context = context.get()}};
    sequence.read(prompt_of(model.get()));
    EXPECT_TRUE(std::ranges::equal(sequence.layers(), Layers{2, 5}));
    sequence.compress();
    const auto logits = decode_one(context.get(), 0, 107);
    const Context other = make_context(model.get(), nullptr, options);
    decode_batch(other.get(), prompt_of(model.get()));
    remove_from_global_layers(other.get(), 4, prompt_tokens - 36);
    EXPECT_LT(difference(decode_one(other.get(), 0, 107), logits), logits_off);
    // Nothing has left the window, so all that is kept can be taken back to.
    sequence.truncate(prompt_tokens - 5);
    EXPECT_EQ(sequence.next_position(), prompt_tokens - 5);
    EXPECT_TRUE(
        says(message_of<ArgumentError>([&] { sequence.truncate(50); }), {"position is 50", "evicted"}));
  }
}

// ---- what cannot be ----

TEST(LlamaCppSlidingRefuses, WhatNoGraphHasShown) {
  const Model model = make(gemma3);
  const ModelShape shape = llama_cpp::model_shape(model.get());
  llama_cpp::Observer observer{shape, window};
  const Context blind = make_context(model.get(), nullptr);
  decode_batch(blind.get(), prompt_of(model.get()));
  llama_cpp::Sequence sequence{plan_of(shape, "keydiff", 40), observer, {.context = blind.get()}};
  const std::vector<std::uint8_t> before = state_of(blind.get(), 0);
  EXPECT_TRUE(says(message_of<ArgumentError>([&] { sequence.compress(); }),
                   {"no graph has shown yet which they are", "that the observer was attached to"}));
  EXPECT_EQ(state_of(blind.get(), 0), before);
  // Any batch in any context of the model will do.
  const Context seen = make_context(model.get(), &observer);
  llama_token token = 107;
  ASSERT_EQ(observer.decode(seen.get(), llama_batch_get_one(&token, 1)), 0);
  EXPECT_EQ(sequence.compress().rows_after, 40U);
}

TEST(LlamaCppSlidingRefuses, AndLeavesTheSequenceAsItWas) {
  const Model model = make(gemma3);
  const ModelShape shape = llama_cpp::model_shape(model.get());
  llama_cpp::Observer observer{shape, window};
  const Context context = make_context(model.get(), &observer, {.micro_batch = 48, .swa_full = false});
  const llama_cpp::Place place{.context = context.get()};
  llama_cpp::Sequence sequence{plan_of(shape, "snapkv", 40), observer, place};
  sequence.read(prompt_of(model.get()));
  const std::vector<std::uint8_t> before = state_of(context.get(), 0);
  for (const char* method : {"adakv", "pyramidkv", "cake"}) {
    llama_cpp::Sequence uneven{plan_of(shape, method, 40), observer, place};
    EXPECT_TRUE(
        says(message_of<ArgumentError>([&] { uneven.compress(); }), {method, "rows of layer", "uniform"}));
    EXPECT_EQ(state_of(context.get(), 0), before);
    EXPECT_EQ(observer.seen(place, prompt_tokens), window);
  }
  llama_memory_seq_rm(llama_get_memory(context.get()), 0, 10, 20);
  EXPECT_TRUE(says(message_of<ArgumentError>([&] { sequence.compress(); }), {"140 cells", "by others"}));
}

TEST(LlamaCppSlidingRefuses, ModelsAllOfWhoseLayersSlide) {
  Tiny three = gemma3;
  three.layers = 3;
  three.counts.pop_back();
  const Model model = make(three);
  const ModelShape shape = llama_cpp::model_shape(model.get());
  llama_cpp::Observer observer{shape, window};
  const Context context = make_context(model.get(), &observer);
  std::vector<llama_token> tokens = prompt_of(model.get());
  EXPECT_TRUE(says(message_of<ArgumentError>([&] {
                     observer.decode(context.get(), llama_batch_get_one(tokens.data(), prompt_tokens));
                   }),
                   {"all layers of the model slide over 32 tokens", "no layer to compress"}));
}

TEST(LlamaCppSlidingRefuses, AttentionThatIsCappedOutsideOfFlashAttention) {
  const Model model = make(gemma2);
  const ModelShape shape = llama_cpp::model_shape(model.get());
  llama_cpp::Observer observer{shape, window};
  const Context context = make_context(model.get(), &observer, {.flash_attention = false});
  std::vector<llama_token> tokens = prompt_of(model.get());
  EXPECT_TRUE(says(message_of<ArgumentError>([&] {
                     observer.decode(context.get(), llama_batch_get_one(tokens.data(), prompt_tokens));
                   }),
                   {"soft cap", "turn flash attention on"}));
}

TEST(LlamaCppSlidingRefuses, ContextsWithoutRoomForTheWindow) {
  Tiny wide = gemma3;
  wide.counts[0].second = 400;
  const Model model = make(wide);
  const ModelShape shape = llama_cpp::model_shape(model.get());
  llama_cpp::Observer observer{shape, window};
  const Context context = make_context(model.get(), &observer);
  const Context small = make_context(model.get(), nullptr, {.cells = 256});
  llama_cpp::Sequence sequence{plan_of(shape, "snapkv", 40), observer, {.context = context.get()}};
  sequence.read(prompt_of(model.get(), 500));
  const std::vector<std::uint8_t> before = state_of(context.get(), 0);
  EXPECT_TRUE(says(message_of<Error>([&] { sequence.compress_into({.context = small.get()}); }),
                   {"did not take the state", "too few free cells"}));
  EXPECT_EQ(llama_memory_seq_pos_max(llama_get_memory(small.get()), 0), -1);
  EXPECT_EQ(state_of(context.get(), 0), before);
  EXPECT_EQ(sequence.compress().rows_after, 40U);
}

}  // namespace
}  // namespace adapt_test
