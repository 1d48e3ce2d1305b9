#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <span>
#include <type_traits>

#include "compresskv/core/element.hpp"
#include "compresskv/view/kv_view.hpp"
#include "compresskv/view/run.hpp"

namespace compresskv::kernel {

namespace detail {

/// Finds rows of one KV head in ascending order; each step costs the runs it passes.
template <class RunAt>
class RowCursor {
 public:
  explicit RowCursor(RunAt run_at) : run_at_(run_at), run_(run_at_(0)) {}

  /// Moves to `row`, which is not below the row before. Rows left in its run from there on: `left()`.
  auto* seek(std::size_t row) {
    while (row - first_ >= run_.rows) {
      first_ += run_.rows;
      run_ = run_at_(++index_);
    }
    offset_ = row - first_;
    return run_.row(offset_);
  }
  std::size_t left() const { return run_.rows - offset_; }
  const auto& run() const { return run_; }

 private:
  using RunType = std::invoke_result_t<RunAt, std::size_t>;
  RunAt run_at_;
  RunType run_;
  std::size_t index_ = 0;
  std::size_t first_ = 0;
  std::size_t offset_ = 0;
};

/// Prefetch distance in rows: which row comes next is in the list of rows, where no CPU looks for it.
inline constexpr std::size_t prefetch_rows = 8;

/// Moves `width` units of each of `rows` from memory where rows are `source_stride` apart, `rows[0]` at
/// `source`, to memory where they are `target_stride` apart.
template <class T>
void move_rows(std::span<const std::uint32_t> rows, const T* source, std::ptrdiff_t source_stride, T* target,
               std::ptrdiff_t target_stride, std::size_t width) {
  const auto contiguous = static_cast<std::ptrdiff_t>(width);
  const bool joined = source_stride == contiguous && target_stride == contiguous;
  constexpr std::size_t line = (std::max<std::size_t>)(64 / sizeof(T), 1);
  const auto at = [&](std::size_t i) {
    return source + static_cast<std::ptrdiff_t>(rows[i] - rows[0]) * source_stride;
  };
  for (std::size_t i = 0; i < rows.size();) {
    std::size_t count = 1;
    while (joined && i + count < rows.size() && rows[i + count] == rows[i] + count) {
      ++count;
    }
    for (std::size_t j = i + prefetch_rows; j < (std::min)(i + prefetch_rows + count, rows.size()); ++j) {
      for (std::size_t u = 0; u < width; u += line) {
        __builtin_prefetch(at(j) + u);
      }
    }
    T* const to = target + static_cast<std::ptrdiff_t>(i) * target_stride;
    if (to != at(i)) {
      std::memmove(static_cast<void*>(to), at(i), count * width * sizeof(T));
    }
    i += count;
  }
}

template <class SourceRun, class TargetRun>
void copy_plane(std::span<const std::uint32_t> rows, std::size_t units, SourceRun source_run,
                TargetRun target_run) {
  const std::size_t chunk =
      std::gcd((std::min)(source_run(0).chunk, units), (std::min)(target_run(0).chunk, units));
  // Chunk by chunk, so that a transposed layout moves along its contiguous axis.
  for (std::size_t u = 0; u < units; u += chunk) {
    RowCursor source(source_run);
    RowCursor target(target_run);
    const auto offset = [&](const auto& run) {
      return static_cast<std::ptrdiff_t>(u / run.chunk) * run.chunk_stride +
             static_cast<std::ptrdiff_t>(u % run.chunk);
    };
    for (std::size_t i = 0; i < rows.size();) {
      const auto* from = source.seek(rows[i]) + offset(source.run());
      auto* to = target.seek(i) + offset(target.run());
      const std::span<const std::uint32_t> rest = rows.subspan(i, (std::min)(rows.size() - i, target.left()));
      const auto count = static_cast<std::size_t>(
          std::partition_point(rest.begin(), rest.end(),
                               [&](std::uint32_t row) { return row - rows[i] < source.left(); }) -
          rest.begin());
      move_rows(rest.first(count), from, source.run().row_stride, to, target.run().row_stride,
                (std::min)(chunk, units - u));
      i += count;
    }
  }
}

/// One part of every row as a run: data, scales or zero points of int8 rows.
template <class T>
Run<T> plane(T* base, std::size_t rows, std::ptrdiff_t row_stride, std::size_t units) {
  return {.base = base,
          .rows = rows,
          .row_stride = row_stride,
          .chunk = units,
          .chunk_stride = static_cast<std::ptrdiff_t>(units)};
}

/// Calls `f` with a null pointer of the type `T`, or of `kind` where that is known when the program runs.
template <class T, class F>
void with_element_of(ElementKind kind, F&& f) {
  if constexpr (ElementOfAnyKind<T>) {
    with_kind(kind, f);
  } else {
    f(static_cast<compresskv::detail::KernelElement<T>*>(nullptr));
  }
}

/// A run of `AnyElement` as one of `T`; any other as the kernels read it.
template <Stored T, class U>
auto as_run_of(const Run<U>& run) {
  if constexpr (ElementOfAnyKind<U>) {
    return run.template as<T>();
  } else {
    return compresskv::detail::kernel_run(run);
  }
}

/// `source_run(i)` and `target_run(i)` give runs of `T`.
template <Stored T, class SourceRun, class TargetRun>
void copy_rows(std::span<const std::uint32_t> rows, std::size_t head_dim, SourceRun source_run,
               TargetRun target_run) {
  if constexpr (std::same_as<T, AffineInt8>) {
    const auto move = [&](std::size_t units, auto plane_of) {
      copy_plane(
          rows, units, [&](std::size_t i) { return plane_of(source_run(i)); },
          [&](std::size_t i) { return plane_of(target_run(i)); });
    };
    move(head_dim, [&](const Run<T>& run) { return plane(run.base, run.rows, run.row_stride, head_dim); });
    move(1, [](const Run<T>& run) { return plane(run.scales, run.rows, run.parameter_stride, 1); });
    move(1, [](const Run<T>& run) { return plane(run.zeros, run.rows, run.parameter_stride, 1); });
  } else {
    copy_plane(rows, head_dim / elements_per_unit<T>(), source_run, target_run);
  }
}

}  // namespace detail

/// Whether rows of one cache can be moved to the other as they are: the same elements, those written not
/// const.
template <KvView Source, KvView Target>
inline constexpr bool rows_fit =
    std::conjunction_v<std::negation<std::is_const<typename Target::key_element>>,
                       std::negation<std::is_const<typename Target::value_element>>,
                       std::is_same<compresskv::detail::KernelElement<typename Source::key_element>,
                                    compresskv::detail::KernelElement<typename Target::key_element>>,
                       std::is_same<compresskv::detail::KernelElement<typename Source::value_element>,
                                    compresskv::detail::KernelElement<typename Target::value_element>>>;

/// Row `i` of `target` becomes row `rows[i]` of `source`, keys and values, for one KV head; both hold
/// elements of the same kinds. `rows` ascend, so `source` and `target` may be the same cache: no row is
/// overwritten before it is read. Bytes are moved as they are.
template <KvView Source, KvView Target>
requires(rows_fit<Source, Target>) void copy_rows(const Source& source, const Target& target,
                                                  std::size_t kv_head, std::span<const std::uint32_t> rows) {
  if (rows.empty()) {
    return;
  }
  detail::with_element_of<typename Source::key_element>(key_kind(source), [&]<class T>(T*) {
    detail::copy_rows<T>(
        rows, source.head_dim(),
        [&](std::size_t i) { return detail::as_run_of<T>(source.key_run(kv_head, i)); },
        [&](std::size_t i) { return detail::as_run_of<T>(target.key_run(kv_head, i)); });
  });
  detail::with_element_of<typename Source::value_element>(value_kind(source), [&]<class T>(T*) {
    detail::copy_rows<T>(
        rows, source.head_dim(),
        [&](std::size_t i) { return detail::as_run_of<T>(source.value_run(kv_head, i)); },
        [&](std::size_t i) { return detail::as_run_of<T>(target.value_run(kv_head, i)); });
  });
}

}  // namespace compresskv::kernel
