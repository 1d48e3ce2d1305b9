#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <string_view>
#include <vector>

#include "compresskv/core/error.hpp"
#include "compresskv/core/float_bits.hpp"
#include "compresskv/core/strict_float_begin.hpp"
#include "compresskv/kernel/decode_row.hpp"
#include "compresskv/kernel/layer_input.hpp"
#include "compresskv/kernel/row_reader.hpp"
#include "compresskv/view/observation.hpp"
#include "compresskv/view/run.hpp"

namespace compresskv::kernel {

namespace detail {

/// Index of the first value that is NaN or infinite; `values.size()` where none is.
inline std::size_t first_not_finite(std::span<const float> values) {
  std::size_t t = 0;
  while (t < values.size() && compresskv::detail::is_finite(values[t])) {
    ++t;
  }
  return t;
}

[[noreturn]] inline void fail_not_finite(std::size_t layer, std::size_t head, std::size_t token,
                                         std::string_view why) {
  compresskv::detail::fail<ScoreError>("score of layer ", layer, " query head ", head, " token ", token,
                                       " is not finite: ", why, "; the cache was left as it is");
}

/// Whether all elements from row `first` on are finite.
template <class Run>
bool rows_are_finite(const Run& run, std::size_t first, std::size_t row_size) {
  std::vector<float> row(row_size);
  return with_element(run, [&](const auto& typed) {
    for (std::size_t r = first; r < typed.rows; ++r) {
      decode_row(typed, r, row_size, row.data());
      if (first_not_finite(row) < row_size) {
        return false;
      }
    }
    return true;
  });
}

/// Throws for a head and the row of its logits whose softmax is not finite. Reads keys and queries once more,
/// to say whether they are to blame or their products.
template <class Kv, QueryObservation O>
[[noreturn]] void fail_of_logits(const LayerInput<Kv, O>& in, std::size_t head, std::span<const float> row) {
  const std::size_t bad = first_not_finite(row);
  const std::size_t kv_head = head / in.shape.group();
  const auto queries = in.observation.query_run(head);
  bool finite =
      rows_are_finite(queries, queries.rows - (std::min)(queries.rows, in.rows[kv_head]), in.shape.head_dim);
  for (std::size_t i = 0; finite && i < in.kv.run_count(kv_head); ++i) {
    const Run<const typename Kv::key_element> keys = in.kv.key_run(kv_head, i);
    finite = rows_are_finite(keys, 0, in.shape.head_dim);
  }
  // Where all logits are -inf, the first is named.
  fail_not_finite(in.layer, head, bad < row.size() ? bad : 0,
                  finite
                      ? "keys and queries are finite, but their products times the scale are beyond float32: "
                        "check the scale, or make queries or keys smaller"
                      : "the keys or queries hold NaN or infinite values");
}

/// Throws where `values`, which come of attention that the engine computed, are not all finite. Attention
/// from queries has been checked row by row.
template <class Kv, Observation O>
void check_finite(const LayerInput<Kv, O>& in, std::uint32_t head, std::span<const float> values) {
  if constexpr (!QueryObservation<O>) {
    const std::size_t bad = first_not_finite(values);
    if (bad == values.size()) {
      return;
    }
    bool finite = false;
    if constexpr (AttentionObservation<O>) {
      finite = rows_are_finite(in.observation.attention_run(head), 0, in.observation.tokens());
    }
    fail_not_finite(in.layer, head, bad,
                    finite
                        ? "the attention given is finite, but holds a negative weight, or weights too large "
                          "to add up: give probabilities, after the softmax"
                        : "the attention given holds NaN or infinite values");
  }
}

}  // namespace detail

/// The lowest row of each KV head that is not finite, noted by tasks, which do not throw.
class RefusedRows {
 public:
  /// `lowest` has a number a KV head.
  explicit RefusedRows(std::span<std::size_t> lowest) : lowest_(lowest) {
    std::fill(lowest.begin(), lowest.end(), none);
  }

  /// Notes a decoded row, where it is not `finite`.
  void look(std::size_t kv_head, Part part, std::size_t row, bool finite) {
    if (!finite) {
      lowest_[kv_head] = (std::min)(lowest_[kv_head], 2 * row + (part == Part::keys ? 0 : 1));
    }
  }

  /// Throws ScoreError naming the lowest KV head's. Call it once all tasks have ended.
  void check(std::size_t layer) const {
    for (std::size_t kv_head = 0; kv_head < lowest_.size(); ++kv_head) {
      const std::size_t found = lowest_[kv_head];
      compresskv::detail::require<ScoreError>(
          found == none, found % 2 == 0 ? "key" : "value", " of layer ", layer, " KV head ", kv_head,
          " token ", found / 2,
          " holds NaN or infinite elements: it has no score; the cache was left as it is");
    }
  }

 private:
  static constexpr std::size_t none = (std::numeric_limits<std::size_t>::max)();
  std::span<std::size_t> lowest_;
};

}  // namespace compresskv::kernel

#include "compresskv/core/strict_float_end.hpp"
