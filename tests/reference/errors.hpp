#pragma once

#include <gtest/gtest.h>

#include <initializer_list>
#include <string>
#include <string_view>

namespace compresskv::reference {

/// `call` must throw an `E` whose message has all `parts`: the argument, its value, its bound, what to do.
template <class E, class Call>
void expect_error(Call&& call, std::initializer_list<std::string_view> parts) {
  try {
    call();
  } catch (const E& error) {
    const std::string text = error.what();
    for (const std::string_view part : parts) {
      EXPECT_NE(text.find(part), std::string::npos) << "no '" << part << "' in: " << text;
    }
    return;
  }
  ADD_FAILURE() << "nothing was thrown; expected an error that says '" << *parts.begin() << "'";
}

}  // namespace compresskv::reference
