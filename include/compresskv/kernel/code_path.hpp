#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <optional>
#include <string_view>

#include "compresskv/core/error.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace compresskv::kernel {

/// Which instructions the dispatched kernels use; each path has those of the paths before it as well. All but
/// the last give the same result, bit for bit. The last differs where both keys and queries are bfloat16,
/// within the bound that `kernel::logits` states.
///
/// A dispatched kernel is three headers: `softmax.hpp` states the contract and chooses by `uses()`,
/// `softmax_portable.hpp` is plain C++, and `x86/softmax_avx2_avx512.hpp` holds the versions whose
/// instructions its name says, each a free function with a target attribute.
enum class CodePath {
  portable,     ///< plain C++; correct everywhere, slow where the compiler may not assume fused multiply-add
  avx2,         ///< AVX2, FMA and F16C
  avx512,       ///< AVX-512 F, VL, DQ and BW
  avx512_bf16,  ///< dot products of bfloat16 pairs
};

/// From the slowest to the fastest.
inline constexpr std::array all_code_paths{CodePath::portable, CodePath::avx2, CodePath::avx512,
                                           CodePath::avx512_bf16};
inline constexpr std::array<std::string_view, all_code_paths.size()> code_path_names{"portable", "avx2",
                                                                                     "avx512", "avx512_bf16"};

/// The path of that name, or nothing.
constexpr std::optional<CodePath> code_path_named(std::string_view wanted) {
  const auto found = std::find(code_path_names.begin(), code_path_names.end(), wanted);
  if (found == code_path_names.end()) {
    return std::nullopt;
  }
  return all_code_paths[static_cast<std::size_t>(found - code_path_names.begin())];
}

constexpr std::string_view name(CodePath path) { return code_path_names[static_cast<std::size_t>(path)]; }

/// Whether this CPU (and build) can run `path`.
inline bool supported(CodePath path) {
#if defined(__x86_64__)
  // __builtin_cpu_supports also asks whether the system saves the larger registers; clang 14 does not know
  // "f16c".
  unsigned eax = 0;
  unsigned ebx = 0;
  unsigned ecx = 0;
  unsigned edx = 0;
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
  const bool avx2 = f16c && __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("fma") != 0;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") != 0 &&
                      __builtin_cpu_supports("avx512vl") != 0 && __builtin_cpu_supports("avx512dq") != 0 &&
                      __builtin_cpu_supports("avx512bw") != 0;
  switch (path) {
    case CodePath::portable:
      return true;
    case CodePath::avx2:
      return avx2;
    case CodePath::avx512:
      return avx512;
    case CodePath::avx512_bf16:
      return avx512 && __builtin_cpu_supports("avx512bf16") != 0;
  }
  return false;
#else
  return path == CodePath::portable;
#endif
}

/// The fastest path that this CPU supports.
inline CodePath fastest_code_path() {
  CodePath fastest = CodePath::portable;
  for (const CodePath path : all_code_paths) {
    fastest = supported(path) ? path : fastest;
  }
  return fastest;
}

namespace detail {

inline std::atomic<CodePath>& active_code_path() {
  static std::atomic<CodePath> path{fastest_code_path()};
  return path;
}

}  // namespace detail

/// The path in use: the fastest that this CPU supports, unless forced.
inline CodePath code_path() { return detail::active_code_path().load(std::memory_order_relaxed); }

/// Whether kernels written for `path` are to run.
inline bool uses(CodePath path) { return code_path() >= path; }

/// Forces a path for the whole process: for tests, for comparing machines, and to do without the bfloat16 dot
/// products (`CodePath::avx512`).
/// Throws ArgumentError when the CPU does not support it.
inline void force_code_path(CodePath path) {
  compresskv::detail::require(supported(path), "code path '", name(path),
                              "' is not supported by this CPU: use '", name(fastest_code_path()),
                              "' or one before it");
  detail::active_code_path().store(path, std::memory_order_relaxed);
}

}  // namespace compresskv::kernel
