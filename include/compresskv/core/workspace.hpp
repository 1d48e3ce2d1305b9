#pragma once

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

  /// Bytes held now.
  std::size_t bytes() const {
    std::size_t total = 0;
    for (const auto& buffer : buffers_) {
      total += buffer.capacity() * sizeof(float);
    }
    return total;
  }

 private:
  std::array<std::vector<float>, 7> buffers_;
};

}  // namespace compresskv
