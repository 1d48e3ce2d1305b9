#pragma once

#include <Eigen/Core>
#include <bit>
#include <concepts>
#include <cstdint>
#include <type_traits>

namespace compresskv {

/// Element types of keys, values and attention that the kernels read. Arithmetic is always float32.
template <class T>
concept Element = std::same_as < std::remove_const_t<T>,
float > || std::same_as<std::remove_const_t<T>, Eigen::half> ||
    std::same_as<std::remove_const_t<T>, Eigen::bfloat16>;

/// Exact: every half and every bfloat16 is a float32.
inline float to_float(float value) { return value; }
inline float to_float(Eigen::half value) { return static_cast<float>(value); }
inline float to_float(Eigen::bfloat16 value) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(std::bit_cast<std::uint16_t>(value)) << 16U);
}

}  // namespace compresskv
