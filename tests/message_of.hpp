#pragma once

#include <gtest/gtest.h>

#include <exception>
#include <initializer_list>
#include <string>
#include <string_view>

namespace compresskv::test {

/// The message of the `E` that `call` throws; a sentence that no message equals when it does not.
template <class E, class Call>
std::string message_of(const Call& call) {
  try {
    call();
  } catch (const E& error) {
    return error.what();
  } catch (const std::exception& error) {
    return std::string("(another type was thrown) ") + error.what();
  }
  return "(nothing was thrown)";
}

/// Whether `message` has all `parts`: the argument, its value, its bound, what to do.
inline testing::AssertionResult says(const std::string& message,
                                     std::initializer_list<std::string_view> parts) {
  for (const std::string_view part : parts) {
    if (message.find(part) == std::string::npos) {
      return testing::AssertionFailure() << "\"" << part << "\" is not in: " << message;
    }
  }
  return testing::AssertionSuccess();
}

}  // namespace compresskv::test
