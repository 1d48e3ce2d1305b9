#pragma once

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

}  // namespace compresskv::reference
