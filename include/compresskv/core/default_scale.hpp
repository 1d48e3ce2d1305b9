#pragma once

#include <cmath>
#include <cstddef>

#include "compresskv/core/strict_float_begin.hpp"

namespace compresskv::detail {

/// 1 / sqrt(d), the scale of logits that a model has unless it says otherwise.
inline float default_scale(std::size_t head_dim) { return 1.0F / std::sqrt(static_cast<float>(head_dim)); }

}  // namespace compresskv::detail

#include "compresskv/core/strict_float_end.hpp"
