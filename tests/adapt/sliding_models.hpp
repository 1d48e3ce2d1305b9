// Tiny models some of whose layers see a window of tokens alone, and what is compared of them.
#pragma once

#include <gtest/gtest.h>
#include <llama.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <ostream>
#include <span>
#include <string>
#include <vector>

#include "tiny_model.hpp"

namespace adapt_test {

using Layers = std::vector<std::size_t>;

inline constexpr std::uint32_t slide = 32;  // tokens that a sliding layer sees; micro-batches are longer
/// How far logits may lie from those of the same cells in other places, relative to the largest: up to 2.7e-4
/// is seen, with flash attention in f16.
inline constexpr double logits_off = 1e-3;

struct Sliding {
  std::string name;
  Tiny tiny;
  Layers global;
  bool plain_is_observed = true;  // attention without flash attention
};

inline void PrintTo(const Sliding& model, std::ostream* out) { *out << model.name; }

inline const Tiny gemma2{
    .architecture = "gemma2", .layers = 4, .counts = {{"attention.sliding_window", slide}}};
inline const Tiny gemma3{
    .architecture = "gemma3",
    .layers = 6,
    .counts = {{"attention.sliding_window", slide}, {"attention.sliding_window_pattern", 3}}};
inline const Tiny gpt_oss{.architecture = "gpt-oss",
                          .layers = 4,
                          .counts = {{"attention.sliding_window", slide},
                                     {"expert_count", 4},
                                     {"expert_used_count", 2},
                                     {"expert_feed_forward_length", 64}}};

inline std::vector<Sliding> sliding_models() {
  Tiny strong_cap = gemma2;
  strong_cap.numbers = {{"attn_logit_softcapping", 3.0F}};
  Tiny one_global = gemma3;
  one_global.layers = 7;
  one_global.counts.pop_back();  // the family's own pattern
  return {{"gemma2", strong_cap, {1, 3}, false},
          {"gemma3", gemma3, {2, 5}},
          {"gemma3_one_layer_sees_all", one_global, {5}},
          {"gpt_oss", gpt_oss, {1, 3}}};
}

/// The tokens decoded in the batches in which `Sequence::read` decodes them.
inline void decode_batch(llama_context* context, std::vector<llama_token> tokens) {
  const auto count = static_cast<std::int32_t>(tokens.size());
  ASSERT_EQ(llama_decode(context, llama_batch_get_one(tokens.data(), count)), 0);
}

/// The largest difference of logits beside the largest logit.
inline double difference(std::span<const float> a, std::span<const float> b) {
  double largest = 0.0;
  double error = 0.0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    largest = (std::max)(largest, static_cast<double>(std::abs(a[i])));
    error = (std::max)(error, static_cast<double>(std::abs(a[i] - b[i])));
  }
  return error / largest;
}

/// Removes positions [first, end) from the layers that do not slide, by libllama's own means: from all of
/// them, and those that slide are given their part back.
inline void remove_from_global_layers(llama_context* context, llama_pos first, llama_pos end) {
  constexpr llama_state_seq_flags part = LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY;
  std::vector<std::uint8_t> sliding(llama_state_seq_get_size_ext(context, 0, part));
  ASSERT_EQ(llama_state_seq_get_data_ext(context, sliding.data(), sliding.size(), 0, part), sliding.size());
  llama_memory_seq_rm(llama_get_memory(context), 0, first, end);
  ASSERT_EQ(llama_state_seq_set_data_ext(context, sliding.data(), sliding.size(), 0, part), sliding.size());
}

}  // namespace adapt_test
