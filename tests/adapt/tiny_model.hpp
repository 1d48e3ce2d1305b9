// Models of other families, tiny and of random weights. Only their metadata is written here: libllama makes
// the tensors that a family has and asks for their elements.
#pragma once

#include <gguf.h>
#include <llama.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "llama_fixture.hpp"
#include "reference/random.hpp"

namespace adapt_test {

/// What a family's metadata says.
struct Tiny {
  std::string architecture;
  std::uint32_t layers = 3;
  std::uint32_t width = 128;
  std::uint32_t query_heads = 4;
  std::uint32_t kv_heads = 2;
  std::uint32_t head_dim = 32;
  std::vector<std::pair<std::string, std::uint32_t>> counts = {};
  std::vector<std::pair<std::string, float>> numbers = {};
  std::vector<std::pair<std::string, bool>> flags = {};
  std::vector<std::pair<std::string, std::vector<std::uint32_t>>> lists = {};
};

namespace detail {

inline std::uint64_t seed_of(std::string_view name) {
  std::uint64_t seed = 14695981039346656037U;
  for (const char letter : name) {
    seed = (seed ^ static_cast<unsigned char>(letter)) * 1099511628211U;
  }
  return seed;
}

/// Weights that keep what they multiply at a size of about one, so that attention has something to choose;
/// the same ones on every machine.
inline void fill(ggml_tensor* tensor, void*) {
  const std::string_view name = tensor->name;
  compresskv::reference::Random random(seed_of(name));
  const bool matrix = tensor->ne[1] > 1;
  const bool embedding = name.starts_with("token_embd") || name.starts_with("position_embd");
  const bool norm = !matrix && name.find("norm") != std::string_view::npos && name.ends_with("weight");
  const float size = embedding ? 1.0F : matrix ? 1.5F / std::sqrt(static_cast<float>(tensor->ne[0])) : 0.2F;
  std::vector<float> elements(static_cast<std::size_t>(ggml_nelements(tensor)));
  for (float& element : elements) {
    element = size * random.gaussian() + (norm ? 1.0F : 0.0F);
    // The decay of a recurrent state.
    if (name.find("ssm_a") != std::string_view::npos) {
      element = -std::abs(element);
    }
  }
  ggml_backend_tensor_set(tensor, elements.data(), 0, ggml_nbytes(tensor));
}

struct FreeGguf {
  void operator()(gguf_context* file) const { gguf_free(file); }
};

}  // namespace detail

inline constexpr std::uint32_t tiny_tokens = 300;

/// `vocabulary` names a GGUF file whose tokenizer the model gets; without, it knows `tiny_tokens` numbers.
inline Model make(const Tiny& tiny, const llama_model_params& params = llama_model_default_params(),
                  const std::string& vocabulary = {}) {
  start_libllama();
  const std::unique_ptr<gguf_context, detail::FreeGguf> file(gguf_init_empty());
  if (!vocabulary.empty()) {
    const std::unique_ptr<gguf_context, detail::FreeGguf> other(
        gguf_init_from_file(vocabulary.c_str(), {.no_alloc = true, .ctx = nullptr}));
    gguf_set_kv(file.get(), other.get());
  }
  gguf_set_val_str(file.get(), "general.architecture", tiny.architecture.c_str());
  const auto key = [&](const std::string& name) { return tiny.architecture + "." + name; };
  const auto count = [&](const std::string& name, std::uint32_t value) {
    gguf_set_val_u32(file.get(), key(name).c_str(), value);
  };
  const auto number = [&](const std::string& name, float value) {
    gguf_set_val_f32(file.get(), key(name).c_str(), value);
  };
  if (vocabulary.empty()) {
    gguf_set_val_str(file.get(), "tokenizer.ggml.model", "none");
    count("vocab_size", tiny_tokens);
  }
  count("context_length", 1024);
  count("embedding_length", tiny.width);
  count("block_count", tiny.layers);
  count("feed_forward_length", 2 * tiny.width);
  count("attention.head_count", tiny.query_heads);
  count("attention.head_count_kv", tiny.kv_heads);
  count("attention.key_length", tiny.head_dim);
  count("attention.value_length", tiny.head_dim);
  number("attention.layer_norm_epsilon", 1e-5F);
  number("attention.layer_norm_rms_epsilon", 1e-5F);
  for (const auto& [name, value] : tiny.counts) {
    count(name, value);
  }
  for (const auto& [name, value] : tiny.numbers) {
    number(name, value);
  }
  for (const auto& [name, value] : tiny.flags) {
    gguf_set_val_bool(file.get(), key(name).c_str(), value);
  }
  for (const auto& [name, values] : tiny.lists) {
    gguf_set_arr_data(file.get(), key(name).c_str(), GGUF_TYPE_UINT32, values.data(), values.size());
  }
  Model model(llama_model_init_from_user(file.get(), &detail::fill, nullptr, params));
  if (!model) {
    throw std::runtime_error("libllama cannot make a model of " + tiny.architecture);
  }
  return model;
}

}  // namespace adapt_test
