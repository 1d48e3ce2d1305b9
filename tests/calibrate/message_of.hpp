#pragma once

#include <exception>
#include <string>

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

}  // namespace compresskv::test
