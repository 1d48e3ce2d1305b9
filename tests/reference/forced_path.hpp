#pragma once

#include <gtest/gtest.h>

#include <compresskv/kernel/code_path.hpp>

namespace compresskv::reference {

/// Forces a code path while it lives.
class ForcedPath {
 public:
  explicit ForcedPath(kernel::CodePath path) : before_(kernel::code_path()) { kernel::force_code_path(path); }
  ~ForcedPath() { kernel::force_code_path(before_); }
  ForcedPath(const ForcedPath&) = delete;
  ForcedPath& operator=(const ForcedPath&) = delete;

 private:
  kernel::CodePath before_;
};

/// The fastest path with the bits of all others.
inline kernel::CodePath exact_path() {
  return kernel::supported(kernel::CodePath::avx512) ? kernel::CodePath::avx512 : kernel::fastest_code_path();
}

/// `check()` on every path that this CPU has, from the slowest to the fastest.
template <class Check>
void on_all_paths(Check&& check) {
  for (const kernel::CodePath path : kernel::all_code_paths) {
    if (kernel::supported(path)) {
      const ForcedPath forced(path);
      SCOPED_TRACE(kernel::name(path));
      check();
    }
  }
}

}  // namespace compresskv::reference
