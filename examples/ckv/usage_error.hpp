#pragma once

#include <stdexcept>

namespace ckv {

/// The command line asks for something that makes no sense: exit code 2. Everything else that fails is 1.
class UsageError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Ctrl-C was pressed. Thrown between two layers or two tokens, so that destructors tidy up.
class Interrupted : public std::runtime_error {
 public:
  Interrupted() : std::runtime_error("interrupted") {}
};

}  // namespace ckv
