#pragma once

#include <algorithm>
#include <array>
#include <concepts>
#include <cstddef>
#include <span>
#include <string_view>

#include "compresskv/core/element.hpp"
#include "compresskv/core/error.hpp"
#include "compresskv/core/sizes.hpp"
#include "compresskv/view/layout.hpp"
#include "compresskv/view/run.hpp"

namespace compresskv::detail {

/// Blocks of a pool, each laid out alike.
struct PoolBlocks {
  std::size_t count = 1;
  std::size_t stride = 0;  ///< units from block to block; 0: one begins where the last row of another ends
};

/// `count` things at a constant stride.
struct Axis {
  std::string_view name;
  std::size_t stride = 0;
  std::size_t count = 0;
};

/// Units that an axis reaches over things of `covered` units. Throws ArgumentError where that is more than
/// `limit`.
inline std::size_t reach_of(std::string_view what, const Axis& axis, std::size_t covered, std::size_t limit) {
  require(axis.count <= 1 || (covered <= limit && axis.stride <= (limit - covered) / (axis.count - 1)), what,
          ": ", axis.name, " stride ", axis.stride, " times ", axis.count, " does not fit in memory");
  return axis.count <= 1 ? covered : covered + axis.stride * (axis.count - 1);
}

/// Units that rows of `covered` units reach which lie along all `axes`; sorts these. Throws ArgumentError
/// where rows lie over each other, or reach more than `limit`.
inline std::size_t reach_without_overlap(std::string_view what, std::span<Axis> axes, std::size_t covered,
                                         std::size_t limit) {
  // Sorted by stride, each axis must step over all that the axes below it cover. Not std::stable_sort: it
  // allocates.
  std::sort(axes.begin(), axes.end(), [](const Axis& a, const Axis& b) { return a.stride < b.stride; });
  for (const Axis& axis : axes) {
    require(axis.count <= 1 || axis.stride >= covered, what, ": ", axis.name, " stride is ", axis.stride,
            ", what lies below it covers ", covered, " units: rows would overlap");
    covered = reach_of(what, axis, covered, limit);
  }
  return covered;
}

/// Strides of one buffer, checked once: rows do not overlap and the last one is inside.
class Placement {
 public:
  Placement() = default;
  /// `what` names the buffer in messages; `size` is its units of `unit_bytes`, or `max_bytes / unit_bytes`
  /// where it is not known. In a pool, `strides` and `extents` are those of one of its `blocks`, which may
  /// also lie between each other's heads.
  Placement(std::string_view what, const layout::Strides& strides, const layout::Extents& extents,
            std::size_t size, std::size_t unit_bytes, const PoolBlocks& blocks = {})
      : strides_(strides) {
    const std::size_t limit = max_bytes / unit_bytes;
    const std::size_t chunk = strides.chunk == 0 ? extents.units : (std::min)(strides.chunk, extents.units);
    require(extents.units % chunk == 0, what, ": chunks of ", chunk, " do not divide a row of ",
            extents.units, " units: choose a split that does");
    std::array<Axis, 4> axes = {
        Axis{"chunk", strides.chunk_stride, extents.units / chunk}, Axis{"row", strides.row, extents.rows},
        Axis{"head", strides.head, extents.kv_heads}, Axis{"block", blocks.stride, blocks.count}};
    if (blocks.stride == 0) {
      axes[3].stride = chunk;
      for (const Axis& axis : std::span(axes).first(3)) {
        axes[3].stride = reach_of(what, axis, axes[3].stride, limit);
      }
    }
    block_stride_ = axes[3].stride;
    const std::size_t covered = reach_without_overlap(what, axes, chunk, limit);
    require(covered <= size || blocks.count > 1, what, ": ", extents.kv_heads, " KV heads of ", extents.rows,
            " rows reach ", covered, " units, the buffer has ", size,
            ": give the whole buffer, or smaller strides");
    require(covered <= size, what, ": ", blocks.count, " blocks at stride ", block_stride_, " reach ",
            covered, " units, the pool has ", size, ": give the whole pool, or lower pool_blocks");
    strides_.chunk = chunk;
    strides_.chunk_stride = chunk == extents.units ? chunk : strides.chunk_stride;
  }

  template <class T>
  Run<T> run(T* base, std::size_t kv_head, std::size_t rows) const {
    return {.base = base + kv_head * strides_.head,
            .rows = rows,
            .row_stride = static_cast<std::ptrdiff_t>(strides_.row),
            .chunk = strides_.chunk,
            .chunk_stride = static_cast<std::ptrdiff_t>(strides_.chunk_stride)};
  }

  const layout::Strides& strides() const { return strides_; }
  std::size_t block_stride() const { return block_stride_; }

 private:
  layout::Strides strides_;
  std::size_t block_stride_ = 0;
};

/// Units of a row of `head_dim` elements. Throws ArgumentError where blocks do not divide it.
template <Stored T>
std::size_t units_of_row(std::string_view what, std::size_t head_dim) {
  require(head_dim % elements_per_unit<T>() == 0, what, ": head_dim is ", head_dim,
          ", not a multiple of the ", elements_per_unit<T>(), " elements of a quantised block");
  return head_dim / elements_per_unit<T>();
}

/// Strides of `layout`. Throws ArgumentError where the products that a layout is made of would wrap.
template <layout::Layout L>
layout::Strides checked_strides(std::string_view what, const L& layout, const layout::Extents& extents,
                                std::size_t unit_bytes) {
  // Bare strides do not depend on the extents.
  require(std::same_as<L, layout::Strides> ||
              fits_in_memory(unit_bytes, {extents.kv_heads, extents.rows, extents.units}),
          what, ": ", extents.kv_heads, " KV heads of ", extents.rows, " rows of ", extents.units,
          " units do not fit in memory");
  return layout::strides_of(layout, extents);
}

}  // namespace compresskv::detail
