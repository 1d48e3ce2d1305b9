#pragma once

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>

#include "compresskv/core/error.hpp"
#include "compresskv/core/float_bits.hpp"
#include "compresskv/core/shape.hpp"

namespace compresskv {

/// How much cache a sequence may keep in the whole model, as the user says it. `resolve()` turns it into rows
/// a layer: the mean, of which an allocator makes each layer's capacity.
class Budget {
 public:
  /// Mean rows a layer, window included.
  static Budget tokens_per_layer(std::size_t rows) { return Budget{Unit::tokens, 0.0, rows}; }

  /// Share of the prompt **kept**, in (0, 1]. Throws ArgumentError outside.
  static Budget kept_ratio(double share) {
    detail::require(detail::is_finite(share) && share > 0.0 && share <= 1.0, "budget ratio is ", share,
                    ", must be in (0, 1]: it is the share of the cache that is kept");
    return Budget{Unit::ratio, share, 0};
  }

  /// Bytes of keys and values over all layers of one sequence. Needs `ModelShape::kv_row_bytes`.
  static Budget bytes(std::uint64_t total) { return Budget{Unit::bytes, 0.0, total}; }

  /// The budget as a text that is no other budget's: "256 rows a layer", "0.12 of the prompt", "1048576
  /// bytes".
  std::string text() const {
    if (unit_ != Unit::ratio) {
      return std::to_string(amount_) + (unit_ == Unit::tokens ? " rows a layer" : " bytes");
    }
    std::array<char, 32> digits;  // as many as tell it from its neighbours
    const auto end = std::to_chars(digits.data(), digits.data() + digits.size(), share_);
    return std::string(digits.data(), end.ptr) + " of the prompt";
  }

  /// Mean rows a layer, window included, for a prompt of `prompt_tokens`; at most `prompt_tokens`, where it
  /// means that nothing is evicted. Throws ArgumentError when tokens or bytes give fewer rows than the
  /// window, or bytes are asked for without `shape.kv_row_bytes`. A ratio never falls below the window.
  std::size_t resolve(std::size_t prompt_tokens, std::size_t window, const ModelShape& shape) const {
    if (unit_ == Unit::ratio) {
      const double kept = std::floor(share_ * static_cast<double>(prompt_tokens));
      // As float64 the largest numbers of tokens are rounded, up to what no integer holds.
      const std::size_t rows = kept < 0x1p64 ? static_cast<std::size_t>(kept) : prompt_tokens;
      return (std::min)((std::max)(window, rows), prompt_tokens);
    }
    return (std::min)(fixed_rows(window, shape), prompt_tokens);
  }

  /// What can be checked before a prompt is known; same errors as `resolve`.
  void validate(std::size_t window, const ModelShape& shape) const {
    if (unit_ != Unit::ratio) {
      fixed_rows(window, shape);
    }
  }

 private:
  enum class Unit { tokens, ratio, bytes };

  Budget(Unit unit, double share, std::uint64_t amount) : unit_(unit), share_(share), amount_(amount) {}

  std::size_t fixed_rows(std::size_t window, const ModelShape& shape) const {
    if (unit_ == Unit::tokens) {
      detail::require(amount_ >= window, "budget is ", amount_, " rows a layer, the window alone is ", window,
                      ": give at least the window");
      return amount_;
    }
    detail::require(
        shape.kv_row_bytes > 0,
        "a budget in bytes needs ModelShape::kv_row_bytes, which is 0: set it to the bytes of one K "
        "and one V row of one KV head");
    const std::uint64_t row = shape.token_bytes();
    detail::require(row > 0, "a budget in bytes needs a model: ModelShape has ", shape.layers, " layers of ",
                    shape.kv_heads, " KV heads");
    const std::uint64_t rows = amount_ / row;
    if (rows < window) {
      std::uint64_t least = 0;
      const bool wraps = __builtin_mul_overflow(row, window, &least);
      detail::fail<ArgumentError>("budget of ", amount_, " bytes is ", rows, " rows a layer (one row over ",
                                  shape.layers, " layers is ", row, " bytes), the window alone is ", window,
                                  ": give at least ", wraps ? "2^64" : std::to_string(least), " bytes");
    }
    return rows;
  }

  Unit unit_;
  double share_;
  std::uint64_t amount_;
};

}  // namespace compresskv
