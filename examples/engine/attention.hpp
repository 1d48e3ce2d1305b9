// Attention over a layer's cache: of a whole prompt (prefill) and of one token (decode).
#pragma once

#include <cstddef>
#include <span>

#include "kv_cache.hpp"
#include "model.hpp"

namespace engine {

/// Causal attention of a prompt over itself; row == position in the cache.
///
/// `queries` and `out` are [tokens, heads * head_dim]. Works on a tile of queries of all heads of a group
/// against one tile of keys at a time, with a running maximum and sum, so that no [tokens, tokens] matrix
/// exists.
void prefill_attention(const LayerCache& cache, const Matrix& queries, int threads, Matrix& out);

/// Attention of one query head over the rows of its KV head.
///
/// `query` and `out` are [head_dim]. `row` is resized to the rows and holds the softmax afterwards.
void decode_attention(const LayerCache& cache, int kv_head, std::span<const float> query, Vector& row,
                      std::span<float> out);

}  // namespace engine
