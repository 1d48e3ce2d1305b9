#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>

#include "compresskv/core/error.hpp"

namespace compresskv {

/// The shape of a model's attention, the same in every layer.
///
/// In a tensor-parallel engine each rank describes what it holds: its own heads, not the model's.
struct ModelShape {
  std::size_t layers = 0;
  std::size_t query_heads = 0;  ///< H
  std::size_t kv_heads = 0;     ///< K, divides H
  std::size_t head_dim = 0;     ///< d, elements of one key or value row
  /// Bytes of one K row and one V row of one KV head together, e.g. `2 * head_dim * sizeof(T)`. Only a budget
  /// in bytes asks for it; 0 means not given.
  std::size_t kv_row_bytes = 0;

  /// G = H / K: so many consecutive query heads read the same KV head.
  constexpr std::size_t group() const { return query_heads / kv_heads; }

  /// Bytes of one row of all KV heads of all layers; 0 where `kv_row_bytes` is not given. Throws
  /// ArgumentError where they are beyond 64 bits.
  std::size_t token_bytes() const {
    std::size_t rows = 0;
    std::size_t bytes = 0;
    detail::require(!__builtin_mul_overflow(layers, kv_heads, &rows) &&
                        !__builtin_mul_overflow(rows, kv_row_bytes, &bytes),
                    "ModelShape: ", layers, " layers of ", kv_heads, " KV heads of kv_row_bytes ",
                    kv_row_bytes,
                    " are beyond 64 bits: give the bytes of one K and one V row of one KV head");
    return bytes;
  }

  /// Throws ArgumentError when a count is zero, the KV heads do not divide the query heads, or a product of
  /// sizes is beyond what the library counts with.
  void validate() const {
    detail::require(layers > 0, "ModelShape::layers is 0: give the model's number of layers");
    detail::require(query_heads > 0, "ModelShape::query_heads is 0: give the model's query heads a layer");
    detail::require(kv_heads > 0, "ModelShape::kv_heads is 0: give the model's KV heads a layer");
    detail::require(head_dim > 0, "ModelShape::head_dim is 0: give the elements of one key row");
    detail::require(query_heads % kv_heads == 0, "ModelShape::query_heads is ", query_heads,
                    ", not a multiple of kv_heads ", kv_heads,
                    ": each KV head must serve the same number of query heads");
    // What is counted: bytes of float32 queries of all heads, all layers' heads; heads have 32 bits.
    std::size_t heads = 0;
    std::size_t bytes = 0;
    detail::require(query_heads <= (std::numeric_limits<std::uint32_t>::max)() &&
                        !__builtin_mul_overflow(layers, query_heads, &heads) &&
                        !__builtin_mul_overflow(heads, head_dim, &bytes) &&
                        !__builtin_mul_overflow(bytes, 2 * sizeof(double), &bytes),
                    "ModelShape: ", layers, " layers of ", query_heads, " query heads of head_dim ", head_dim,
                    " are beyond 64 bits: give the sizes of a model");
    token_bytes();
  }
};

}  // namespace compresskv
