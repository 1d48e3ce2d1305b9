// Attention over a layer's cache: of a whole prompt (prefill) and of one token (decode).
#pragma once

#include <span>
#include <vector>

#include "kv_cache.hpp"
#include "model.hpp"
#include "thread_pool.hpp"

namespace engine {

/// Causal attention of a prompt over itself; row == position in the cache.
///
/// `queries` and `out` are [tokens, heads * head_dim]. A tile of queries of all heads of a group meets one
/// tile of keys at a time, with a running maximum and sum, so that no [tokens, tokens] matrix exists.
void prefill_attention(const LayerCache& cache, const Matrix& queries, ThreadPool& pool, Matrix& out);

/// Attention of one query over the rows of a KV head, by the library's kernel.
///
/// `query` and `out` are [head_dim]. `row` is resized to the rows and holds the softmax afterwards.
void decode_attention(const LayerCache& cache, int kv_head, std::span<const float> query,
                      std::vector<float>& row, std::span<float> out);

}  // namespace engine
