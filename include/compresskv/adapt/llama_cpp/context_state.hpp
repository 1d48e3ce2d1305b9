#pragma once

#include <llama.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "compresskv/adapt/llama_cpp/model.hpp"
#include "compresskv/core/error.hpp"

namespace compresskv::llama_cpp::detail {

/// A sequence's state as its context holds it. Not a vector: nothing is written before the context writes.
struct StateBytes {
  std::unique_ptr<std::uint8_t[]> memory;
  std::size_t size = 0;

  std::span<std::uint8_t> span() { return {memory.get(), size}; }

  void read(const Place& place) {
    const std::size_t now = llama_state_seq_get_size(place.context, place.sequence);
    if (now > size || memory == nullptr) {
      memory = std::make_unique_for_overwrite<std::uint8_t[]>(now);
    }
    size = now;
    require(size > 0 && llama_state_seq_get_data(place.context, memory.get(), size, place.sequence) == size,
            "libllama did not give the state of sequence ", place.sequence, ": its log says why");
  }
};

inline bool write_state(const Place& place, std::span<const std::uint8_t> bytes) {
  return llama_state_seq_set_data(place.context, bytes.data(), bytes.size(), place.sequence) == bytes.size();
}

inline void remove_sequence(const Place& place) {
  llama_memory_seq_rm(llama_get_memory(place.context), place.sequence, -1, -1);
}

inline bool is_empty(const Place& place) {
  return llama_memory_seq_pos_max(llama_get_memory(place.context), place.sequence) < 0;
}

/// Streams that a context's states have.
inline std::uint32_t streams_of(const llama_context& context) {
  const std::uint32_t sequences = llama_n_seq_max(&context);
  return sequences == 1 || llama_n_ctx_seq(&context) == llama_n_ctx(&context) ? 1 : sequences;
}

}  // namespace compresskv::llama_cpp::detail
