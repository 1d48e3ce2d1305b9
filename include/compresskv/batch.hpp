#pragma once

#include <cstddef>
#include <exception>
#include <span>

#include "compresskv/core/executor.hpp"
#include "compresskv/core/retained.hpp"

namespace compresskv {

/// One sequence of a batch: its own compressor, and its view and observation of the layer at hand.
template <class C, class V, class O>
struct BatchItem {
  C* compressor = nullptr;  ///< not owned
  V kv;
  O observation;
  std::exception_ptr error = nullptr;  ///< filled by `compress_batch`: why this one was not compressed
  bool done = false;                   ///< filled by `compress_batch`
};

template <class C, class V, class O>
BatchItem(C*, V, O) -> BatchItem<C, V, O>;

/// Compresses one layer of several sequences, of any lengths, one task a sequence; each result is that of the
/// sequence on its own, bit for bit, since nothing is shared but the plan.
///
/// A sequence that fails keeps its cache as it was and its exception in `error`; the others go on. Where the
/// executor throws, those that it left out fail with its exception. Afterwards the first failure, in the
/// order of the items, is thrown again. Each compressor may stand in the batch once.
template <class C, class V, class O, Executor X>
void compress_batch(std::size_t layer, std::span<BatchItem<C, V, O>> items, X& executor) {
  for (auto& item : items) {
    item.error = nullptr;
    item.done = false;
  }
  std::exception_ptr stopped = nullptr;
  try {
    executor.parallel_for(items.size(), [&](std::size_t i) noexcept {
      BatchItem<C, V, O>& item = items[i];
      try {
        item.compressor->compress(layer, item.kv, item.observation);
        item.done = true;
      } catch (...) {
        item.error = std::current_exception();
      }
    });
  } catch (...) {
    stopped = std::current_exception();
  }
  for (auto& item : items) {
    if (!item.done && !item.error) {
      item.error = stopped;
    }
  }
  for (const auto& item : items) {
    if (item.error) {
      std::rethrow_exception(item.error);
    }
  }
}

}  // namespace compresskv
