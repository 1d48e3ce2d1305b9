#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace compresskv {

/// Scratch memory of one compressor: named buffers that grow and are never given back, so that the steady
/// state allocates nothing. Contents do not outlive the call that took them.
class Workspace {
 public:
  enum class Slot { queries, key_rows, logits, row_sums, sums, pooled, scores, views, head_scores };

  /// `count` floats with unspecified contents, from the start of a cache line on, so that registers of whole
  /// lines do not straddle two; taking a slot again invalidates the span taken before.
  std::span<float> take(Slot slot, std::size_t count) {
    std::vector<float>& buffer = buffers_[static_cast<std::size_t>(slot)];
    constexpr std::size_t line = 64;
    if (buffer.size() < count + line / sizeof(float)) {
      buffer = std::vector<float>();  // nothing to carry over: the old one goes before the larger one comes
      buffer.resize(count + line / sizeof(float));
    }
    const std::size_t past_line = reinterpret_cast<std::uintptr_t>(buffer.data()) % line;
    return std::span(buffer).subspan((line - past_line) % line / sizeof(float), count);
  }

  /// `count` numbers of rows, one a KV head or so, with unspecified contents.
  std::span<std::size_t> take_counts(std::size_t count) {
    counts_.resize((std::max)(counts_.size(), count));
    return std::span(counts_).first(count);
  }

  /// The same for scores that a scorer makes of another's: they outlive what the other takes.
  std::span<std::size_t> take_ends(std::size_t count) {
    ends_.resize((std::max)(ends_.size(), count));
    return std::span(ends_).first(count);
  }

  /// `count` numbers of rows in 32 bits, with unspecified contents.
  std::span<std::uint32_t> take_indices(std::size_t count) {
    indices_.resize((std::max)(indices_.size(), count));
    return std::span(indices_).first(count);
  }

  /// Bytes held now.
  std::size_t bytes() const {
    std::size_t total = (counts_.capacity() + ends_.capacity()) * sizeof(std::size_t) +
                        indices_.capacity() * sizeof(std::uint32_t);
    for (const auto& buffer : buffers_) {
      total += buffer.capacity() * sizeof(float);
    }
    return total;
  }

 private:
  std::array<std::vector<float>, 9> buffers_;
  std::vector<std::size_t> counts_;
  std::vector<std::size_t> ends_;
  std::vector<std::uint32_t> indices_;
};

}  // namespace compresskv
