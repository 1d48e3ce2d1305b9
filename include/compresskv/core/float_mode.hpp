#pragma once

#if defined(__x86_64__)
#include <xmmintrin.h>
#else
#include <cfenv>
#endif

namespace compresskv::detail {

/// While it lives, this thread rounds to nearest and keeps denormal numbers. A program that is linked with
/// -ffast-math or -Ofast, and many an engine by itself, has the processor take them for zero; scores would
/// then depend on who links them. Each function that computes makes one, each task of an executor too. Cost:
/// reading a register where nothing is to be changed.
class [[nodiscard]] PlainFloats {
 public:
#if defined(__x86_64__)
  PlainFloats() : found_(_mm_getcsr()) {
    if ((found_ & mode) != 0) {
      _mm_setcsr(found_ & ~mode);
    }
  }
  ~PlainFloats() {
    if ((found_ & mode) != 0) {
      _mm_setcsr(_mm_getcsr() | (found_ & mode));
    }
  }
#else
  PlainFloats() {
    std::fegetenv(&found_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~PlainFloats() { std::fesetenv(&found_); }
#endif
  PlainFloats(const PlainFloats&) = delete;
  PlainFloats& operator=(const PlainFloats&) = delete;

 private:
#if defined(__x86_64__)
  static constexpr unsigned mode = 0xE040;  // flush to zero, both bits of rounding, denormals are zeros
  unsigned found_;
#else
  std::fenv_t found_;
#endif
};

}  // namespace compresskv::detail
