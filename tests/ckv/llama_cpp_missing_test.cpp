// A tool that was built without libllama.

#include <gtest/gtest.h>

#include "tool.hpp"

namespace ckv_test {
namespace {

TEST(WithoutLlamaCpp, IsRefusedWithTheRemedy) {
  const Folder folder;
  const std::string model = folder.write("m.gguf", "GGUF").string();
  const std::string message = "run scripts/llama_cpp.sh";
  expect_usage_error(
      {"generate", "--engine", "llama.cpp", "--model", model, "--prompt", "x", "--method", "full"}, message);
  expect_usage_error({"inspect", "--engine", "llama.cpp", model}, message);
  const std::string out = folder.path("out").string();
  expect_usage_error({"evaluate", "--engine", "llama.cpp", "--model", model, "--ratios", "0.1", "--out", out},
                     message);
  expect_usage_error({"calibrate", "--engine", "llama.cpp", "--model", model, "--out", out}, message);
  expect_usage_error({"demo", "--engine", "llama.cpp", "--model", model}, message);
}

}  // namespace
}  // namespace ckv_test
