#pragma once

#include <cassert>
#include <cmath>
#include <cstddef>

#include "compresskv/core/borrowed.hpp"
#include "compresskv/core/element.hpp"
#include "compresskv/core/error.hpp"
#include "compresskv/core/float_bits.hpp"
#include "compresskv/core/float_mode.hpp"
#include "compresskv/core/strict_float_begin.hpp"
#include "compresskv/kernel/decode_row.hpp"
#include "compresskv/view/run.hpp"

namespace compresskv::kernel {

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

  /// Throws ArgumentError where it does not fit rows of `head_dim` elements.
  void validate(std::size_t head_dim) const {
    using compresskv::detail::is_finite;
    using compresskv::detail::require;
    const std::size_t rotated = dims == 0 ? head_dim : dims;
    require(rotated % 2 == 0 && rotated <= head_dim, "Rotary: dims is ", rotated,
            ", must be even and at most head_dim ", head_dim);
    require(is_finite(base) && base > 0.0, "Rotary: base is ", base, ", must be finite and above 0");
    require(is_finite(position_scale) && position_scale > 0.0, "Rotary: position_scale is ", position_scale,
            ", must be finite and above 0");
    require(frequency_factors.empty() || frequency_factors.size() == rotated / 2,
            "Rotary: ", frequency_factors.size(), " frequency factors for ", rotated / 2,
            " pairs: give one a pair");
    for (std::size_t j = 0; j < frequency_factors.size(); ++j) {
      require(is_finite(frequency_factors[j]) && frequency_factors[j] > 0.0F, "Rotary: frequency factor ", j,
              " is ", frequency_factors[j], ", must be finite and above 0");
    }
  }
};

/// Turns row `index` of a run by `distance` positions (negative: back): a key at position p becomes the key
/// at p + distance. Angles are float64, the row is rounded to its element type once. `buffer` has `head_dim`
/// floats.
template <Element T>
void rotate_row(const Run<T>& run, std::size_t index, std::size_t head_dim, const Rotary& rotary,
                double distance, float* buffer) {
  const compresskv::detail::PlainFloats plain;
  decode_row(Run<const T>(run), index, head_dim, buffer);
  const std::size_t dims = rotary.dims == 0 ? head_dim : rotary.dims;
  const std::size_t pairs = dims / 2;
  for (std::size_t j = 0; j < pairs; ++j) {
    double frequency = std::pow(rotary.base, -2.0 * static_cast<double>(j) / static_cast<double>(dims));
    if (!rotary.frequency_factors.empty()) {
      frequency /= static_cast<double>(rotary.frequency_factors[j]);
    }
    const double angle = distance * rotary.position_scale * frequency;
    const double cosine = std::cos(angle);
    const double sine = std::sin(angle);
    const bool split = rotary.pairing == RotaryPairing::half_split;
    float& x = buffer[split ? j : 2 * j];
    float& y = buffer[split ? j + pairs : 2 * j + 1];
    const auto old_x = static_cast<double>(x);
    const auto old_y = static_cast<double>(y);
    x = static_cast<float>(old_x * cosine - old_y * sine);
    y = static_cast<float>(old_x * sine + old_y * cosine);
  }
  T* row = run.row(index);
  for (std::size_t e = 0; e < dims; ++e) {
    row[static_cast<std::ptrdiff_t>(e / run.chunk) * run.chunk_stride +
        static_cast<std::ptrdiff_t>(e % run.chunk)] = static_cast<T>(buffer[e]);
  }
}

}  // namespace compresskv::kernel

#include "compresskv/core/strict_float_end.hpp"
