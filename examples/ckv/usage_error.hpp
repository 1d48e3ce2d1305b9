#pragma once

#include <stdexcept>

namespace ckv {

/// The command line asks for something that makes no sense: exit code 2. Everything else that fails is 1.
class UsageError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// A signal asked for an end: Ctrl-C, or SIGTERM. Thrown between two layers or two tokens, so that
/// destructors tidy up. Exit code 128 + signal, as shells have it.
class Interrupted : public std::runtime_error {
 public:
  explicit Interrupted(int signal) : std::runtime_error("interrupted"), signal_(signal) {}

  int signal() const { return signal_; }

 private:
  int signal_;
};

}  // namespace ckv
