#pragma once

#if !defined(__cpp_exceptions)
#error \
    "compresskv reports errors by exceptions: compile what includes it with -fexceptions, not -fno-exceptions"
#endif

#include <array>
#include <charconv>
#include <concepts>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>

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

/// A calibration file or a saved sequence cannot be read, written or understood.
class FileError : public Error {
 public:
  using Error::Error;
};

namespace detail {

/// A part of a message. One function puts all messages together, and parts come in few types: streaming each
/// list of texts and numbers took a tenth of the time that a program which includes the library compiles.
struct MessagePart {
  enum class Kind : unsigned char { text, signed_integer, unsigned_integer, real };
  Kind kind = Kind::text;
  union {
    std::string_view text;
    long long signed_integer;
    unsigned long long unsigned_integer;
    double real;
  };

  MessagePart(const char* value) : text(value) {}
  MessagePart(std::string_view value) : text(value) {}
  MessagePart(long long value) : kind(Kind::signed_integer), signed_integer(value) {}
  MessagePart(unsigned long long value) : kind(Kind::unsigned_integer), unsigned_integer(value) {}
  MessagePart(double value) : kind(Kind::real), real(value) {}
};

inline std::string message_of(std::span<const MessagePart> parts) {
  std::string message;
  for (const MessagePart& part : parts) {
    switch (part.kind) {
      case MessagePart::Kind::text:
        message += part.text;
        break;
      case MessagePart::Kind::signed_integer:
        message += std::to_string(part.signed_integer);
        break;
      case MessagePart::Kind::unsigned_integer:
        message += std::to_string(part.unsigned_integer);
        break;
      case MessagePart::Kind::real: {
        std::array<char, 32> digits;  // six, as printf's %g gives them, whatever the locale
        const auto end = std::to_chars(digits.data(), digits.data() + digits.size(), part.real,
                                       std::chars_format::general, 6);
        message.append(digits.data(), end.ptr);
        break;
      }
    }
  }
  return message;
}

template <class E>
[[noreturn, gnu::noinline, gnu::cold]] void fail_with(std::span<const MessagePart> parts) {
  throw E(message_of(parts));
}
template <class E, class... Parts>
[[noreturn, gnu::noinline, gnu::cold]] void fail_of(Parts... parts) {
  const MessagePart all[] = {parts...};
  fail_with<E>(all);
}

/// What a part is made of, by one of the few types.
inline const char* part(const char* text) { return text; }
inline std::string_view part(const char& character) { return {&character, 1}; }
inline std::string_view part(std::string_view text) { return text; }
inline std::string_view part(const std::string& text) { return text; }
template <std::unsigned_integral T>
unsigned long long part(T value) {
  return value;
}
template <std::signed_integral T>
long long part(T value) {
  return value;
}
template <std::floating_point T>
double part(T value) {
  return static_cast<double>(value);
}

/// Throws `E` with its parts put into one message. Apart from `require`, so that callers stay small.
template <class E, class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  fail_of<E>(part(parts)...);
}

/// Checks a precondition at public entry. The message is put together only when it fails.
template <class E = ArgumentError, class... Parts>
void require(bool holds, const Parts&... parts) {
  if (!holds) [[unlikely]] {
    fail_of<E>(part(parts)...);
  }
}

}  // namespace detail
}  // namespace compresskv
