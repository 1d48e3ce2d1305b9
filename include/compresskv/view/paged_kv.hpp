#pragma once

#include <algorithm>
#include <bitset>
#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>
#include <utility>

#include "compresskv/core/borrowed.hpp"
#include "compresskv/core/element.hpp"
#include "compresskv/core/error.hpp"
#include "compresskv/core/retained.hpp"
#include "compresskv/core/selection.hpp"
#include "compresskv/view/argument.hpp"
#include "compresskv/view/kv_view.hpp"
#include "compresskv/view/layout.hpp"
#include "compresskv/view/placement.hpp"
#include "compresskv/view/strided_kv.hpp"

namespace compresskv {

/// Shape of one layer's paged cache.
struct PagedShape {
  std::size_t kv_heads = 0;
  std::size_t rows = 0;         ///< rows of the sequence in use now
  std::size_t head_dim = 0;     ///< elements of one key or value row
  std::size_t block_rows = 0;   ///< rows of one block
  std::size_t pool_blocks = 0;  ///< blocks of each pool
  /// Units from block to block in the pools; 0: block after block, keys and values in pools of their own.
  std::size_t key_block_stride = 0;
  std::size_t value_block_stride = 0;
  /// Ragged caches: rows in use of each KV head, in place of `rows`. Must outlive the view.
  Borrowed<const std::size_t> head_rows = {};
};

/// Keys and values in pools of blocks, which a table strings together: models `KvView` with one run a block.
///
///     table   [ 7 | 2 | 9 | 4 ]        rows 0 .. b-1 in block 7, b .. 2b-1 in block 2, ...
///     after   [ 7 | 2 ]   9, 4 free    compaction packs the rows into the first blocks
///
/// Layouts are those of `layout` within one block: `[kv_head][row][dim]`, `[row][kv_head][dim]`, transposed,
/// or `layout::SplitDim`. Blocks may stand in any order. `references[block]` counts the sequences that use a
/// block (prefix sharing): a block counted more than once is shared and never written.
template <class Key, class Value = Key>
class PagedKv {
 public:
  using key_element = Key;
  using value_element = Value;
  static_assert(detail::plain_stored<Key> && detail::plain_stored<Value>,
                "PagedKv<Key, Value> holds float, half, bfloat16, BlockQ8_0 or BlockQ4_0: see Stored "
                "in compresskv/core/element.hpp");

  /// `keys` and `values` are pointers to pools of unknown size, large enough for `pool_blocks` blocks, or
  /// spans (vectors, arrays) of known size; `table`, std::int32_t, names the blocks of this sequence in row
  /// order. Entries behind those that the rows need are never looked at. Pools, table and `references`
  /// (empty: nothing is shared) must outlive the view. Throws ArgumentError on null, a zero size, a table too
  /// short, a block out of range or named twice, references that are not one a block, strides that lay rows
  /// over each other, or a pool of known size that is too small. Cost: a pass over the table for each 65,536
  /// blocks of the pool.
  template <class Keys, class Values, class Shape = PagedShape, class Table = Borrowed<const std::int32_t>,
            class KeyLayout, layout::Layout ValueLayout>
  PagedKv(Keys&& keys, Values&& values, const Shape& shape, Table&& table, const KeyLayout& key_layout,
          const ValueLayout& value_layout, Borrowed<const std::int32_t> references = {}) {
    constexpr bool elements = detail::points_to<Keys, Key> && detail::points_to<Values, Value>;
    constexpr bool kept = detail::outlives<Keys&&> && detail::outlives<Values&&> && detail::outlives<Table&&>;
    constexpr bool shapes = std::is_convertible_v<const Shape&, PagedShape>;
    constexpr bool tables = std::is_convertible_v<Table, Borrowed<const std::int32_t>>;
    constexpr bool layouts = layout::Layout<KeyLayout>;
    static_assert(
        elements,
        "keys and values come first, as pointers or spans of the view's elements: float, half, "
        "bfloat16, BlockQ8_0 or BlockQ4_0; as_half or as_bfloat16 takes raw bits for what they are");
    static_assert(shapes || !elements,
                  "the third argument is a PagedShape: PagedKv{keys, values, shape, table, layout}");
    static_assert(
        tables || !shapes || !elements,
        "the block table comes fourth, as std::int32_t: PagedKv{keys, values, shape, table, layout}");
    static_assert(kept || !tables || !shapes || !elements,
                  "keys, values and the block table are not copied: give variables that outlive the view");
    static_assert(
        layouts || !tables || !shapes || !elements,
        "the layout comes fifth: PagedKv{keys, values, shape, table, layout} takes layout::head_token_dim, "
        "token_head_dim, head_dim_token, SplitDim, Strides or a function of layout::Extents");
    if constexpr (elements && kept && shapes && tables && layouts) {
      const Borrowed<Key> key_pool = detail::memory_of<Key>(std::forward<Keys>(keys));
      const Borrowed<Value> value_pool = detail::memory_of<Value>(std::forward<Values>(values));
      keys_ = key_pool.data();
      values_ = value_pool.data();
      shape_ = shape;
      table_ = Borrowed<const std::int32_t>(std::forward<Table>(table));
      references_ = references;
      check();
      key_placement_ = place<Key>("PagedKv keys", key_layout, key_pool.size(), shape_.key_block_stride);
      value_placement_ =
          place<Value>("PagedKv values", value_layout, value_pool.size(), shape_.value_block_stride);
    }
  }
  template <class Keys, class Values, class Shape = PagedShape, class Table = Borrowed<const std::int32_t>,
            class Layout = detail::NoLayout>
  PagedKv(Keys&& keys, Values&& values, const Shape& shape, Table&& table, const Layout& layout = {},
          Borrowed<const std::int32_t> references = {})
      : PagedKv(std::forward<Keys>(keys), std::forward<Values>(values), shape, std::forward<Table>(table),
                layout, detail::again(layout), references) {}

  std::size_t kv_heads() const { return shape_.kv_heads; }
  std::size_t head_dim() const { return shape_.head_dim; }
  std::size_t rows(std::size_t kv_head) const {
    return shape_.head_rows.empty() ? shape_.rows : shape_.head_rows[kv_head];
  }
  std::size_t run_count(std::size_t kv_head) const { return blocks_of(rows(kv_head)); }
  Run<Key> key_run(std::size_t kv_head, std::size_t i) const {
    return key_placement_.run(keys_ + block(i) * key_placement_.block_stride(), kv_head,
                              rows_of_run(kv_head, i));
  }
  Run<Value> value_run(std::size_t kv_head, std::size_t i) const {
    return value_placement_.run(values_ + block(i) * value_placement_.block_stride(), kv_head,
                                rows_of_run(kv_head, i));
  }

  /// Whether another sequence uses the i-th block of the rows too.
  bool shared(std::size_t i) const {
    return i < table_.size() && !references_.empty() && references_[block(i)] > 1;
  }

  /// Throws ArgumentError where rows [first, last) lie in a shared block.
  void check_writable(std::size_t kv_head, std::size_t first, std::size_t last) const {
    const std::size_t from = (std::max)(first, untouched_rows_);
    for (std::size_t i = from / shape_.block_rows; from < last && i < blocks_of(last); ++i) {
      if (shared(i)) {  // asked first: where nothing is shared there are no references to name
        detail::fail<ArgumentError>("PagedKv: block ", table_[i], " (rows from ", i * shape_.block_rows,
                                    " of KV head ", kv_head, ") is shared by ", references_[block(i)],
                                    " sequences and would be written: use copy_on_write()");
      }
    }
  }

  /// Blocks of the view's rows that no KV head uses after a compression: the engine may give them back to the
  /// pool (where they are shared, drop its reference).
  std::span<const std::int32_t> free_blocks(const Retained& retained) const {
    std::size_t longest = 0;
    for (std::size_t head = 0; head < shape_.kv_heads; ++head) {
      longest = (std::max)(longest, retained.rows(head));
    }
    return table_.subspan((std::min)(blocks_of(longest), table_.size()));
  }

  /// Free blocks that `copy_on_write` needs for `selection`: one for each shared block that would be written.
  std::size_t copies_needed(const Selection& selection) const {
    std::size_t count = 0;
    for_each_written_block(selection, [&](std::size_t i) { count += shared(i) ? 1U : 0U; });
    return count;
  }

  /// The same cache with a free block in place of each shared block that `selection` would write: what
  /// `Compressor::gather(layer, view, selection, view.copy_on_write(...))` needs to leave the shared ones
  /// untouched.
  ///
  /// `free_blocks` are `copies_needed(selection)` blocks that no sequence uses; `table` receives the new
  /// table, one entry a block of the rows, and must outlive the result; through the old one the rows are
  /// still read. Throws ArgumentError where they do not fit; nothing is written then.
  PagedKv copy_on_write(const Selection& selection, std::span<const std::int32_t> free_blocks,
                        std::span<std::int32_t> table) const {
    const std::size_t needed = copies_needed(selection);
    detail::require(free_blocks.size() >= needed, "PagedKv: copy_on_write needs ", needed,
                    " free blocks, got ", free_blocks.size(), ": ask copies_needed() first");
    detail::require(table.size() >= table_.size(), "PagedKv: copy_on_write's table has room for ",
                    table.size(), " blocks, the old one has ", table_.size());
    detail::require(
        reinterpret_cast<std::uintptr_t>(table.data()) >=
                reinterpret_cast<std::uintptr_t>(table_.data() + table_.size()) ||
            reinterpret_cast<std::uintptr_t>(table_.data()) >=
                reinterpret_cast<std::uintptr_t>(table.data() + table_.size()),
        "PagedKv: copy_on_write's table is the view's own, through which the rows are still read: "
        "give another");
    for (std::size_t i = 0; i < needed; ++i) {
      check_block(free_blocks[i], shape_.pool_blocks);
      detail::require(std::find(table_.begin(), table_.end(), free_blocks[i]) == table_.end() &&
                          std::find(free_blocks.begin(), free_blocks.begin() + static_cast<std::ptrdiff_t>(i),
                                    free_blocks[i]) == free_blocks.begin() + static_cast<std::ptrdiff_t>(i) &&
                          (references_.empty() || references_[static_cast<std::size_t>(free_blocks[i])] == 0),
                      "PagedKv: block ", free_blocks[i],
                      " given to copy_on_write is in use: give free blocks");
    }
    std::copy(table_.begin(), table_.end(), table.begin());
    std::size_t next = 0;
    std::size_t first_written = table_.size();
    for_each_written_block(selection, [&](std::size_t i) {
      first_written = (std::min)(first_written, i);
      if (shared(i)) {
        table[i] = free_blocks[next++];
      }
    });
    PagedKv copy = *this;
    copy.table_ = table.first(table_.size());
    copy.untouched_rows_ = first_written * shape_.block_rows;
    return copy;
  }

 private:
  /// Fills in what the shape leaves out, and cuts the table to what the rows need.
  void check() {
    detail::require(keys_ != nullptr && values_ != nullptr, "PagedKv: ", keys_ == nullptr ? "keys" : "values",
                    " is null: give the layer's pool");
    detail::require(shape_.block_rows > 0 && shape_.pool_blocks > 0, "PagedKv: blocks of ", shape_.block_rows,
                    " rows in pools of ", shape_.pool_blocks, " blocks: each must be at least 1");
    detail::require(!table_.empty(), "PagedKv: the block table is empty: give the sequence's blocks");
    KvShape rows{.kv_heads = shape_.kv_heads,
                 .rows = shape_.rows,
                 .head_dim = shape_.head_dim,
                 .head_rows = shape_.head_rows};
    detail::check_kv_shape("PagedKv", rows);
    shape_.rows = rows.rows;
    const std::size_t blocks = blocks_of(shape_.rows);
    detail::require(blocks <= table_.size(), "PagedKv: ", shape_.rows, " rows in use, only ",
                    table_.size() * shape_.block_rows, " allocated: ", blocks, " blocks of ",
                    shape_.block_rows, " rows are needed, the table has ", table_.size());
    table_ = table_.first(blocks);
    detail::require(references_.empty() || references_.size() == shape_.pool_blocks,
                    "PagedKv: ", references_.size(), " references for a pool of ", shape_.pool_blocks,
                    " blocks: give one count a block");
    for (const std::int32_t block : table_) {
      check_block(block, shape_.pool_blocks);
    }
    check_once_each(table_);
  }

  /// One pass over the table for each 65,536 blocks up to the highest: a set of bits on the stack, as a view
  /// allocates nothing.
  static void check_once_each(std::span<const std::int32_t> table) {
    const auto highest = static_cast<std::size_t>(*std::max_element(table.begin(), table.end()));
    std::bitset<65536> seen;
    for (std::size_t first = 0; first <= highest; first += seen.size()) {
      seen.reset();
      for (std::size_t i = 0; i < table.size(); ++i) {
        const std::size_t bit = static_cast<std::size_t>(table[i]) - first;
        if (bit < seen.size()) {
          detail::require(!seen.test(bit), "PagedKv: block ", table[i],
                          " stands twice in the table, again at place ", i,
                          ": each block may hold rows once");
          seen.set(bit);
        }
      }
    }
  }

  static void check_block(std::int32_t block, std::size_t pool_blocks) {
    detail::require(block >= 0 && static_cast<std::size_t>(block) < pool_blocks, "PagedKv: block ", block,
                    " is outside the pool of ", pool_blocks, " blocks");
  }

  template <class T, class L>
  detail::Placement place(const char* what, const L& layout, std::size_t size,
                          std::size_t block_stride) const {
    const layout::Extents block{.kv_heads = shape_.kv_heads,
                                .rows = shape_.block_rows,
                                .units = detail::units_of_row<T>(what, shape_.head_dim)};
    return detail::Placement(what, detail::checked_strides(what, layout, block, sizeof(T)), block, size,
                             sizeof(T), {.count = shape_.pool_blocks, .stride = block_stride});
  }

  /// Calls `visit(i)` for each block of the table that moving the selected rows would write, ascending.
  template <class Visit>
  void for_each_written_block(const Selection& selection, Visit&& visit) const {
    selection.validate(shape_.kv_heads, [&](std::size_t head) { return rows(head); });
    std::size_t first = shape_.rows;
    std::size_t last = 0;
    for (std::size_t head = 0; head < shape_.kv_heads; ++head) {
      const auto kept = selection.rows(head);
      const std::size_t moved = detail::first_moved(kept);
      if (moved < kept.size()) {
        first = (std::min)(first, moved);
      }
      // A copy takes the rows of the heads that stay in place along: its blocks serve all heads.
      last = (std::max)(last, kept.size());
    }
    for (std::size_t i = first / shape_.block_rows; i < blocks_of(last); ++i) {
      visit(i);
    }
  }

  std::size_t block(std::size_t i) const { return static_cast<std::size_t>(table_[i]); }
  std::size_t blocks_of(std::size_t rows) const {
    return rows / shape_.block_rows + (rows % shape_.block_rows == 0 ? 0 : 1);
  }
  std::size_t rows_of_run(std::size_t kv_head, std::size_t i) const {
    return (std::min)(shape_.block_rows, rows(kv_head) - i * shape_.block_rows);
  }

  Key* keys_ = nullptr;
  Value* values_ = nullptr;
  PagedShape shape_;
  std::span<const std::int32_t> table_;  // the blocks that the rows need, and no more
  std::span<const std::int32_t> references_;
  detail::Placement key_placement_;
  detail::Placement value_placement_;
  std::size_t untouched_rows_ =
      0;  // rows before it are not written by the selection that this view was made for
};

template <class Keys, class Values, class Shape = PagedShape, class Table = Borrowed<const std::int32_t>,
          class... Rest>
PagedKv(Keys&&, Values&&, const Shape&, Table&&, Rest&&...)
    -> PagedKv<detail::StoredIn<Keys>, detail::StoredIn<Values>>;

}  // namespace compresskv
