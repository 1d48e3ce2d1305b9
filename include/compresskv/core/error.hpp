#pragma once

#if !defined(__cpp_exceptions)
#error \
    "compresskv reports errors by exceptions: compile what includes it with -fexceptions, not -fno-exceptions"
#endif

#include <sstream>
#include <stdexcept>
#include <string>

namespace compresskv {

/// Base of everything the library throws. The message names the argument, its value, its bound and what to
/// do.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// A call was made with a value outside its bounds; nothing was changed.
class ArgumentError : public Error {
 public:
  using Error::Error;
};

/// A score came out NaN or infinite, so no order of the tokens exists; nothing was changed.
class ScoreError : public Error {
 public:
  using Error::Error;
};

/// A calibration file cannot be read, written or understood.
class FileError : public Error {
 public:
  using Error::Error;
};

namespace detail {

/// Throws `E` with its parts streamed into one message. Apart from `require`, so that callers stay small.
template <class E, class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw E(text.str());
}

/// Checks a precondition at public entry. The message is put together only when it fails.
template <class E = ArgumentError, class... Parts>
void require(bool holds, const Parts&... parts) {
  if (!holds) [[unlikely]] {
    fail<E>(parts...);
  }
}

}  // namespace detail
}  // namespace compresskv
