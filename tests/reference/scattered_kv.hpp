#pragma once

#include <algorithm>
#include <compresskv/view/kv_view.hpp>
#include <cstddef>
#include <cstring>
#include <vector>

#include "reference/cache.hpp"
#include "reference/random.hpp"

namespace compresskv::reference {

template <Element T>
class ScatteredKv;

/// A cache like a paged one at its worst: every KV head's rows lie in pieces of different lengths, in no
/// order of memory, some of them empty, and within a piece rows may be split: `[dim / chunk][row][chunk]`.
template <Element T>
class ScatteredMemory {
 public:
  /// A copy of what `cache` holds.
  ScatteredMemory(const Cache<T>& cache, Random& random, std::size_t longest_piece, std::size_t chunk)
      : shape_(cache.shape),
        chunk_(chunk),
        rows_(cache.shape.kv_heads, cache.shape.rows),
        pieces_(cache.shape.kv_heads) {
    const std::size_t chunks = (shape_.head_dim + chunk - 1) / chunk;
    std::vector<Piece*> order;
    for (auto& pieces : pieces_) {
      for (std::size_t rows = 0; rows < shape_.rows;) {
        const std::size_t count = std::min(random.between(0, longest_piece), shape_.rows - rows);
        pieces.push_back({.rows = count});
        rows += count;
      }
    }
    for (auto& pieces : pieces_) {
      for (Piece& piece : pieces) {
        order.insert(order.begin() + static_cast<std::ptrdiff_t>(random.below(order.size() + 1)), &piece);
      }
    }
    std::size_t size = 0;
    for (Piece* piece : order) {
      piece->offset = size;
      size += piece->rows * chunks * chunk + random.below(3);
    }
    keys_.resize(size);
    values_.resize(size);
    for (std::size_t head = 0; head < shape_.kv_heads; ++head) {
      for (std::size_t row = 0; row < shape_.rows; ++row) {
        for (std::size_t dim = 0; dim < shape_.head_dim; ++dim) {
          keys_[at(head, row, dim)] = cache.keys[cache.at(head, row, dim)];
          values_[at(head, row, dim)] = cache.values[cache.value_at(head, row, dim)];
        }
      }
    }
  }

  ScatteredKv<T> view() { return ScatteredKv<T>(*this); }

  /// Rows in use of each KV head from now on.
  void set_rows(const std::vector<std::size_t>& rows) { rows_ = rows; }

  /// As `Cache::compacted`.
  template <class RowsOf>
  ScatteredMemory compacted(RowsOf&& rows_of) const {
    ScatteredMemory expected = *this;
    for (std::size_t head = 0; head < shape_.kv_heads; ++head) {
      std::size_t to = 0;
      for (const std::size_t from : rows_of(head)) {
        for (std::size_t dim = 0; dim < shape_.head_dim; ++dim) {
          expected.keys_[at(head, to, dim)] = keys_[at(head, from, dim)];
          expected.values_[at(head, to, dim)] = values_[at(head, from, dim)];
        }
        ++to;
      }
    }
    return expected;
  }

  friend bool operator==(const ScatteredMemory& a, const ScatteredMemory& b) {
    return same_bytes(a.keys_, b.keys_) && same_bytes(a.values_, b.values_);
  }

  /// Whether the first `rows` rows are, byte for byte, those of `cache`.
  bool starts_like(const Cache<T>& cache, std::size_t rows) const {
    for (std::size_t head = 0; head < shape_.kv_heads; ++head) {
      for (std::size_t row = 0; row < rows; ++row) {
        for (std::size_t dim = 0; dim < shape_.head_dim; ++dim) {
          const std::size_t here = at(head, row, dim);
          if (std::memcmp(&keys_[here], &cache.keys[cache.at(head, row, dim)], sizeof(T)) != 0 ||
              std::memcmp(&values_[here], &cache.values[cache.value_at(head, row, dim)], sizeof(T)) != 0) {
            return false;
          }
        }
      }
    }
    return true;
  }

 private:
  friend class ScatteredKv<T>;

  struct Piece {
    std::size_t rows = 0;
    std::size_t offset = 0;
  };

  std::size_t at(std::size_t head, std::size_t row, std::size_t dim) const {
    std::size_t piece = 0;
    while (row >= pieces_[head][piece].rows) {
      row -= pieces_[head][piece++].rows;
    }
    const Piece& found = pieces_[head][piece];
    return found.offset + (dim / chunk_) * found.rows * chunk_ + row * chunk_ + dim % chunk_;
  }

  KvShape shape_;
  std::size_t chunk_;
  std::vector<std::size_t> rows_;           // [kv_head], in use
  std::vector<std::vector<Piece>> pieces_;  // [kv_head]
  std::vector<T> keys_;
  std::vector<T> values_;
};

template <Element T>
class ScatteredKv {
 public:
  using key_element = T;
  using value_element = T;

  explicit ScatteredKv(ScatteredMemory<T>& memory) : memory_(&memory) {}

  std::size_t kv_heads() const { return memory_->shape_.kv_heads; }
  std::size_t head_dim() const { return memory_->shape_.head_dim; }
  std::size_t rows(std::size_t kv_head) const { return memory_->rows_[kv_head]; }
  std::size_t run_count(std::size_t kv_head) const { return memory_->pieces_[kv_head].size(); }
  Run<T> key_run(std::size_t kv_head, std::size_t i) const { return run(memory_->keys_, kv_head, i); }
  Run<T> value_run(std::size_t kv_head, std::size_t i) const { return run(memory_->values_, kv_head, i); }

 private:
  Run<T> run(std::vector<T>& elements, std::size_t kv_head, std::size_t i) const {
    const auto& piece = memory_->pieces_[kv_head][i];
    std::size_t before = 0;
    for (std::size_t p = 0; p < i; ++p) {
      before += memory_->pieces_[kv_head][p].rows;
    }
    return {.base = elements.data() + piece.offset,
            .rows = std::min(piece.rows, rows(kv_head) - std::min(before, rows(kv_head))),
            .row_stride = static_cast<std::ptrdiff_t>(memory_->chunk_),
            .chunk = memory_->chunk_,
            .chunk_stride = static_cast<std::ptrdiff_t>(piece.rows * memory_->chunk_)};
  }

  ScatteredMemory<T>* memory_;
};

static_assert(KvView<ScatteredKv<float>>);

}  // namespace compresskv::reference
