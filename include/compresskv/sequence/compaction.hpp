#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <span>
#include <vector>

#include "compresskv/core/element.hpp"
#include "compresskv/core/error.hpp"
#include "compresskv/core/executor.hpp"
#include "compresskv/core/retained.hpp"
#include "compresskv/core/selection.hpp"
#include "compresskv/core/shape.hpp"
#include "compresskv/core/workspace.hpp"
#include "compresskv/kernel/row_moves.hpp"
#include "compresskv/sequence/state.hpp"
#include "compresskv/view/kv_view.hpp"

namespace compresskv::sequence {

/// Makes this the selection that keeps every row: `rows[kv_head]` of them.
inline void select_all(std::span<const std::size_t> rows, Selection& selection) {
  const auto fill = [](std::span<std::uint32_t> list) { std::iota(list.begin(), list.end(), 0U); };
  if (std::all_of(rows.begin(), rows.end(), [&](std::size_t count) { return count == rows[0]; })) {
    fill(selection.assign_shared(rows[0]));
    return;
  }
  selection.assign_per_head(std::accumulate(rows.begin(), rows.end(), std::size_t{0}));
  for (const std::size_t count : rows) {
    fill(selection.append_head(count));
  }
}

/// Moves selected rows to the front of their caches, in two steps: `stage` checks all that a move asks for
/// and may throw; `commit` moves, and nothing fails from there on. Several layers can be staged before the
/// first one moves.
class Compaction {
 public:
  /// `at_once` layers are staged at most before they are committed.
  explicit Compaction(std::size_t at_once) : next_(at_once) {}

  /// Before the first `stage` of a call.
  void start() { staged_rows_ = 0; }

  /// Checks `selection` of a layer against both caches and the tokens announced, writes down what the layer
  /// will hold, and makes room for it. `source` and `target` may be one object. Throws ArgumentError.
  template <KvView V, KvView W>
  void stage(State& state, const ModelShape& shape, std::size_t index, const V& source, const W& target,
             const Selection& selection, Workspace& workspace) {
    detail::check_view(source, shape);
    state.check_rows(index, [&](std::size_t head) { return source.rows(head); });
    detail::require(key_kind(source) == key_kind(target) && value_kind(source) == value_kind(target),
                    "gather's target holds keys and values of ", name(key_kind(target)), " and ",
                    name(value_kind(target)), ", the source of ", name(key_kind(source)), " and ",
                    name(value_kind(source)), ": rows move as they are");
    const std::size_t kv_heads = source.kv_heads();
    selection.validate(kv_heads, [&](std::size_t head) { return source.rows(head); });
    const bool in_place = static_cast<const void*>(&source) == static_cast<const void*>(&target);
    std::size_t before = 0;
    std::size_t after = 0;
    for (std::size_t head = 0; head < kv_heads; ++head) {
      const auto rows = selection.rows(head);
      before += source.rows(head);
      after += rows.size();
      detail::require(rows.size() <= target.rows(head), "gather's target has ", target.rows(head),
                      " rows of KV head ", head, ", the selection keeps ", rows.size(), ": give it room");
      detail::check_writable(target, head, in_place ? detail::first_moved(rows) : 0, rows.size());
    }

    Retained& now = state.layer(index);
    Retained& next = next_of(index);
    next.next_position_ = now.next_position_ + source.rows(0) - now.rows(0);
    next.bytes_freed_ = (before - after) * kv_row_bytes(source);
    next.lists_ = before == after || selection.shared() ? now.lists_ : kv_heads;
    now.sets_.resize((std::max)(now.sets_.size(), next.lists_));
    next.sets_.resize((std::max)(next.sets_.size(), next.lists_));
    std::size_t values = 0;
    for (std::size_t list = 0; list < next.lists_; ++list) {
      if (before == after) {
        now.sets_[list].reserve(next.next_position_);
        continue;
      }
      Retained::Cursor positions = now.cursor(list);
      next.sets_[list].clear();
      next.sets_[list].reserve(next.next_position_);
      for (const std::uint32_t row : selection.rows(list)) {
        next.sets_[list].push_back(positions.seek(row));
      }
      now.sets_[list].reserve_for(next.sets_[list]);
      values += next.sets_[list].size();
    }
    workspace.take_counts(kv_heads);
    staged_rows_ = (std::max)(staged_rows_, before == after ? before : values);
  }

  /// Moves what was staged with the same arguments.
  template <class V, class W, Executor X>
  void commit(State& state, std::size_t index, const V& source, const W& target, const Selection& selection,
              Workspace& workspace, X& executor) noexcept {
    detail::run_all(executor, workspace.take_counts(source.kv_heads()),
                    [&](std::size_t head) { kernel::copy_rows(source, target, head, selection.rows(head)); });
    Retained& now = state.layer(index);
    const Retained& next = next_of(index);
    if (next.bytes_freed_ > 0) {
      std::copy_n(next.sets_.begin(), next.lists_, now.sets_.begin());
      now.lists_ = next.lists_;
    } else {
      for (std::size_t list = 0; list < now.lists_; ++list) {
        now.sets_[list].append(now.next_position_, next.next_position_);
      }
    }
    now.next_position_ = next.next_position_;
    now.bytes_freed_ = next.bytes_freed_;
  }

  /// Makes room for the selection of any layer staged since `start`.
  void reserve(Selection& selection, std::size_t kv_heads) const {
    selection.reserve(staged_rows_, kv_heads);
  }

  /// The selection that a layer was staged with, found again from the positions: those of all layers would
  /// take more than the 1 %. Does not throw after `reserve`.
  template <class V>
  void selection_of(const State& state, std::size_t index, const V& kv, std::span<std::size_t> rows,
                    Selection& selection) const noexcept {
    const Retained& now = state.layer(index);
    const Retained& next = next_of(index);
    if (next.bytes_freed_ == 0) {
      for (std::size_t head = 0; head < rows.size(); ++head) {
        rows[head] = kv.rows(head);
      }
      select_all(rows, selection);
      return;
    }
    const auto fill = [&](std::size_t list, std::span<std::uint32_t> found) {
      const PositionSet& kept = next.sets_[list];
      std::transform(kept.begin(), kept.end(), found.begin(), [&](std::size_t position) {
        return static_cast<std::uint32_t>(now.rows_before(position, list));
      });
    };
    if (next.shared()) {
      fill(0, selection.assign_shared(next.rows(0)));
      return;
    }
    selection.assign_per_head(0);
    for (std::size_t list = 0; list < next.lists_; ++list) {
      fill(list, selection.append_head(next.rows(list)));
    }
  }

  /// Moves a layer in place that was staged before others. `rows` and `selection` are memory for it.
  template <class V, Executor X>
  void commit_staged(State& state, std::size_t index, const V& kv, std::span<std::size_t> rows,
                     Selection& selection, Workspace& workspace, X& executor) noexcept {
    selection_of(state, index, kv, rows, selection);
    commit(state, index, kv, kv, selection, workspace, executor);
  }

  /// Bytes that layers staged together take beside those of one: 1.1 bits for each of `rows` rows and row of
  /// scores.
  std::size_t held_bytes(std::size_t score_rows, std::size_t rows) const {
    return (next_.size() - 1) * score_rows * rows * 11 / 80;
  }

  std::size_t memory_bytes() const {
    std::size_t total = 0;
    for (const Retained& layer : next_) {
      total += layer.memory_bytes();
    }
    return total;
  }

 private:
  Retained& next_of(std::size_t index) { return next_[next_.size() == 1 ? 0 : index]; }
  const Retained& next_of(std::size_t index) const { return next_[next_.size() == 1 ? 0 : index]; }

  std::vector<Retained> next_;   // what layers are to hold: the one at hand, or all that change at once
  std::size_t staged_rows_ = 0;  // most rows that a selection of a layer staged has
};

}  // namespace compresskv::sequence
