#pragma once

#include <algorithm>
#include <concepts>
#include <limits>

#include "compresskv/core/float_bits.hpp"
#include "compresskv/core/strict_float_begin.hpp"

namespace compresskv::detail {

/// A number as `T`, at most `most` from 0 where it is finite; NaN and infinity stay.
template <class T>
T narrowed(const double& number, double most = (std::numeric_limits<T>::max)()) {
  if constexpr (std::same_as<T, double>) {
    return number;
  } else {
    return static_cast<T>(is_finite(number) ? (std::clamp)(number, -most, most) : number);
  }
}

}  // namespace compresskv::detail

#include "compresskv/core/strict_float_end.hpp"
