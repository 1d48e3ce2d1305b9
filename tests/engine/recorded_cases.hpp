#pragma once

#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>

/// Cases recorded by tools/check_tokenizer.py. The tool runs the tests on more cases than are kept here by
/// pointing COMPRESSKV_TOKENIZER_DATA at another folder.
namespace recorded {

inline nlohmann::json cases(const std::string& file) {
  const char* folder = std::getenv("COMPRESSKV_TOKENIZER_DATA");
  const std::filesystem::path path = std::filesystem::path(folder ? folder : COMPRESSKV_TEST_DATA_DIR) / file;
  std::ifstream stream(path);
  if (!stream) throw std::runtime_error("cannot open the recorded cases " + path.string());
  return nlohmann::json::parse(stream);
}

}  // namespace recorded

/// Runs `statement`, which must throw engine::Error with `part` in its message.
template <class Statement>
void expect_error(const Statement& statement, const std::string& part) {
  try {
    statement();
  } catch (const engine::Error& error) {
    EXPECT_NE(std::string(error.what()).find(part), std::string::npos)
        << "message: " << error.what() << "\nexpected part: " << part;
    return;
  }
  ADD_FAILURE() << "nothing was thrown; expected an error with: " << part;
}
