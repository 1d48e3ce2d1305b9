#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <random>
#include <vector>

namespace compresskv::reference {

/// Seeded numbers that are the same on every platform: the standard fixes the bits of mt19937_64, but not
/// what its distributions make of them.
class Random {
 public:
  explicit Random(std::uint64_t seed) : bits_(seed) {}

  std::uint64_t bits() { return bits_(); }
  /// In [0, count).
  std::size_t below(std::size_t count) { return bits_() % count; }
  /// In [first, last].
  std::size_t between(std::size_t first, std::size_t last) { return first + below(last - first + 1); }
  bool coin() { return below(2) == 1; }
  template <class T>
  T pick(const std::vector<T>& from) {
    return from[below(from.size())];
  }
  /// In [0, 1).
  double uniform() { return static_cast<double>(bits_() >> 11U) * 0x1p-53; }
  /// Nearly standard normal: eight 16-bit uniforms added exactly, so no libm decides a bit. Within +-4.9.
  float gaussian() {
    std::uint64_t sum = 0;
    for (int draw = 0; draw < 2; ++draw) {
      for (std::uint64_t word = bits_(), i = 0; i < 4; ++i, word >>= 16U) {
        sum += word & 0xFFFFU;
      }
    }
    constexpr double mean = 8 * 65535.0 / 2;
    constexpr double deviation = 53509.0;  // sqrt(8 * (65536^2 - 1) / 12)
    return static_cast<float>((static_cast<double>(sum) - mean) / deviation);
  }

 private:
  std::mt19937_64 bits_;
};

}  // namespace compresskv::reference
