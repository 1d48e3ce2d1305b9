#pragma once

#include <cstddef>
#include <span>

#include "compresskv/core/element.hpp"
#include "compresskv/core/error.hpp"
#include "compresskv/core/executor.hpp"
#include "compresskv/core/retained.hpp"
#include "compresskv/core/workspace.hpp"
#include "compresskv/kernel/rotary.hpp"
#include "compresskv/sequence/state.hpp"
#include "compresskv/view/kv_view.hpp"

namespace compresskv::sequence {

/// Turns the keys of a layer from the positions that `state` knows to their row indices, and says so in
/// `state`. Throws ArgumentError before the first key is turned.
template <KvView V, Executor X>
void turn_to_rows(State& state, std::size_t index, const V& kv, const kernel::Rotary& rotary,
                  Workspace& workspace, X& executor) {
  const ElementKind kind = key_kind(kv);
  detail::require(kind <= ElementKind::bfloat16, "keys are ", name(kind),
                  ": only plain keys can be turned, quantised rows are never re-quantised");
  rotary.validate(kv.head_dim());
  for (std::size_t head = 0; head < kv.kv_heads(); ++head) {
    detail::require(kv.rows(head) == kv.rows(0), "KV head ", head, " has ", kv.rows(head),
                    " rows, KV head 0 ", kv.rows(0), ": contiguous positions need equal lengths");
    detail::check_writable(kv, head, 0, kv.rows(head));
  }
  state.reserve_whole(index, kv.rows(0));
  const std::span<float> buffers = workspace.take(Workspace::Slot::key_rows, kv.kv_heads() * kv.head_dim());
  detail::run_all(executor, workspace.take_counts(kv.kv_heads()), [&](std::size_t head) {
    Retained::Cursor positions = state.layer(index).cursor(head);
    std::size_t row = 0;
    for (std::size_t i = 0; i < kv.run_count(head); ++i) {
      const auto run = kv.key_run(head, i);
      for (std::size_t r = 0; r < run.rows; ++r, ++row) {
        const std::size_t position = positions.seek(row);
        if (position != row) {
          with_plain_element(run, [&](const auto& keys) {
            kernel::rotate_row(keys, r, kv.head_dim(), rotary,
                               static_cast<double>(row) - static_cast<double>(position),
                               buffers.data() + head * kv.head_dim());
          });
        }
      }
    }
  });
  state.turn(index, kv.rows(0));
}

}  // namespace compresskv::sequence
