#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <span>

#include "compresskv/view/kv_view.hpp"
#include "compresskv/view/run.hpp"

namespace compresskv::detail {

/// Rows of a KV head that lie behind one another in a part of its cache: `first` up to `last`, not included.
struct RowRange {
  std::size_t first = 0;
  std::size_t last = 0;

  std::size_t size() const { return last - first; }
};
/// Some of a KV head's rows: three ranges, ascending, any of them perhaps empty.
using SomeRows = std::array<RowRange, 3>;

/// A view of some rows of another view, which it copies: they are cut from its runs, nothing is moved.
template <KvView V>
class StretchKv {
 public:
  using key_element = typename V::key_element;
  using value_element = typename V::value_element;

  /// `some` has one entry a KV head, and outlives the view.
  StretchKv(const V& whole, std::span<const SomeRows> some) : whole_(whole), some_(some) {}

  std::size_t kv_heads() const { return whole_.kv_heads(); }
  std::size_t head_dim() const { return whole_.head_dim(); }
  std::size_t rows(std::size_t kv_head) const {
    const SomeRows& some = some_[kv_head];
    return some[0].size() + some[1].size() + some[2].size();
  }
  std::size_t run_count(std::size_t kv_head) const {
    std::size_t count = 0;
    for_each_piece(kv_head, [&](std::size_t, const RowRange&) {
      ++count;
      return false;
    });
    return count;
  }
  Run<key_element> key_run(std::size_t kv_head, std::size_t i) const {
    const auto [run, part] = piece(kv_head, i);
    return part_of(whole_.key_run(kv_head, run), part.first, part.size());
  }
  Run<value_element> value_run(std::size_t kv_head, std::size_t i) const {
    const auto [run, part] = piece(kv_head, i);
    return part_of(whole_.value_run(kv_head, run), part.first, part.size());
  }
  ElementKind key_kind() const { return compresskv::key_kind(whole_); }
  ElementKind value_kind() const { return compresskv::value_kind(whole_); }

 private:
  struct Piece {
    std::size_t run = 0;
    RowRange part;  // of that run's rows
  };

  /// Calls `visit(run, part)` for each piece in order, until it says that it has enough.
  template <class Visit>
  void for_each_piece(std::size_t kv_head, Visit&& visit) const {
    const std::size_t runs = whole_.run_count(kv_head);
    for (const RowRange& range : some_[kv_head]) {
      std::size_t begin = 0;
      for (std::size_t run = 0; run < runs && begin < range.last; ++run) {
        const std::size_t end = begin + whole_.key_run(kv_head, run).rows;
        const std::size_t from = (std::max)(begin, range.first);
        const std::size_t to = (std::min)(end, range.last);
        if (from < to && visit(run, RowRange{.first = from - begin, .last = to - begin})) {
          return;
        }
        begin = end;
      }
    }
  }

  Piece piece(std::size_t kv_head, std::size_t i) const {
    Piece found;
    for_each_piece(kv_head, [&](std::size_t run, const RowRange& part) {
      found = {.run = run, .part = part};
      return i-- == 0;
    });
    return found;
  }

  V whole_;
  std::span<const SomeRows> some_;
};

}  // namespace compresskv::detail
