#pragma once

#include <algorithm>
#include <bit>
#include <cassert>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <optional>
#include <span>
#include <utility>
#include <vector>

namespace compresskv {

/// The true positions of a KV head's rows, ascending: row r is the r-th position of the set.
///
/// One bit a position and one count each 512, about 1.1 bits in all, however many rows stay: lists of 32 bits
/// of all layers would be more than 1 % of a quantised model's cache.
class PositionSet {
 public:
  class Iterator {
   public:
    using iterator_category = std::forward_iterator_tag;
    using value_type = std::uint32_t;
    using difference_type = std::ptrdiff_t;
    using pointer = const std::uint32_t*;
    using reference = std::uint32_t;

    Iterator() = default;
    std::uint32_t operator*() const {
      return static_cast<std::uint32_t>(word_ * 64 + static_cast<std::size_t>(std::countr_zero(bits_)));
    }
    Iterator& operator++() {
      seek(row_ + 1);
      return *this;
    }
    Iterator operator++(int) {
      Iterator before = *this;
      ++*this;
      return before;
    }
    friend bool operator==(const Iterator& a, const Iterator& b) { return a.row_ == b.row_; }

    /// Goes on to `row`, at most the set's size. Cost: the words passed.
    void seek(std::size_t row) {
      std::size_t skip = row - row_;
      row_ = row;
      for (auto here = static_cast<std::size_t>(std::popcount(bits_)); skip >= here && word_ + 1 < words_;
           here = static_cast<std::size_t>(std::popcount(bits_))) {
        skip -= here;
        bits_ = data_[++word_];
      }
      for (; skip > 0; --skip) {
        bits_ &= bits_ - 1;
      }
    }

   private:
    friend class PositionSet;
    Iterator(const std::vector<std::uint64_t>& words, std::size_t row)
        : data_(words.data()), words_(words.size()), bits_(words.empty() ? 0 : words[0]), row_(row) {}

    const std::uint64_t* data_ = nullptr;
    std::size_t words_ = 0;
    std::size_t word_ = 0;
    std::uint64_t bits_ = 0;  // of the word at hand, from the row at hand on
    std::size_t row_ = 0;
  };

  /// Rows.
  std::size_t size() const { return size_; }

  Iterator begin() const {
    Iterator first(words_, 0);
    first.seek(0);  // past words without a member
    return first;
  }
  Iterator end() const { return {words_, size_}; }

  /// Position of a row below `size()`. Cost: a binary search over the counts.
  std::uint32_t operator[](std::size_t row) const {
    assert(row < size_);
    const auto after = std::upper_bound(before_.begin(), before_.end(), row);
    const auto block = static_cast<std::size_t>(after - before_.begin()) - 1;
    Iterator at(words_, before_[block]);
    at.word_ = block * words_per_count;
    at.bits_ = words_[at.word_];
    at.seek(row);
    return *at;
  }

  /// Rows at positions below `position`.
  std::size_t rows_before(std::size_t position) const {
    const std::size_t word = position / 64;
    if (word >= words_.size()) {
      return size_;
    }
    const std::size_t block = word / words_per_count;
    std::size_t rows = before_[block];
    for (std::size_t w = block * words_per_count; w < word; ++w) {
      rows += static_cast<std::size_t>(std::popcount(words_[w]));
    }
    return rows + static_cast<std::size_t>(std::popcount(words_[word] & low_bits(position % 64)));
  }

  /// Row of a position, or nothing where it is no member.
  std::optional<std::size_t> row(std::size_t position) const {
    const std::size_t word = position / 64;
    if (word >= words_.size() || (words_[word] >> (position % 64) & 1U) == 0) {
      return std::nullopt;
    }
    return rows_before(position);
  }

  /// Bit p % 64 of word p / 64 says whether position p is a member.
  std::span<const std::uint64_t> words() const { return words_; }

  /// Takes the members from such words.
  void assign_words(std::vector<std::uint64_t> words) {
    std::vector<std::uint32_t> before;
    before.reserve((words.size() + words_per_count - 1) / words_per_count);
    std::size_t size = 0;
    for (std::size_t word = 0; word < words.size(); ++word) {
      if (word % words_per_count == 0) {
        before.push_back(static_cast<std::uint32_t>(size));
      }
      size += static_cast<std::size_t>(std::popcount(words[word]));
    }
    words_ = std::move(words);
    before_ = std::move(before);
    size_ = size;
  }

  /// Makes room for positions below `limit`, so that adding them does not allocate.
  void reserve(std::size_t limit) {
    const std::size_t words = (limit + 63) / 64;
    words_.reserve(words);
    before_.reserve((words + words_per_count - 1) / words_per_count);
  }

  /// Makes room for `other`, so that assigning it does not allocate.
  void reserve_for(const PositionSet& other) { reserve(other.words_.size() * 64); }

  /// Keeps its memory.
  void clear() {
    words_.clear();
    before_.clear();
    size_ = 0;
  }

  /// Adds a position above all members, and not below where the set was last cut off.
  void push_back(std::size_t position) {
    assert(words_.size() <= position / 64 + 1);
    grow_to(position / 64);
    words_.back() |= std::uint64_t{1} << (position % 64);
    ++size_;
  }

  /// Adds positions `first` .. `last` - 1, as `push_back` has it.
  void append(std::size_t first, std::size_t last) {
    if (first >= last) {
      return;
    }
    assert(words_.size() <= first / 64 + 1);
    grow_to(first / 64);
    words_.back() |= ~low_bits(first % 64);
    // Whole words; the last one loses what is too much.
    const std::size_t words = (last + 63) / 64;
    for (std::size_t block = before_.size(); block * words_per_count < words; ++block) {
      before_.push_back(static_cast<std::uint32_t>(size_ + block * words_per_count * 64 - first));
    }
    words_.resize(words, ~std::uint64_t{0});
    words_.back() &= low_bits(last - (words - 1) * 64);
    size_ += last - first;
  }

  /// Drops the positions from `limit` on.
  void truncate(std::size_t limit) {
    size_ = rows_before(limit);
    const std::size_t words = (limit + 63) / 64;
    if (words < words_.size()) {
      words_.resize(words);
      before_.resize((words + words_per_count - 1) / words_per_count);
    }
    if (words == words_.size() && limit % 64 != 0) {
      words_.back() &= low_bits(limit % 64);
    }
  }

  std::size_t memory_bytes() const {
    return words_.capacity() * sizeof(std::uint64_t) + before_.capacity() * sizeof(std::uint32_t);
  }

 private:
  static constexpr std::size_t words_per_count = 8;

  /// The lowest `count` bits, at most 64.
  static constexpr std::uint64_t low_bits(std::size_t count) {
    return count == 64 ? ~std::uint64_t{0} : (std::uint64_t{1} << count) - 1;
  }

  void grow_to(std::size_t word) {
    if (words_.size() <= word) {
      before_.resize(word / words_per_count + 1, static_cast<std::uint32_t>(size_));
      words_.resize(word + 1);
    }
  }

  std::vector<std::uint64_t> words_;   // bit p % 64 of word p / 64: whether p is a member
  std::vector<std::uint32_t> before_;  // [block of 8 words], members before it
  std::size_t size_ = 0;
};

}  // namespace compresskv
