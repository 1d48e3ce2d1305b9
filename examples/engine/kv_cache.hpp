// The cache of one layer: keys and values of the tokens it still holds, each KV head with a length of its
// own.
//
//   keys, values: | KV head 0: rows ... room | KV head 1: rows ... room | ...     a row is head_dim elements
//
// Keys are post-RoPE: a row carries the rotation of its true position wherever it moves.
#pragma once

#include <compresskv/core/half.hpp>
#include <cstddef>
#include <cstdlib>
#include <memory>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

namespace engine {

/// The element type of keys and values in the cache. Arithmetic is float32 throughout.
enum class KvType { f32, f16, bf16 };

std::string_view kv_type_name(KvType type);   ///< "f32", "f16", "bf16"
KvType parse_kv_type(std::string_view text);  ///< throws Error listing the three names
std::size_t kv_element_bytes(KvType type);    ///< 4 or 2

/// Calls `f` with a null pointer of the element type: `with_kv_type(t, [&]<typename T>(T*) { ... })`.
template <typename F>
decltype(auto) with_kv_type(KvType type, F&& f) {
  switch (type) {
    case KvType::f16:
      return f(static_cast<compresskv::half*>(nullptr));
    case KvType::bf16:
      return f(static_cast<compresskv::bfloat16*>(nullptr));
    case KvType::f32:
      break;
  }
  return f(static_cast<float*>(nullptr));
}

/// Bytes of cache that are allocated now and the most there have been. Shared by the layers of a sequence.
struct CacheMeter {
  std::size_t current = 0;
  std::size_t peak = 0;

  void change(std::size_t before, std::size_t after) {
    current = current - before + after;
    if (current > peak) peak = current;
  }
};

class LayerCache {
 public:
  LayerCache(KvType type, int kv_heads, int head_dim);

  LayerCache(const LayerCache& other);
  LayerCache& operator=(const LayerCache& other);
  LayerCache(LayerCache&&) noexcept = default;
  LayerCache& operator=(LayerCache&&) noexcept = default;
  ~LayerCache() = default;

  KvType type() const { return type_; }
  int kv_heads() const { return kv_heads_; }
  int head_dim() const { return head_dim_; }

  std::size_t rows(int kv_head) const { return rows_[static_cast<std::size_t>(kv_head)]; }
  std::span<const std::size_t> rows() const { return rows_; }
  std::size_t allocated_rows(int kv_head) const { return allocated_[static_cast<std::size_t>(kv_head)]; }
  std::size_t bytes() const;  ///< allocated, keys and values

  /// First row of a KV head; the heads' rows do not overlap. T must be the element type of `type()`.
  template <typename T>
  T* keys(int kv_head) {
    return static_cast<T*>(keys_.get()) + first(kv_head);
  }
  template <typename T>
  T* values(int kv_head) {
    return static_cast<T*>(values_.get()) + first(kv_head);
  }
  template <typename T>
  const T* keys(int kv_head) const {
    return static_cast<const T*>(keys_.get()) + first(kv_head);
  }
  template <typename T>
  const T* values(int kv_head) const {
    return static_cast<const T*>(values_.get()) + first(kv_head);
  }

  /// Every KV head gets `count` more rows, uninitialised, behind those that it holds. All heads then have the
  /// room of the longest and no more, so that they lie at one distance.
  void extend(std::size_t count, CacheMeter& meter);

  /// Keeps the first `rows[h]` rows of each KV head; what lay behind them is room. Throws Error for more rows
  /// than there are.
  void truncate(std::span<const std::size_t> rows);

  /// Holds so many rows of each KV head, [kv_heads], those beyond what it held uninitialised, and no room.
  void resize(std::span<const std::size_t> rows, CacheMeter& meter);

  /// Gives all room back, without a second copy at any time.
  void fit(CacheMeter& meter);

  /// Makes room for `extra` more rows in every KV head.
  void reserve(std::size_t extra, CacheMeter& meter);

  /// Writes one of the rows of a KV head, rounded to the element type. Different rows may be written at the
  /// same time.
  void write(int kv_head, std::size_t row, std::span<const float> key, std::span<const float> value);

  /// Appends one row to a KV head, rounded to the element type; there must be room (reserve).
  void append(int kv_head, std::span<const float> key, std::span<const float> value);

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  using Buffer = std::unique_ptr<void, Free>;  // from malloc: realloc can give memory back without a copy

  std::size_t first(int kv_head) const {
    return first_row_[static_cast<std::size_t>(kv_head)] * static_cast<std::size_t>(head_dim_);
  }
  std::size_t total_rows() const;
  void relocate(std::span<const std::size_t> allocated, CacheMeter& meter);

  KvType type_;
  int kv_heads_;
  int head_dim_;
  Buffer keys_;
  Buffer values_;
  std::vector<std::size_t> first_row_;  // [kv_heads]
  std::vector<std::size_t> rows_;       // [kv_heads]
  std::vector<std::size_t> allocated_;  // [kv_heads]
};

}  // namespace engine
