#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <span>
#include <vector>

namespace compresskv {

/// Scratch memory of one compressor: named buffers that grow and are never given back, so that the steady
/// state allocates nothing. Contents do not outlive the call that took them.
class Workspace {
 public:
  enum class Slot { queries, key_rows, logits, row_sums, sums, pooled, scores };

  /// `count` floats with unspecified contents; taking a slot again invalidates the span taken before.
  std::span<float> take(Slot slot, std::size_t count) {
    std::vector<float>& buffer = buffers_[static_cast<std::size_t>(slot)];
    if (buffer.size() < count) {
      buffer.clear();  // nothing to carry over into the larger buffer
      buffer.resize(count);
    }
    return std::span(buffer).first(count);
  }

  /// `count` numbers of rows, one a KV head or so, with unspecified contents.
  std::span<std::size_t> take_counts(std::size_t count) {
    counts_.resize(std::max(counts_.size(), count));
    return std::span(counts_).first(count);
  }

  /// Bytes held now.
  std::size_t bytes() const {
    std::size_t total = counts_.capacity() * sizeof(std::size_t);
    for (const auto& buffer : buffers_) {
      total += buffer.capacity() * sizeof(float);
    }
    return total;
  }

 private:
  std::array<std::vector<float>, 7> buffers_;
  std::vector<std::size_t> counts_;
};

}  // namespace compresskv
