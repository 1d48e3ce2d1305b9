#pragma once

#include <cstddef>

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

  /// Throws ArgumentError when a count is zero or the KV heads do not divide the query heads.
  void validate() const {
    detail::require(layers > 0, "ModelShape::layers is 0: give the model's number of layers");
    detail::require(query_heads > 0, "ModelShape::query_heads is 0: give the model's query heads a layer");
    detail::require(kv_heads > 0, "ModelShape::kv_heads is 0: give the model's KV heads a layer");
    detail::require(head_dim > 0, "ModelShape::head_dim is 0: give the elements of one key row");
    detail::require(query_heads % kv_heads == 0, "ModelShape::query_heads is ", query_heads,
                    ", not a multiple of kv_heads ", kv_heads,
                    ": each KV head must serve the same number of query heads");
  }
};

}  // namespace compresskv
