#pragma once

#include <cassert>
#include <cstddef>
#include <cstdint>

#include "compresskv/core/float_bits.hpp"
#include "compresskv/core/strict_float_begin.hpp"
#include "compresskv/kernel/decode_row.hpp"
#include "compresskv/view/kv_view.hpp"
#include "compresskv/view/run.hpp"

namespace compresskv::kernel {

/// Which half of a cache is read.
enum class Part : std::uint8_t { keys, values };

/// The i-th run of a KV head's keys or values.
template <Part part, KvView V>
auto run_of(const V& kv, std::size_t kv_head, std::size_t i) {
  if constexpr (part == Part::keys) {
    return Run<const typename V::key_element>(kv.key_run(kv_head, i));
  } else {
    return Run<const typename V::value_element>(kv.value_run(kv_head, i));
  }
}

/// Reads the keys or the values of one KV head, some rows at a time, in ascending order: two readers may go
/// through the same rows at a distance. Cost: each run's type is asked for once a piece.
template <Part part, KvView V>
class RowReader {
 public:
  /// `buffer` has room for a row of `head_dim` float32. The view outlives the reader.
  RowReader(const V& kv, std::size_t kv_head, float* buffer) : kv_(&kv), kv_head_(kv_head), buffer_(buffer) {}

  /// The row that comes next.
  std::size_t at() const { return row_; }

  /// Calls `visit(row, values)` for the rows from `at()` up to `last`, at most all of them, `values` being
  /// `head_dim` float32, valid during the call.
  template <class Visit>
  void read_to(std::size_t last, Visit&& visit) {
    assert(last <= kv_->rows(kv_head_));
    while (row_ < last) {
      with_element(run(), [&](const auto& rows) {
        for (; in_run_ < rows.rows && row_ < last; ++in_run_, ++row_) {
          decode_row(rows, in_run_, kv_->head_dim(), buffer_);
          visit(row_, static_cast<const float*>(buffer_));
        }
        leave_run(rows.rows);
      });
    }
  }

  /// Goes on at `row`, which is not below `at()`: the rows between are not read.
  void skip_to(std::size_t row) {
    assert(row >= row_ && row <= kv_->rows(kv_head_));
    while (row_ < row) {
      const std::size_t rows = run().rows;
      const std::size_t step = rows - in_run_ < row - row_ ? rows - in_run_ : row - row_;
      in_run_ += step;
      row_ += step;
      leave_run(rows);
    }
  }

 private:
  auto run() const { return run_of<part>(*kv_, kv_head_, run_); }

  void leave_run(std::size_t rows) {
    if (in_run_ == rows) {
      in_run_ = 0;
      ++run_;
    }
  }

  const V* kv_;
  std::size_t kv_head_;
  float* buffer_;
  std::size_t run_ = 0;
  std::size_t in_run_ = 0;  // rows of it that were read
  std::size_t row_ = 0;
};

/// Whether no element of a decoded row is NaN or infinite.
inline bool row_is_finite(const float* row, std::size_t head_dim) {
  bool finite = true;
  for (std::size_t e = 0; e < head_dim; ++e) {
    finite = compresskv::detail::is_finite(row[e]) && finite;
  }
  return finite;
}

}  // namespace compresskv::kernel

#include "compresskv/core/strict_float_end.hpp"
