#pragma once

namespace compresskv::kernel {

/// How neighbouring tokens share their scores (docs/method.md 2.2).
enum class Pool {
  average,  ///< of those around a token; divides by the width at the borders too: padding counts as zeros
  max,      ///< of those around a token; ignores padding
  /// Average of a token and those before it, otherwise as `average`. Ours: what follows a token that is
  /// looked at is read next, when it is too late to keep it.
  trailing,
};

}  // namespace compresskv::kernel
