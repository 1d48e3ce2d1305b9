#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "compresskv/core/error.hpp"
#include "compresskv/core/protection.hpp"
#include "compresskv/core/retained.hpp"
#include "compresskv/core/scores.hpp"
#include "compresskv/sequence/saved_bytes.hpp"

namespace compresskv::sequence {

/// The tokens that no selection of a turn may evict: `Protection`, checked and copied.
class ProtectedTokens {
 public:
  /// Checks `protection` of a sequence of `tokens` tokens and makes room for it; `start` takes it over.
  /// Throws ArgumentError where positions do not ascend or lie behind the last token.
  void prepare(std::size_t tokens, const Protection& protection) {
    const auto listed = protection.positions;
    for (std::size_t i = 0; i < listed.size(); ++i) {
      detail::require(i == 0 || listed[i] > listed[i - 1], "protected position ", listed[i], " comes after ",
                      listed[i == 0 ? 0 : i - 1], ": positions must ascend, each once");
      detail::require(listed[i] < tokens, "protected position is ", listed[i],
                      ", the sequence has positions 0 to ", tokens - 1);
    }
    next_listed_.assign(listed.begin(), listed.end());
    listed_.reserve(listed.size());
  }

  void start(std::size_t tokens, const Protection& protection) noexcept {
    listed_.assign(next_listed_.begin(), next_listed_.end());
    first_ = protection.keep_first;
    last_from_ = protection.keep_last == 0 ? none : tokens - (std::min)(protection.keep_last, tokens);
  }

  /// Evictable tokens of a row of scores that are protected.
  template <Granularity G>
  std::size_t count(const Retained& layer, const Scores<G>& scores, std::size_t row) const {
    std::size_t found = 0;
    for_each<G>(layer, row, scores.tokens(row), [&](std::size_t) { ++found; });
    return found;
  }

  /// Gives them the highest finite score, which no attention reaches: any selector then keeps them. Throws
  /// ArgumentError where `capacity` cannot hold them beside the window.
  template <Granularity G>
  void mark(std::size_t index, const Retained& layer, const Scores<G>& scores, std::size_t capacity) const {
    mark(index, layer, scores, [&](std::size_t) { return capacity; });
  }
  /// The same with a capacity for each row of scores.
  template <Granularity G, std::invocable<std::size_t> CapacityOf>
  void mark(std::size_t index, const Retained& layer, const Scores<G>& scores,
            CapacityOf&& capacity_of) const {
    for (std::size_t row = 0; row < scores.rows(); ++row) {
      const std::size_t found = count(layer, scores, row);
      const std::size_t room = capacity_of(row) - scores.window(row);
      detail::require(found <= room, "layer ", index, " has room for ", room, " tokens beside the window, ",
                      found, " are protected: raise the budget or its minimum, or protect fewer");
    }
    for (std::size_t row = 0; row < scores.rows(); ++row) {
      for_each<G>(layer, row, scores.tokens(row),
                  [&](std::size_t token) { scores.row(row)[token] = (std::numeric_limits<float>::max)(); });
    }
  }

  void save(SavedWriter& out) const {
    out.number(first_);
    out.number(last_from_);
    out.number(listed_.size());
    for (const std::uint32_t position : listed_) {
      out.number(position, 4);
    }
  }
  /// Throws FileError.
  static ProtectedTokens read(SavedReader& in) {
    ProtectedTokens read;
    read.first_ = in.number("protected tokens");
    read.last_from_ = in.number("protected tokens");
    read.listed_.resize(in.count("protected tokens", 4));
    for (std::size_t i = 0; i < read.listed_.size(); ++i) {
      read.listed_[i] = static_cast<std::uint32_t>(in.number("protected tokens", 4));
      require_saved(i == 0 || read.listed_[i] > read.listed_[i - 1],
                    "its protected positions do not ascend: it is damaged");
    }
    return read;
  }

  std::size_t memory_bytes() const {
    return (listed_.capacity() + next_listed_.capacity()) * sizeof(std::uint32_t);
  }

 private:
  static constexpr std::size_t none = (std::numeric_limits<std::size_t>::max)();

  bool holds(std::size_t position) const {
    return position < first_ || position >= last_from_ ||
           std::binary_search(listed_.begin(), listed_.end(), position);
  }

  /// Calls `visit(token)` for each protected one of the first `tokens` rows of a row of scores. One that
  /// stands for all KV heads, which may hold different positions where the engine chose their rows, has those
  /// that are protected in any.
  template <Granularity G, class Visit>
  void for_each(const Retained& layer, std::size_t row, std::size_t tokens, Visit&& visit) const {
    if (first_ == 0 && last_from_ == none && listed_.empty()) {
      return;  // the usual case costs nothing
    }
    if (G == Granularity::layer && !layer.shared()) {
      for (std::size_t token = 0; token < tokens; ++token) {
        bool found = false;
        for (std::size_t head = 0; head < layer.lists() && !found; ++head) {
          found = holds(layer.position(token, head));
        }
        if (found) {
          visit(token);
        }
      }
      return;
    }
    Retained::Cursor positions = layer.cursor(row);
    for (std::size_t token = 0; token < tokens; ++token) {
      if (holds(positions.seek(token))) {
        visit(token);
      }
    }
  }

  std::size_t first_ = 0;
  std::size_t last_from_ = none;
  std::vector<std::uint32_t> listed_;
  std::vector<std::uint32_t> next_listed_;  // prepared, not started
};

}  // namespace compresskv::sequence
