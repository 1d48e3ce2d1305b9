#pragma once

#include <cmath>
#include <cstddef>

#include "compresskv/core/strict_float_begin.hpp"

namespace compresskv::detail {

/// 1 / sqrt(d), the scale of logits that a model has unless it says otherwise. The root is taken in float64,
/// where no flag makes it an estimate; rounded to float32 it is float32's own.
inline float default_scale(std::size_t head_dim) {
  return 1.0F / static_cast<float>(std::sqrt(static_cast<double>(head_dim)));
}

}  // namespace compresskv::detail

#include "compresskv/core/strict_float_end.hpp"
