#pragma once

#include <cmath>

#include "compresskv/core/strict_float_begin.hpp"

namespace compresskv::kernel {

/// `a * b + c`, rounded once.
inline float fused(float a, float b, float c) {
#if defined(__clang__) && defined(__x86_64__) && !defined(__FMA__)
  // Where the processor need not have it, clang makes two roundings of the call under -ffast-math; not of one
  // through a pointer.
  float (*const call)(float, float, float) = &::fmaf;
  return call(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

}  // namespace compresskv::kernel

#include "compresskv/core/strict_float_end.hpp"
