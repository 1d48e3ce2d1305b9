// Attention over a layer's cache: of a prompt or a chunk of one (prefill), and of one token (decode).
#pragma once

#include <span>
#include <vector>

#include "kv_cache.hpp"
#include "model.hpp"
#include "thread_pool.hpp"

namespace engine {

/// Attention of the tokens whose rows are the last of every KV head: each to all rows before theirs, of which
/// heads may hold different numbers, and causally to one another.
///
/// `queries` and `out` are [tokens, heads * head_dim]. A tile of queries of all heads of a group meets one
/// tile of keys at a time, with a running maximum and sum, so that no [tokens, rows] matrix exists. Tiles of
/// keys start at fixed rows and a query's sums go from row to row: chunks give the same bits as a prompt in
/// one go.
void prefill_attention(const LayerCache& cache, const Matrix& queries, ThreadPool& pool, Matrix& out);

/// Attention of one query over the rows of a KV head, by the library's kernel.
///
/// `query` and `out` are [head_dim]. `row` is resized to the rows and holds the softmax afterwards.
void decode_attention(const LayerCache& cache, int kv_head, std::span<const float> query,
                      std::vector<float>& row, std::span<float> out);

}  // namespace engine
