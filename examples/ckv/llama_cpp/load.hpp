// The engine llama.cpp, where libllama was found; model.cpp has it, else missing.cpp says that it is not
// there.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
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
  std::vector<std::size_t> sliding_layers = {};  ///< that are not compressed
  std::size_t sliding_window = 0;                ///< tokens that they see
  std::string chat = {};                         ///< who lays out a conversation, for people
  std::string why_no_chat = {};                  ///< empty where somebody does
  std::string why_not = {};                      ///< why its cache cannot be compressed; empty where it can
};

/// Throws engine::Error where libllama cannot load it.
LlamaFacts inspect_llama_cpp(const std::filesystem::path& path);

}  // namespace ckv
