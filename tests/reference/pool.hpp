#pragma once

#include <compresskv/core/retained.hpp>
#include <compresskv/view/layout.hpp>
#include <compresskv/view/paged_kv.hpp>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <numeric>
#include <span>
#include <utility>
#include <vector>

#include "reference/cache.hpp"
#include "reference/random.hpp"

namespace compresskv::reference {

using Blocks = std::vector<std::int32_t>;

inline Blocks shuffled_blocks(std::size_t count, std::size_t pool_blocks, Random& random) {
  Blocks all(pool_blocks);
  std::iota(all.begin(), all.end(), 0);
  for (std::size_t i = pool_blocks; i > 1; --i) {
    std::swap(all[i - 1], all[random.below(i)]);
  }
  all.resize(count);
  return all;
}

using LayoutFunction = std::function<layout::Strides(const layout::Extents&)>;

inline LayoutFunction arranged(Arrangement arrangement) {
  return [arrangement](const layout::Extents& e) {
    return strides_of(arrangement, {.kv_heads = e.kv_heads, .rows = e.rows, .head_dim = e.units}, e.rows);
  };
}

struct PoolLayout {
  std::size_t block_rows = 4;
  LayoutFunction keys = layout::head_token_dim;
  LayoutFunction values = layout::head_token_dim;
  bool one_buffer = false;   ///< blocks of keys and of values take turns in one pool
  bool heads_apart = false;  ///< `[kv_head][block][row][dim]`, whatever `keys` and `values` say
};

/// A pool of blocks in exactly the memory that they reach, and the table of one sequence in it. Memory that
/// no sequence holds is filled with noise.
struct Pool {
  PagedShape shape;
  layout::Strides key_strides;
  layout::Strides value_strides;
  std::size_t key_block = 0;  // from block to block
  std::size_t value_block = 0;
  std::size_t first_value = 0;  // of the values in `keys`, where one buffer holds both
  Blocks table;
  Blocks references;
  std::vector<std::size_t> head_rows;  // rows in use of each KV head; empty: shape.rows
  std::vector<float> keys;
  std::vector<float> values;

  /// Holds a sequence of `cache`'s rows in blocks anywhere.
  Pool(const Cache<float>& cache, const PoolLayout& layout, Random& random) {
    const std::size_t blocks = (cache.shape.rows + layout.block_rows - 1) / layout.block_rows;
    shape = {.kv_heads = cache.shape.kv_heads,
             .rows = cache.shape.rows,
             .head_dim = cache.shape.head_dim,
             .block_rows = layout.block_rows,
             .pool_blocks = 2 * blocks + 3};
    const layout::Extents block{
        .kv_heads = shape.kv_heads, .rows = shape.block_rows, .units = shape.head_dim};
    const std::size_t block_of_head = shape.block_rows * shape.head_dim;
    const layout::Strides apart{.head = shape.pool_blocks * block_of_head, .row = shape.head_dim};
    key_strides = layout.heads_apart ? apart : layout.keys(block);
    value_strides = layout.heads_apart ? apart : layout.values(block);
    const std::size_t key_reach = reach(key_strides);
    const std::size_t value_reach = reach(value_strides);
    key_block = layout.heads_apart ? block_of_head : key_reach;
    value_block = layout.heads_apart ? block_of_head : value_reach;
    if (layout.one_buffer) {
      first_value = key_reach;
      key_block = value_block = key_reach + value_reach;
    }
    if (layout.one_buffer || layout.heads_apart) {
      shape.key_block_stride = key_block;
      shape.value_block_stride = value_block;
    }
    const std::size_t others = shape.pool_blocks - 1;
    keys.resize(others * key_block + (layout.one_buffer ? key_block : key_reach));
    values.resize(layout.one_buffer ? 0 : others * value_block + value_reach);
    for (std::vector<float>* buffer : {&keys, &values}) {
      for (float& x : *buffer) {
        x = random.gaussian();
      }
    }
    table = shuffled_blocks(blocks, shape.pool_blocks, random);
    load(cache, table);
  }

  void set_rows(const std::vector<std::size_t>& rows) { head_rows = rows; }

  PagedKv<float> view(std::span<const std::int32_t> blocks) {
    PagedShape now = shape;
    if (!head_rows.empty()) {
      now.head_rows = head_rows;
    }
    return {keys, value_pool(), now, blocks, key_strides, value_strides, references};
  }
  PagedKv<float> view() { return view(table); }

  /// Fills the table's rows with those of a contiguous cache.
  void load(const Cache<float>& cache, const Blocks& blocks) {
    for (std::size_t head = 0; head < shape.kv_heads; ++head) {
      for (std::size_t row = 0; row < cache.shape.rows; ++row) {
        for (std::size_t dim = 0; dim < shape.head_dim; ++dim) {
          key(blocks, head, row, dim) = cache.keys[cache.at(head, row, dim)];
          value(blocks, head, row, dim) = cache.values[cache.value_at(head, row, dim)];
        }
      }
    }
  }

  /// Whether the first rows of each head are those of `cache`, bit for bit.
  bool holds(const Cache<float>& cache, const Blocks& blocks, const std::vector<std::size_t>& rows) {
    for (std::size_t head = 0; head < shape.kv_heads; ++head) {
      for (std::size_t row = 0; row < rows[head]; ++row) {
        for (std::size_t dim = 0; dim < shape.head_dim; ++dim) {
          if (key(blocks, head, row, dim) != cache.keys[cache.at(head, row, dim)] ||
              value(blocks, head, row, dim) != cache.values[cache.value_at(head, row, dim)]) {
            return false;
          }
        }
      }
    }
    return true;
  }

  /// As `Cache::compacted`.
  template <class RowsOf>
  Pool compacted(RowsOf&& rows_of) const {
    Pool expected = *this;
    Pool original = *this;
    for (std::size_t head = 0; head < shape.kv_heads; ++head) {
      std::size_t to = 0;
      for (const std::size_t from : rows_of(head)) {
        for (std::size_t dim = 0; dim < shape.head_dim; ++dim) {
          expected.key(table, head, to, dim) = original.key(table, head, from, dim);
          expected.value(table, head, to, dim) = original.value(table, head, from, dim);
        }
        ++to;
      }
    }
    return expected;
  }

  friend bool operator==(const Pool& a, const Pool& b) {
    return same_bytes(a.keys, b.keys) && same_bytes(a.values, b.values);
  }

  /// The element of a row, told from the shape alone.
  float& key(const Blocks& blocks, std::size_t head, std::size_t row, std::size_t dim) {
    const auto block = static_cast<std::size_t>(blocks[row / shape.block_rows]);
    return keys[block * key_block + unit_at(key_strides, shape.head_dim, head, row % shape.block_rows, dim)];
  }
  float& value(const Blocks& blocks, std::size_t head, std::size_t row, std::size_t dim) {
    const auto block = static_cast<std::size_t>(blocks[row / shape.block_rows]);
    return value_pool()[block * value_block +
                        unit_at(value_strides, shape.head_dim, head, row % shape.block_rows, dim)];
  }

  std::span<float> value_pool() {
    return first_value > 0 ? std::span(keys).subspan(first_value) : std::span(values);
  }

 private:
  std::size_t reach(const layout::Strides& strides) const {
    return unit_at(strides, shape.head_dim, shape.kv_heads - 1, shape.block_rows - 1, shape.head_dim - 1) + 1;
  }
};

}  // namespace compresskv::reference
