// Runs the tool as a user would.
#pragma once

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <sstream>
#include <stdexcept>
#include <string>
#include <system_error>
#include <vector>

namespace ckv_test {

using Json = nlohmann::json;
using Arguments = std::vector<std::string>;

struct Outcome {
  int code = -1;
  std::string out;
  std::string err;

  Json json() const { return Json::parse(out); }
};

inline std::string read(const std::filesystem::path& path) {
  std::ifstream in{path, std::ios::binary};
  return {std::istreambuf_iterator<char>{in}, {}};
}

/// A folder of this process's own, gone afterwards.
class Folder {
 public:
  Folder() {
    std::string name = (std::filesystem::temp_directory_path() / "ckv-test-XXXXXX").string();
    if (mkdtemp(name.data()) == nullptr) {
      throw std::runtime_error("cannot make a folder for the test");
    }
    path_ = name;
  }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;
  ~Folder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }

  std::filesystem::path path(const char* name) const { return path_ / name; }
  std::filesystem::path write(const char* name, const std::string& text) const {
    std::ofstream{path(name), std::ios::binary} << text;
    return path(name);
  }

 private:
  std::filesystem::path path_;
};

inline std::string quoted(const std::string& text) {
  std::string out = "'";
  for (const char c : text) {
    out += c == '\'' ? std::string("'\\''") : std::string(1, c);
  }
  return out + "'";
}

/// `environment`: of the run, such as COLUMNS=80.
inline Outcome run_tool(const Arguments& arguments, const std::string& environment = {}) {
  const Folder folder;
  std::string command = environment + " " + quoted(COMPRESSKV_CKV_BINARY);
  for (const std::string& argument : arguments) {
    command += " " + quoted(argument);
  }
  command += " >" + quoted(folder.path("out").string()) + " 2>" + quoted(folder.path("err").string());
  const int status = std::system(command.c_str());
  return {.code = WIFEXITED(status) ? WEXITSTATUS(status) : -1,
          .out = read(folder.path("out")),
          .err = read(folder.path("err"))};
}

inline void expect_usage_error(const Arguments& arguments, const std::string& message) {
  const Outcome outcome = run_tool(arguments);
  EXPECT_EQ(outcome.code, 2) << outcome.err;
  EXPECT_NE(outcome.err.find(message), std::string::npos) << outcome.err;
  EXPECT_EQ(outcome.out, "");
}

inline void expect_failure(const Arguments& arguments, const std::string& message) {
  const Outcome outcome = run_tool(arguments);
  EXPECT_EQ(outcome.code, 1) << outcome.err;
  EXPECT_NE(outcome.err.find(message), std::string::npos) << outcome.err;
  EXPECT_EQ(outcome.out, "");
}

/// A file that is none: wrong usage where that is seen at once, else a failure.
inline void expect_refused(const Arguments& arguments, const std::vector<std::string>& parts) {
  const Outcome outcome = run_tool(arguments);
  EXPECT_TRUE(outcome.code == 1 || outcome.code == 2) << outcome.code << outcome.err;
  for (const std::string& part : parts) {
    EXPECT_NE(outcome.err.find(part), std::string::npos) << outcome.err;
  }
  EXPECT_EQ(outcome.out, "");
}

inline std::size_t longest_line(const std::string& text) {
  std::istringstream lines{text};
  std::size_t longest = 0;
  for (std::string line; std::getline(lines, line);) {
    longest = std::max(longest, line.size());
  }
  return longest;
}

/// What is printed from `start` on keeps to the width of the terminal, and no word of it is lost but paths,
/// which may be wider.
inline void expect_narrow_output(const Arguments& arguments, const std::string& start) {
  const auto words = [&](const std::string& text) {
    std::istringstream all{text.substr(std::min(text.find(start), text.size()))};
    std::vector<std::string> some;
    for (std::string word; all >> word;) {
      if (word.find('/') == std::string::npos) {
        some.push_back(word);
      }
    }
    return some;
  };
  const Outcome wide = run_tool(arguments, "COLUMNS=");
  EXPECT_EQ(wide.code, 0) << wide.err;
  EXPECT_GT(longest_line(wide.out), 80U) << wide.out;
  EXPECT_FALSE(words(wide.out).empty()) << wide.out;
  for (const std::size_t columns : {80U, 40U}) {
    const Outcome narrow = run_tool(arguments, "COLUMNS=" + std::to_string(columns));
    EXPECT_EQ(narrow.code, 0) << narrow.err;
    EXPECT_LE(longest_line(narrow.out), columns) << narrow.out;
    EXPECT_EQ(words(narrow.out), words(wide.out)) << narrow.out;
  }
}

}  // namespace ckv_test
