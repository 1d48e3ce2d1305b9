#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <span>

#include "compresskv/core/error.hpp"
#include "compresskv/core/executor.hpp"
#include "compresskv/core/float_bits.hpp"
#include "compresskv/core/float_mode.hpp"
#include "compresskv/core/strict_float_begin.hpp"
#include "compresskv/core/workspace.hpp"
#include "compresskv/kernel/attention_tiles.hpp"
#include "compresskv/kernel/group_attention.hpp"
#include "compresskv/kernel/key_rows.hpp"
#include "compresskv/kernel/layer_input.hpp"
#include "compresskv/kernel/logits.hpp"
#include "compresskv/kernel/packed_queries.hpp"
#include "compresskv/view/kv_view.hpp"

namespace compresskv::kernel {

namespace detail {

/// Keys that look for their latest like at the same time.
inline constexpr std::size_t seekers_at_a_time = 32;
/// Keys whose sums a task holds at a time, on the stack.
inline constexpr std::size_t sums_at_a_time = 256;

/// Cosine of two decoded keys in float64, in order; 0 where one has no length.
inline double cosine(const float* a, const float* b, std::size_t head_dim) {
  const double lengths = key_norm(a, head_dim) * key_norm(b, head_dim);
  return lengths == 0.0 ? 0.0 : product_of_rows(a, b, head_dim) / lengths;
}

/// How similar the keys of a KV head are, in memory of 3 floats a row.
template <class Kv, class O>
class KeySimilarity {
 public:
  KeySimilarity(const LayerInput<Kv, O>& in, std::size_t kv_head, double threshold, std::size_t spare,
                Workspace& workspace)
      : in_(in),
        kv_head_(kv_head),
        threshold_(threshold),
        rows_(in.rows[kv_head]),
        head_dim_(in.shape.head_dim),
        key_buffer_(key_buffer_size(key_kind(in.kv), head_dim_)),
        packed_size_(PackedQueries::size(seekers_at_a_time, head_dim_)),
        scratch_size_(packed_size_ + seekers_at_a_time * keys_at_a_time + key_buffer_ + 2 * head_dim_),
        stretches_((std::min)(most_stretches, (rows_ + keys_at_a_time - 1) / keys_at_a_time)) {
    const Room room(spare, rows_);
    while (stretches_ > 1 && stretches_ * scratch_size_ + 2 * head_dim_ > room.scratch) {
      --stretches_;
    }
    const std::span<float> arrays = workspace.take(Workspace::Slot::logits, 3 * rows_);
    limits_ = arrays.first(rows_);
    latest_ = arrays.subspan(rows_, rows_);
    cosines_ = arrays.last(rows_);
    scratches_ = workspace.take(Workspace::Slot::key_rows, stretches_ * scratch_size_);
    const std::span<float> sum = workspace.take(Workspace::Slot::queries, 2 * head_dim_);
    sum_ = sum.first(head_dim_);
    sum_rest_ = sum.last(head_dim_);
  }

  template <Executor X>
  std::span<float> means(X& executor) {
    read_keys();
    executor.parallel_for(stretches_, [&](std::size_t stretch) {
      const compresskv::detail::PlainFloats plain_here;
      for (std::size_t row = begin_of(stretch); row < begin_of(stretch + 1); row += seekers_at_a_time) {
        seek(row, (std::min)(seekers_at_a_time, begin_of(stretch + 1) - row), stretch);
      }
    });
    // The limits have done: the means take their place.
    executor.parallel_for(stretches_, [&](std::size_t stretch) {
      const compresskv::detail::PlainFloats plain_here;
      for (std::size_t row = begin_of(stretch); row < begin_of(stretch + 1); row += sums_at_a_time) {
        add_up(row, (std::min)(sums_at_a_time, begin_of(stretch + 1) - row), stretch);
      }
    });
    return limits_;
  }

 private:
  std::size_t begin_of(std::size_t stretch) const { return stretch * rows_ / stretches_; }
  float* scratch(std::size_t stretch) const { return scratches_.data() + stretch * scratch_size_; }

  /// Adds up all keys divided by their lengths, and finds what a product in float32 must be above to be worth
  /// a second look in float64.
  void read_keys() {
    std::fill(sum_.begin(), sum_.end(), 0.0F);
    std::fill(sum_rest_.begin(), sum_rest_.end(), 0.0F);
    // More than the roundings of a product of two keys, one of them divided by its length.
    const double margin = static_cast<double>(head_dim_ + 16) * 0x1p-24;
    for_each_key(in_.kv, kv_head_, scratch(0), [&](std::size_t row, const float* key) {
      const double norm = key_norm(key, head_dim_);
      compresskv::detail::require<ScoreError>(
          compresskv::detail::is_finite(norm), "score of layer ", in_.layer, " KV head ", kv_head_, " token ",
          row, " is not finite: the keys hold NaN or infinite values; the cache was left as it is");
      if (norm == 0.0) {
        limits_[row] = 0x1p127F;  // no product is above
        return;
      }
      usual_ = usual_ && norm > 1e-30 && norm < 1e30;
      limits_[row] = static_cast<float>((threshold_ - margin) * norm);
      for (std::size_t e = 0; e < head_dim_; ++e) {
        const double sum = whole_sum(e) + static_cast<double>(key[e]) / norm;
        sum_[e] = static_cast<float>(sum);
        sum_rest_[e] = static_cast<float>(sum - static_cast<double>(sum_[e]));
      }
    });
  }

  /// A sum is two floats, the second what the first rounds away.
  double whole_sum(std::size_t e) const {
    return static_cast<double>(sum_[e]) + static_cast<double>(sum_rest_[e]);
  }

  /// For `count` keys from `row` on the latest other key that is alike: products in float32 say where to
  /// look, float64 decides. Goes from the last key to the first, until all have theirs.
  void seek(std::size_t row, std::size_t count, std::size_t stretch) {
    float* const packed = scratch(stretch);
    float* const products = packed + packed_size_;
    float* const buffer = products + seekers_at_a_time * keys_at_a_time;
    float* const key = buffer + key_buffer_;
    std::array<bool, seekers_at_a_time> seeks{};
    std::size_t seeking = 0;
    std::fill_n(packed, packed_size_, 0.0F);
    for (std::size_t q = 0; q < count; ++q) {
      latest_[row + q] = std::bit_cast<float>(static_cast<std::uint32_t>(row + q));  // itself: none
      cosines_[row + q] = 0.0F;
      read_key(in_.kv, kv_head_, row + q, key);
      const double norm = key_norm(key, head_dim_);
      if (norm == 0.0) {
        continue;
      }
      seeks[q] = true;
      ++seeking;
      for (std::size_t e = 0; e < head_dim_; ++e) {
        key[e] = static_cast<float>(static_cast<double>(key[e]) / norm);
      }
      PackedQueries::pack(q, key, head_dim_, packed);
    }
    const PackedQueries seekers{.data = packed, .count = count, .head_dim = head_dim_};
    for (std::size_t end = rows_; end > 0 && seeking > 0;) {
      const std::size_t first = (end - 1) / keys_at_a_time * keys_at_a_time;
      const std::size_t keys = end - first;
      logits_of_tile(in_.kv, kv_head_, first, keys, seekers, 1.0F, buffer, products, keys_at_a_time);
      for (std::size_t q = 0; q < count; ++q) {
        if (seeks[q] && find_latest(row + q, first, keys, products + q * keys_at_a_time, key)) {
          seeks[q] = false;
          --seeking;
        }
      }
      end = first;
    }
  }

  /// Among `keys` keys from `first` on; whether there was one. `pair` is memory of two keys.
  bool find_latest(std::size_t row, std::size_t first, std::size_t keys, const float* products, float* pair) {
    bool any = !usual_;
    for (std::size_t t = 0; t < keys; ++t) {
      any |= products[t] > limits_[first + t];
    }
    bool decoded = false;
    for (std::size_t t = any ? keys : 0; t-- > 0;) {
      const std::size_t other = first + t;
      if (other == row || (usual_ && !(products[t] > limits_[other]))) {
        continue;
      }
      if (!decoded) {
        read_key(in_.kv, kv_head_, row, pair);
        decoded = true;
      }
      read_key(in_.kv, kv_head_, other, pair + head_dim_);
      const double found = cosine(pair, pair + head_dim_, head_dim_);
      if (found > threshold_) {
        latest_[row] = std::bit_cast<float>(static_cast<std::uint32_t>(other));
        cosines_[row] = static_cast<float>(found);
        return true;
      }
    }
    return false;
  }

  /// The means of `count` columns from `first` on: a column's sum is one product with the sum of all keys.
  void add_up(std::size_t first, std::size_t count, std::size_t stretch) {
    std::array<double, sums_at_a_time> left_out{};
    for (std::size_t row = 0; row < rows_; ++row) {
      const std::size_t latest = std::bit_cast<std::uint32_t>(latest_[row]);
      if (latest != row && latest >= first && latest < first + count) {
        left_out[latest - first] += static_cast<double>(cosines_[row]);
      }
    }
    float* const key = scratch(stretch);
    for (std::size_t i = 0; i < count; ++i) {
      read_key(in_.kv, kv_head_, first + i, key);
      const double norm = key_norm(key, head_dim_);
      double dot = 0.0;
      for (std::size_t e = 0; e < head_dim_; ++e) {
        dot += static_cast<double>(key[e]) * whole_sum(e);
      }
      // Less 1, its cosine with itself.
      const double sum = norm == 0.0 ? 0.0 : dot / norm - 1.0 - left_out[i];
      limits_[first + i] = static_cast<float>(sum / static_cast<double>(rows_));
    }
  }

  const LayerInput<Kv, O>& in_;
  std::size_t kv_head_;
  double threshold_;
  std::size_t rows_;
  std::size_t head_dim_;
  std::size_t key_buffer_;
  std::size_t packed_size_;
  std::size_t scratch_size_;
  std::size_t stretches_;
  bool usual_ = true;         // the lengths of all keys leave float32 room for their products
  std::span<float> limits_;   // [row], then the means
  std::span<float> latest_;   // [row], the bits of a row's number
  std::span<float> cosines_;  // [row], with the latest
  std::span<float> scratches_;
  std::span<float> sum_;       // [head_dim]
  std::span<float> sum_rest_;  // [head_dim]
};

}  // namespace detail

/// How similar each key of a KV head is to the others (R-KV), window included:
///
///     means[j] = 1/S  sum over the other keys i  cos( key i, key j ), unless j is the latest key of i
///
/// The latest key of i is the last one but i whose cosine with key i is above `threshold`, at least 0. A key
/// of length 0 has cosine 0 with all. Products in float32 find candidates and float64 decides, so that the
/// result depends neither on their order nor on the processor.
///
/// Valid until the next `take` of `Workspace::Slot::logits`. Throws ScoreError naming the first key that is
/// not finite. `spare` is how many floats it may hold; 3 a row in any case. Cost: 2 S^2 head_dim flops where
/// no key has a like one, less as soon as they have; keys shorter than 1e-30 or longer than 1e30 take float64
/// throughout.
template <class Kv, class O, Executor X>
std::span<float> mean_similarities(const LayerInput<Kv, O>& in, std::size_t kv_head, double threshold,
                                   std::size_t spare, Workspace& workspace, X& executor) {
  const compresskv::detail::PlainFloats plain;
  return detail::KeySimilarity<Kv, O>(in, kv_head, threshold, spare, workspace).means(executor);
}

}  // namespace compresskv::kernel

#include "compresskv/core/strict_float_end.hpp"
