// Decoding the tensor types of GGUF to float32.
//
// A quantised tensor is a row of blocks, each a scale (or several) and small integers packed into bytes; the
// layouts are those of ggml, and each decoder gives the bits that the Python package `gguf` gives
// (tools/check_dequantise.py).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "gguf.hpp"

namespace engine {

/// A block of `elements` numbers in `bytes` bytes; {1, 4} for F32.
struct BlockShape {
  std::size_t elements = 0;
  std::size_t bytes = 0;
};

/// Whether this engine can decode the type.
bool is_supported(TensorType type);

/// The block of a type. Throws Error naming the type when there is no decoder for it.
BlockShape block_shape(TensorType type);

/// Decodes whole blocks: `bytes` holds `out.size() / elements * bytes` bytes of `type`.
/// Throws Error when the type has no decoder or the two sizes do not agree.
void dequantise(TensorType type, std::span<const std::byte> bytes, std::span<float> out);

}  // namespace engine
