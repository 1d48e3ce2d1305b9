// The real model in libllama, loaded once a process.
#pragma once

#include <gtest/gtest.h>
#include <llama.h>

#include <algorithm>
#include <compresskv/adapt/llama_cpp.hpp>
#include <compresskv/io/calibration_files.hpp>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <memory>
#include <span>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace adapt_test {

using compresskv::AnyPlan;
using compresskv::ModelShape;
namespace llama_cpp = compresskv::llama_cpp;

struct Free {
  void operator()(llama_model* model) const { llama_model_free(model); }
  void operator()(llama_context* context) const { llama_free(context); }
};
using Model = std::unique_ptr<llama_model, Free>;
using Context = std::unique_ptr<llama_context, Free>;

inline std::string model_path(const char* variable = "COMPRESSKV_TEST_MODEL") {
  const char* path = std::getenv(variable);
  return path == nullptr ? std::string() : std::string(path);
}

inline void start_libllama() {
  static const bool once = [] {
    // Failures are provoked here on purpose: what libllama says of them is no news.
    llama_log_set([](ggml_log_level, const char*, void*) {}, nullptr);
    llama_backend_init();
    return true;
  }();
  static_cast<void>(once);
}

inline Model load(const std::string& path, const llama_model_params& params = llama_model_default_params()) {
  start_libllama();
  Model model(llama_model_load_from_file(path.c_str(), params));
  if (!model) {
    throw std::runtime_error("libllama cannot load " + path);
  }
  return model;
}

inline llama_model* model() {
  static const Model loaded = load(model_path());
  return loaded.get();
}

struct ContextOptions {
  std::uint32_t cells = 2048;
  std::uint32_t sequences = 1;
  bool flash_attention = true;
  bool unified = true;
  ggml_type type_k = GGML_TYPE_F16;
  ggml_type type_v = GGML_TYPE_F16;
  std::uint32_t micro_batch = 512;
  bool swa_full = true;  // as libllama has it where nothing is said
};

inline llama_context_params context_params(const ContextOptions& options) {
  llama_context_params params = llama_context_default_params();
  params.n_ctx = options.cells;
  params.n_batch = (std::max)(options.micro_batch, 512U);
  params.n_ubatch = options.micro_batch;
  params.n_seq_max = options.sequences;
  params.kv_unified = options.unified;
  params.flash_attn_type =
      options.flash_attention ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
  params.type_k = options.type_k;
  params.type_v = options.type_v;
  params.swa_full = options.swa_full;
  return params;
}

inline Context make_context(llama_model* of, llama_context_params params) {
  // Threads of a tiny model would only wait for one another.
  params.n_threads = llama_model_n_params(of) < 10'000'000 ? 1 : 2;
  params.n_threads_batch = params.n_threads;
  Context context(llama_init_from_model(of, params));
  if (!context) {
    throw std::runtime_error("libllama cannot make the context");
  }
  return context;
}

inline Context make_context(llama_model* of, llama_cpp::Observer* observer,
                            const ContextOptions& options = {}) {
  llama_context_params params = context_params(options);
  if (observer != nullptr) {
    observer->attach(params);
  }
  return make_context(of, params);
}

inline std::vector<llama_token> tokens_of(llama_model* of, const std::string& text) {
  const llama_vocab* vocab = llama_model_get_vocab(of);
  std::vector<llama_token> tokens(text.size() + 8);
  const std::int32_t count =
      llama_tokenize(vocab, text.c_str(), static_cast<std::int32_t>(text.size()), tokens.data(),
                     static_cast<std::int32_t>(tokens.size()), true, true);
  tokens.resize(static_cast<std::size_t>((std::max)(count, 0)));
  return tokens;
}

/// Pseudo-random tokens: what they say does not matter here. From 100 on there are no special ones.
inline std::vector<llama_token> some_tokens(std::size_t count, std::uint32_t seed = 1,
                                            std::uint32_t different = 20000) {
  std::vector<llama_token> tokens(count);
  std::uint32_t state = seed * 2654435761U + 1;
  for (llama_token& token : tokens) {
    state = state * 1664525U + 1013904223U;
    token = static_cast<llama_token>(100 + (state >> 8U) % different);
  }
  return tokens;
}

/// One token behind what the sequence has; its logits.
inline std::vector<float> decode_one(llama_context* context, llama_seq_id sequence, llama_token token) {
  llama_pos position = llama_memory_seq_pos_max(llama_get_memory(context), sequence) + 1;
  std::int32_t one = 1;
  llama_seq_id* ids = &sequence;
  std::int8_t logits = 1;
  const std::int32_t status = llama_decode(context, llama_batch{.n_tokens = 1,
                                                                .token = &token,
                                                                .embd = nullptr,
                                                                .pos = &position,
                                                                .n_seq_id = &one,
                                                                .seq_id = &ids,
                                                                .logits = &logits});
  EXPECT_EQ(status, 0);
  const float* all = llama_get_logits_ith(context, 0);
  const auto size =
      static_cast<std::size_t>(llama_vocab_n_tokens(llama_model_get_vocab(llama_get_model(context))));
  return {all, all + size};
}

inline llama_token best(std::span<const float> logits) {
  return static_cast<llama_token>(std::ranges::max_element(logits) - logits.begin());
}

/// Logits of the last token of what was read, then of `count` - 1 greedy ones behind it.
inline std::vector<std::vector<float>> greedy(llama_context* context, llama_seq_id sequence,
                                              llama_token first, std::size_t count) {
  std::vector<std::vector<float>> all;
  llama_token token = first;
  for (std::size_t i = 0; i < count; ++i) {
    all.push_back(decode_one(context, sequence, token));
    token = best(all.back());
  }
  return all;
}

inline std::string text_of(llama_model* of, std::span<const std::vector<float>> logits) {
  std::string text;
  for (const std::vector<float>& step : logits) {
    std::array<char, 128> piece{};
    const std::int32_t size = llama_token_to_piece(llama_model_get_vocab(of), best(step), piece.data(),
                                                   static_cast<std::int32_t>(piece.size()), 0, true);
    text.append(piece.data(), static_cast<std::size_t>((std::max)(size, 0)));
  }
  return text;
}

inline std::vector<std::uint8_t> state_of(llama_context* context, llama_seq_id sequence) {
  std::vector<std::uint8_t> bytes(llama_state_seq_get_size(context, sequence));
  EXPECT_EQ(llama_state_seq_get_data(context, bytes.data(), bytes.size(), sequence), bytes.size());
  return bytes;
}

inline std::filesystem::path calibration(const char* ending) {
  return std::filesystem::path(COMPRESSKV_SOURCE_DIR) / "examples/models/smollm2-135m-instruct" /
         (std::string("SmolLM2-135M-Instruct") + ending);
}

/// A plan for the real model, by name, with the calibration in the repository.
inline AnyPlan plan(std::string_view method, const compresskv::Budget& budget, std::size_t window = 8) {
  compresskv::MethodSettings settings{.budget = budget, .window = window};
  settings.heads = compresskv::io::load_head_ranking(calibration("_head_idx.json"));
  settings.scores = compresskv::io::load_head_scores(calibration("_head_scores.json"));
  return {llama_cpp::model_shape(model()), method, settings};
}

class RealModel : public testing::Test {
 protected:
  void SetUp() override {
    if (model_path().empty()) {
      GTEST_SKIP() << "COMPRESSKV_TEST_MODEL is not set: name the .gguf file that scripts/model.sh fetches";
    }
  }
};

}  // namespace adapt_test
