// The real model of the end-to-end tests, loaded once a process.
#pragma once

#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <string>

#include "ckv/run.hpp"

namespace ckv_test {

inline std::string model_path() {
  const char* path = std::getenv("COMPRESSKV_TEST_MODEL");
  return path == nullptr ? std::string() : std::string(path);
}

inline const ckv::LoadedModel& model() {
  static const ckv::LoadedModel loaded = ckv::load_model(model_path(), 0);
  return loaded;
}

/// The calibration in the repository, made from this model.
inline std::filesystem::path calibration(const char* ending) {
  return std::filesystem::path(COMPRESSKV_SOURCE_DIR) / "examples/models/smollm2-135m-instruct" /
         (std::string("SmolLM2-135M-Instruct") + ending);
}

class RealModel : public testing::Test {
 protected:
  void SetUp() override {
    if (model_path().empty()) {
      GTEST_SKIP() << "COMPRESSKV_TEST_MODEL is not set: name the .gguf file that scripts/model.sh fetches";
    }
  }
};

}  // namespace ckv_test
