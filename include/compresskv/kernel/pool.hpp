#pragma once

namespace compresskv::kernel {

/// How neighbouring tokens share their scores (docs/method.md 2.2).
enum class Pool {
  average,  ///< divides by the width at the borders too: padding counts as zeros
  max,      ///< ignores padding
};

}  // namespace compresskv::kernel
