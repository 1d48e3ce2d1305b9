#pragma once

#include <bit>
#include <cmath>
#include <compresskv/core/element.hpp>
#include <cstddef>
#include <cstdint>

#include "reference/random.hpp"

namespace compresskv::reference {

/// Random contents of a stored unit, and what an element of it decodes to.
inline std::uint16_t random_scale(Random& random) {
  return std::bit_cast<std::uint16_t>(static_cast<half>(0.01F + 0.02F * std::abs(random.gaussian())));
}

inline float scale_of(std::uint16_t bits) { return static_cast<float>(std::bit_cast<half>(bits)); }

inline void randomise(BlockQ8_0& block, Random& random) {
  block.scale = random_scale(random);
  for (std::int8_t& quant : block.quants) {
    quant = static_cast<std::int8_t>(static_cast<int>(random.below(256)) - 128);
  }
}

inline void randomise(BlockQ4_0& block, Random& random) {
  block.scale = std::bit_cast<std::uint16_t>(static_cast<half>(0.2F + 0.1F * random.gaussian()));
  for (std::uint8_t& pair : block.quants) {
    pair = static_cast<std::uint8_t>(random.below(256));
  }
}

template <Element T>
inline void randomise(T& x, Random& random) {
  x = static_cast<T>(1.5F * random.gaussian());
}

// ggml's definitions: an element is the scale times a byte; or times a nibble less 8, the first 16 elements
// in the low ones.
inline float element(const BlockQ8_0& block, std::size_t e) {
  return scale_of(block.scale) * static_cast<float>(block.quants[e]);
}
inline float element(const BlockQ4_0& block, std::size_t e) {
  const int byte = block.quants[e % 16];
  return scale_of(block.scale) * static_cast<float>((e < 16 ? byte % 16 : byte / 16) - 8);
}

template <Element T>
float element(T x, std::size_t) {
  return static_cast<float>(x);
}

}  // namespace compresskv::reference
