#pragma once

#include <atomic>
#include <string_view>

#include "compresskv/core/error.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace compresskv::kernel {

/// Which instructions the dispatched kernels use. All float32 paths give the same result, bit for bit.
enum class CodePath {
  portable,  ///< plain C++; correct everywhere, slow where the compiler may not assume fused multiply-add
  avx2,      ///< AVX2, FMA and F16C
};

constexpr std::string_view name(CodePath path) { return path == CodePath::avx2 ? "avx2" : "portable"; }

/// Whether this CPU (and build) can run `path`.
inline bool supported(CodePath path) {
  if (path == CodePath::portable) {
    return true;
  }
#if defined(__x86_64__)
  // __builtin_cpu_supports also asks whether the system saves the wide registers; clang 14 does not know
  // "f16c".
  unsigned eax = 0;
  unsigned ebx = 0;
  unsigned ecx = 0;
  unsigned edx = 0;
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
  return f16c && __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("fma") != 0;
#else
  return false;
#endif
}

namespace detail {

inline std::atomic<CodePath>& active_code_path() {
  static std::atomic<CodePath> path{supported(CodePath::avx2) ? CodePath::avx2 : CodePath::portable};
  return path;
}

}  // namespace detail

/// The path in use: the fastest that this CPU supports, unless forced.
inline CodePath code_path() { return detail::active_code_path().load(std::memory_order_relaxed); }

/// Forces a path for the whole process; meant for tests and for comparing machines.
/// Throws ArgumentError when the CPU does not support it.
inline void force_code_path(CodePath path) {
  compresskv::detail::require(supported(path), "code path '", name(path),
                              "' is not supported by this CPU: use 'portable'");
  detail::active_code_path().store(path, std::memory_order_relaxed);
}

}  // namespace compresskv::kernel
