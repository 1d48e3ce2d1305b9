#pragma once

#include <cstddef>
#include <new>
#include <span>

#include "compresskv/core/workspace.hpp"
#include "compresskv/view/kv_view.hpp"

namespace compresskv::detail {

/// Copies of the views of some layers, in the workspace's memory: the engine is asked for each view once,
/// before any row moves, as making one may fail.
template <KvView V>
class HeldViews {
  static_assert(alignof(V) <= 64, "the workspace aligns to 64 bytes");

 public:
  /// Room for `most` views.
  HeldViews(Workspace& workspace, std::size_t most)
      : views_(reinterpret_cast<V*>(
            workspace.take(Workspace::Slot::views, (most * sizeof(V) + sizeof(float) - 1) / sizeof(float))
                .data())) {}
  ~HeldViews() {
    for (; count_ > 0; --count_) {
      views_[count_ - 1].~V();
    }
  }
  HeldViews(const HeldViews&) = delete;
  HeldViews& operator=(const HeldViews&) = delete;

  const V& add(const V& view) {
    const V* const added = new (views_ + count_) V(view);
    ++count_;
    return *added;
  }

  /// The `count` added last.
  std::span<const V> last(std::size_t count) const { return {views_ + count_ - count, count}; }

 private:
  V* views_;
  std::size_t count_ = 0;
};

}  // namespace compresskv::detail
