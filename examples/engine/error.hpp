// The engine's only exception.
#pragma once

#include <stdexcept>

namespace engine {

/// Something the engine cannot do: a broken or unsupported file, a prompt that does not fit, a call out of
/// order. The message names the argument, its value, the bound and what to do about it.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace engine
