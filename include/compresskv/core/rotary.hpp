#pragma once

#include <cmath>
#include <cstddef>

#include "compresskv/core/borrowed.hpp"
#include "compresskv/core/error.hpp"
#include "compresskv/core/float_bits.hpp"
#include "compresskv/core/strict_float_begin.hpp"

namespace compresskv {

/// Which elements of a row rotate together.
enum class RotaryPairing {
  half_split,   ///< e and e + dims / 2 (GPT-NeoX, Hugging Face's LLaMA)
  interleaved,  ///< 2 e and 2 e + 1 (the original, GGUF's LLaMA)
};

/// The model's rotary position embedding.
///
///     angle of pair j at position p  =  p * position_scale * base^(-2 j / dims) / frequency_factors[j]
struct Rotary {
  double base = 10000.0;
  std::size_t dims = 0;  ///< elements that rotate, the first of a row; 0: all
  RotaryPairing pairing = RotaryPairing::half_split;
  double position_scale = 1.0;  ///< linear scaling: 1 / factor
  /// Divisors of the frequencies, `dims / 2` of them (Llama 3.1's `rope_freqs`; any scaling by frequency);
  /// empty: all 1. They are kept, not copied.
  Borrowed<const float> frequency_factors = {};

  /// Elements that rotate of a row of `head_dim`, and pairs of them.
  std::size_t rotated(std::size_t head_dim) const { return dims == 0 ? head_dim : dims; }
  std::size_t pairs(std::size_t head_dim) const { return rotated(head_dim) / 2; }

  /// The elements of pair `j`.
  std::size_t first(std::size_t j) const { return pairing == RotaryPairing::half_split ? j : 2 * j; }
  std::size_t second(std::size_t j, std::size_t head_dim) const {
    return pairing == RotaryPairing::half_split ? j + pairs(head_dim) : 2 * j + 1;
  }

  /// Of pair `j`, before `position_scale`.
  double frequency(std::size_t j, std::size_t head_dim) const {
    double frequency = std::pow(base, -2.0 * static_cast<double>(j) / static_cast<double>(rotated(head_dim)));
    if (!frequency_factors.empty()) {
      frequency /= static_cast<double>(frequency_factors[j]);
    }
    return frequency;
  }

  /// Radians that pair `j` turns from a position to the next.
  double step(std::size_t j, std::size_t head_dim) const { return position_scale * frequency(j, head_dim); }

  /// Throws ArgumentError where it does not fit rows of `head_dim` elements.
  void validate(std::size_t head_dim) const {
    using compresskv::detail::is_finite;
    using compresskv::detail::require;
    const std::size_t turned = rotated(head_dim);
    require(turned % 2 == 0 && turned <= head_dim, "Rotary: dims is ", turned,
            ", must be even and at most head_dim ", head_dim);
    require(is_finite(base) && base > 0.0, "Rotary: base is ", base, ", must be finite and above 0");
    require(is_finite(position_scale) && position_scale > 0.0, "Rotary: position_scale is ", position_scale,
            ", must be finite and above 0");
    require(frequency_factors.empty() || frequency_factors.size() == turned / 2,
            "Rotary: ", frequency_factors.size(), " frequency factors for ", turned / 2,
            " pairs: give one a pair");
    for (std::size_t j = 0; j < frequency_factors.size(); ++j) {
      require(is_finite(frequency_factors[j]) && frequency_factors[j] > 0.0F, "Rotary: frequency factor ", j,
              " is ", frequency_factors[j], ", must be finite and above 0");
    }
  }
};

}  // namespace compresskv

#include "compresskv/core/strict_float_end.hpp"
