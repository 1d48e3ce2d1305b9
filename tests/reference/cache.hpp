#pragma once

#include <algorithm>
#include <compresskv/core/element.hpp>
#include <compresskv/core/retained.hpp>
#include <compresskv/view/strided_kv.hpp>
#include <cstddef>
#include <cstring>
#include <limits>
#include <span>
#include <vector>

#include "reference/random.hpp"

namespace compresskv::reference {

template <class T>
bool same_bytes(const std::vector<T>& a, const std::vector<T>& b) {
  // memcmp may not be given the null pointer of an empty vector, not even for no bytes.
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(static_cast<const void*>(a.data()), b.data(), a.size() * sizeof(T)) == 0);
}

/// Where the elements of a layer lie, as a choice at run time.
enum class Arrangement {
  head_token_dim,
  token_head_dim,
  padded_rows,    // gaps between rows
  padded_heads,   // [row][head][dim] with gaps between heads and rows
  spread_dims,    // gaps between the elements of a row
  head_dim_token  // transposed: the elements of a row lie a whole head apart
};
inline const std::vector<Arrangement> all_arrangements{
    Arrangement::head_token_dim, Arrangement::token_head_dim, Arrangement::padded_rows,
    Arrangement::padded_heads,   Arrangement::spread_dims,    Arrangement::head_dim_token};

inline layout::Strides strides_of(Arrangement arrangement, const KvShape& shape, std::size_t allocated) {
  const std::size_t dim = shape.head_dim;
  const layout::Extents extents{.kv_heads = shape.kv_heads, .rows = allocated, .units = dim};
  switch (arrangement) {
    case Arrangement::token_head_dim:
      return layout::token_head_dim(extents);
    case Arrangement::padded_rows:
      return {.head = allocated * (dim + 3), .row = dim + 3};
    case Arrangement::padded_heads:
      return {.head = dim + 1, .row = shape.kv_heads * (dim + 1) + 5};
    case Arrangement::spread_dims:
      return {.head = allocated * dim * 2 + 1, .row = dim * 2, .chunk = 1, .chunk_stride = 2};
    case Arrangement::head_dim_token:
      return layout::head_dim_token(extents);
    case Arrangement::head_token_dim:
      break;
  }
  return layout::head_token_dim(extents);
}

/// Where element `dim` of a row of `head_dim` lies, by the formula of view/layout.hpp.
inline std::size_t unit_at(const layout::Strides& strides, std::size_t head_dim, std::size_t head,
                           std::size_t row, std::size_t dim) {
  const std::size_t chunk = strides.chunk == 0 ? head_dim : strides.chunk;
  return head * strides.head + row * strides.row + dim / chunk * strides.chunk_stride + dim % chunk;
}

/// One layer's cache in exactly the memory its strides reach, so that a read past the end is one past the
/// vector. Gaps and rows not in use hold NaN.
template <Element Key, Element Value = Key>
struct Cache {
  KvShape shape;
  layout::Strides strides;  // of the keys, and of the values where nothing else is said
  layout::Strides value_strides;
  std::vector<std::size_t> head_rows;  // rows in use of each KV head; empty: shape.rows
  std::vector<Key> keys;
  std::vector<Value> values;

  Cache(const KvShape& kv_shape, Arrangement arrangement)
      : Cache(kv_shape, strides_of(arrangement, kv_shape, std::max(kv_shape.rows, kv_shape.allocated_rows)),
              strides_of(arrangement, kv_shape, std::max(kv_shape.rows, kv_shape.allocated_rows))) {}
  Cache(const KvShape& kv_shape, const layout::Strides& of_keys, const layout::Strides& of_values)
      : shape(kv_shape), strides(of_keys), value_strides(of_values) {
    const std::size_t allocated = std::max(shape.rows, shape.allocated_rows);
    const std::size_t last_key = at(shape.kv_heads - 1, allocated - 1, shape.head_dim - 1);
    const std::size_t last_value = value_at(shape.kv_heads - 1, allocated - 1, shape.head_dim - 1);
    keys.assign(last_key + 1, static_cast<Key>(std::numeric_limits<float>::quiet_NaN()));
    values.assign(last_value + 1, static_cast<Value>(std::numeric_limits<float>::quiet_NaN()));
  }

  std::size_t at(std::size_t head, std::size_t row, std::size_t dim) const {
    return unit_at(strides, shape.head_dim, head, row, dim);
  }
  std::size_t value_at(std::size_t head, std::size_t row, std::size_t dim) const {
    return unit_at(value_strides, shape.head_dim, head, row, dim);
  }

  /// Rows in use filled at random, keys with the given standard deviation.
  void fill(Random& random, float key_deviation = 1.0F) { fill_rows(random, 0, shape.rows, key_deviation); }
  void fill_rows(Random& random, std::size_t first, std::size_t last, float key_deviation = 1.0F) {
    for (std::size_t head = 0; head < shape.kv_heads; ++head) {
      for (std::size_t row = first; row < last; ++row) {
        for (std::size_t dim = 0; dim < shape.head_dim; ++dim) {
          keys[at(head, row, dim)] = static_cast<Key>(key_deviation * random.gaussian());
          values[value_at(head, row, dim)] = static_cast<Value>(random.gaussian());
        }
      }
    }
  }

  /// Rows in use of each KV head from now on.
  void set_rows(const std::vector<std::size_t>& rows) {
    shape.allocated_rows = std::max(shape.allocated_rows, shape.rows);
    head_rows = rows;
  }

  StridedKv<Key, Value> view() {
    KvShape now = shape;
    if (!head_rows.empty()) {
      now.head_rows = head_rows;
    }
    return {std::span(keys), std::span(values), now, strides, value_strides};
  }

  /// What the cache must be, byte for byte, once each KV head kept the rows that `rows_of(head)` lists: the
  /// kept rows copied one by one from an untouched original, all else as it was.
  template <class RowsOf>
  Cache compacted(RowsOf&& rows_of) const {
    Cache expected = *this;
    for (std::size_t head = 0; head < shape.kv_heads; ++head) {
      std::size_t to = 0;
      for (const std::size_t from : rows_of(head)) {
        for (std::size_t dim = 0; dim < shape.head_dim; ++dim) {
          expected.keys[at(head, to, dim)] = keys[at(head, from, dim)];
          expected.values[value_at(head, to, dim)] = values[value_at(head, from, dim)];
        }
        ++to;
      }
    }
    return expected;
  }

  friend bool operator==(const Cache& a, const Cache& b) {
    return same_bytes(a.keys, b.keys) && same_bytes(a.values, b.values);
  }
};

}  // namespace compresskv::reference
