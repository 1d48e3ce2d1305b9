// The engine llama.cpp, where libllama was found; model.cpp has it, else missing.cpp says that it is not
// there.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "../model_engine.hpp"

namespace ckv {

/// Whether this tool was built with libllama.
bool has_llama_cpp();

/// Throws engine::Error. `threads` 0: as many as the machine has.
std::unique_ptr<ModelEngine> load_llama_cpp(const std::filesystem::path& path, int threads);

/// What llama.cpp says of a model.
struct LlamaFacts {
  std::unique_ptr<ModelEngine> model = nullptr;
  std::string name = {};
  std::string architecture = {};
  std::string description = {};  ///< size and type of the weights, in llama.cpp's words
  std::uint64_t parameters = 0;
  std::size_t query_heads = 0;
  std::size_t kv_heads = 0;
  std::size_t embedding = 0;
  std::size_t vocabulary = 0;
  std::string why_no_chat = {};  ///< empty where llama.cpp knows the chat template
  std::string why_not = {};      ///< why its cache cannot be compressed; empty where it can
};

/// Throws engine::Error where libllama cannot load it.
LlamaFacts inspect_llama_cpp(const std::filesystem::path& path);

/// A prompt that was read once in llama.cpp, to be answered from its whole cache and from compressed copies.
class LlamaPrompt {
 public:
  struct Answer {
    std::string text;
    std::vector<std::vector<std::vector<std::uint32_t>>> kept = {};  ///< as RunResult::kept; empty: all
    double compress_ms = 0.0;
  };

  LlamaPrompt() = default;
  LlamaPrompt(const LlamaPrompt&) = delete;
  LlamaPrompt& operator=(const LlamaPrompt&) = delete;
  virtual ~LlamaPrompt() = default;

  virtual double prefill_ms() const = 0;

  /// Decodes greedily until the text is `enough`, or the answer ends. The window is at most that
  /// which the prompt was read with; `full` answers from the whole cache.
  virtual Answer answer(const Compression& how, const std::function<bool(const std::string&)>& enough) = 0;
};

struct ReadOptions {
  engine::KvType kv_type = engine::KvType::f32;
  std::size_t window = 8;  ///< the widest that is to be used
  std::size_t max_new_tokens = 32;
  std::function<void(double)> progress = {};  ///< share of the prompt that is read
};

/// `model` must be of `load_llama_cpp` and outlive the result. Throws engine::Error.
std::unique_ptr<LlamaPrompt> read_in_llama_cpp(const ModelEngine& model, std::span<const TokenId> prompt,
                                               const ReadOptions& options);

}  // namespace ckv
