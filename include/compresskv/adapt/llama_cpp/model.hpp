#pragma once

#include <llama.h>

#include <array>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <system_error>

#include "compresskv/core/error.hpp"
#include "compresskv/core/shape.hpp"

namespace compresskv::llama_cpp {

/// One sequence of a context.
struct Place {
  llama_context* context = nullptr;
  llama_seq_id sequence = 0;
};

namespace detail {

using compresskv::detail::fail;
using compresskv::detail::require;

/// A value of the model's metadata as text; empty where it is not there.
inline std::string metadata(const llama_model& model, const std::string& key) {
  std::array<char, 64> text{};
  llama_model_meta_val_str(&model, key.c_str(), text.data(), text.size());
  return text.data();
}

/// A value of the model's family: its key follows the name of the architecture.
inline std::string family_metadata(const llama_model& model, const std::string& key) {
  return metadata(model, metadata(model, "general.architecture") + "." + key);
}

/// The same as a count; 0 where it is not there, or is a list with an entry a layer.
inline std::size_t family_count(const llama_model& model, const std::string& key) {
  const std::string text = family_metadata(model, key);
  std::size_t count = 0;
  const char* end = text.data() + text.size();
  const auto [rest, error] = std::from_chars(text.data(), end, count);
  return error == std::errc{} && rest == end ? count : 0;
}

/// Whether positions are added to the logits (ALiBi): the metadata says so, or libllama knows it of the
/// family. The graph shows it, too (`Observer`), but methods that look at no queries need not be observed.
inline bool has_alibi(const llama_model& model) {
  const std::string architecture = metadata(model, "general.architecture");
  return std::strtof(family_metadata(model, "attention.max_alibi_bias").c_str(), nullptr) > 0.0F ||
         architecture == "bloom" || architecture == "refact" ||
         (architecture == "baichuan" && llama_model_n_layer(&model) == 40);
}

inline void check_model(const llama_model& model) {
  require(!llama_model_is_recurrent(&model) && !llama_model_is_hybrid(&model),
          "the model has recurrent layers, whose state is no KV cache: it is not compressed here");
  const llama_rope_type rope = llama_model_rope_type(&model);
  require(rope == LLAMA_ROPE_TYPE_NONE || rope == LLAMA_ROPE_TYPE_NORM || rope == LLAMA_ROPE_TYPE_NEOX,
          "the model has M-RoPE, several positions a token: it is not compressed here");
  require(!has_alibi(model),
          "the model has ALiBi, whose logits depend on where cells lie: it is not compressed here");
}

/// Throws ArgumentError where a place is none: libllama would end the program.
inline void check_place(const Place& place) {
  require(place.context != nullptr, "context is null: give the llama_context that the sequence is in");
  require(place.sequence >= 0 && static_cast<std::uint32_t>(place.sequence) < llama_n_seq_max(place.context),
          "sequence is ", place.sequence, ", the context has sequences 0 to ",
          llama_n_seq_max(place.context) - 1, ": make it with a greater n_seq_max");
  require(llama_get_memory(place.context) != nullptr,
          "the context has no memory: its model keeps no KV cache");
}

}  // namespace detail

/// The shape of a model's KV cache: `kv_row_bytes` for contexts of these element types. Its layers are all of
/// the model's, those with a sliding window too: `Sequence` compresses the others (`Sequence::layers`).
/// Throws ArgumentError for models that are not compressed: recurrent and hybrid ones, M-RoPE, ALiBi, MLA.
/// Models whose layers differ are refused when their first state is looked at.
inline ModelShape model_shape(const llama_model* model, ggml_type type_k = GGML_TYPE_F16,
                              ggml_type type_v = GGML_TYPE_F16) {
  detail::require(model != nullptr, "model is null: give the llama_model that is to be compressed");
  detail::check_model(*model);
  const auto count = [](std::int32_t value) { return value > 0 ? static_cast<std::size_t>(value) : 0; };
  ModelShape shape{.layers = count(llama_model_n_layer(model)) - count(llama_model_n_layer_nextn(model)),
                   .query_heads = count(llama_model_n_head(model)),
                   .kv_heads = count(llama_model_n_head_kv(model))};
  const std::size_t plain = shape.query_heads == 0 ? 0 : count(llama_model_n_embd(model)) / shape.query_heads;
  const std::size_t key_dim = detail::family_count(*model, "attention.key_length");
  const std::size_t value_dim = detail::family_count(*model, "attention.value_length");
  shape.head_dim = key_dim == 0 ? plain : key_dim;
  detail::require(shape.head_dim == (value_dim == 0 ? plain : value_dim), "the model's keys have ",
                  shape.head_dim, " elements a head, its values ", value_dim,
                  ": such caches (MLA) are not compressed here");
  const auto bytes = [&](ggml_type type) {
    return ggml_row_size(type, static_cast<std::int64_t>(shape.head_dim));
  };
  shape.kv_row_bytes = bytes(type_k) + bytes(type_v);
  shape.validate();
  return shape;
}

}  // namespace compresskv::llama_cpp
