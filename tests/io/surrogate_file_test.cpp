#include "compresskv/io/surrogate_file.hpp"

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>

#include "message_of.hpp"
#include "reference/hidden_states.hpp"

namespace {

namespace fs = std::filesystem;
using compresskv::FileError;
using compresskv::ModelShape;
using compresskv::Surrogate;
using compresskv::io::load_surrogate;
using compresskv::io::save_surrogate;
using compresskv::test::message_of;

const ModelShape shape_of_surrogate{.layers = 2, .query_heads = 4, .kv_heads = 2, .head_dim = 8};

/// A folder of its own for each test, removed afterwards.
class SurrogateFile : public testing::Test {
 protected:
  SurrogateFile()
      : folder_(fs::path(testing::TempDir()) / ("ckv-surrogate-" + std::to_string(std::random_device{}()))) {
    fs::create_directories(folder_);
  }
  ~SurrogateFile() override { fs::remove_all(folder_); }
  SurrogateFile(const SurrogateFile&) = delete;
  SurrogateFile& operator=(const SurrogateFile&) = delete;

  fs::path path() const { return folder_ / "surrogate.bin"; }
  static Surrogate surrogate() { return compresskv::reference::surrogate(shape_of_surrogate, 5); }

  std::string bytes() const {
    save_surrogate(path(), surrogate());
    std::ifstream stream(path(), std::ios::binary);
    return {std::istreambuf_iterator<char>(stream), {}};
  }

  /// The message of the FileError, without the file's name in front.
  std::string rejection(const std::string& of) const {
    std::ofstream(path(), std::ios::binary) << of;
    const std::string message = message_of<FileError>([&] { load_surrogate(path()); });
    const std::string name = path().string() + ": ";
    return message.starts_with(name) ? message.substr(name.size()) : "(not named) " + message;
  }

  /// With the four bytes of `number` at byte `at`, and the checksum that fits.
  static std::string with_number(std::string of, std::size_t at, std::uint32_t number) {
    for (std::size_t i = 0; i < 4; ++i) {
      of[at + i] = static_cast<char>(number >> (8 * i) & 0xFFU);
    }
    std::uint64_t hash = 14695981039346656037U;
    for (std::size_t i = 0; i + 8 < of.size(); ++i) {
      hash = (hash ^ static_cast<unsigned char>(of[i])) * 1099511628211U;
    }
    for (std::size_t i = 0; i < 8; ++i) {
      of[of.size() - 8 + i] = static_cast<char>(hash >> (8 * i) & 0xFFU);
    }
    return of;
  }

 private:
  fs::path folder_;
};

TEST_F(SurrogateFile, ReadsBackWhatWasWrittenInTheFormThatIsWrittenDown) {
  const std::string written = bytes();
  EXPECT_EQ(load_surrogate(path()), surrogate());
  EXPECT_EQ(load_surrogate(path(), shape_of_surrogate), surrogate());
  EXPECT_EQ(written.substr(0, 24), (std::string{'c', 'k', 'v', 's', 'u', 'r', 'r', 'o', 1, 0, 0, 0,
                                                2,   0,   0,   0,   2,   0,   0,   0,   5, 0, 0, 0}));
  EXPECT_EQ(written.size(), 24U + 4 * 4 * 6 + 8);
  EXPECT_EQ(with_number(written, 8, 1), written);
}

TEST_F(SurrogateFile, IsRefusedWhereverItIsCutOrChanged) {
  const std::string whole = bytes();
  for (std::size_t length = 0; length < whole.size(); ++length) {
    const std::string said = rejection(whole.substr(0, length));
    EXPECT_NE(said.find(length < 8    ? "holds no surrogate"
                        : length < 32 ? "ends within its header"
                                      : "it was cut off"),
              std::string::npos)
        << length << ": " << said;
  }
  EXPECT_NE(rejection(whole + "x").find("it was cut off or is of another kind"), std::string::npos);
  for (std::size_t at = 0; at < whole.size(); ++at) {
    std::string changed = whole;
    changed[at] = static_cast<char>(changed[at] ^ 0x10);
    EXPECT_NE(rejection(changed), "") << at;
  }
}

TEST_F(SurrogateFile, NamesWhatIsWrong) {
  const std::string whole = bytes();
  EXPECT_EQ(rejection("ckvqstat"),
            "holds no surrogate: give the file that `ckv calibrate --surrogate` or save_surrogate wrote");
  EXPECT_EQ(rejection(with_number(whole, 8, 2)),
            "has version 2, this library reads 1: make the calibration again");
  const auto expect_said = [&](const std::string& changed, const char* part) {
    const std::string said = rejection(changed);
    EXPECT_NE(said.find(part), std::string::npos) << said;
  };
  expect_said(with_number(whole, 12, 3), "3 layers of 2 KV heads of 5 elements take 176");
  expect_said(with_number(whole, 12, 0xFFFFFFFFU), "4294967295 layers of 2 KV heads");
  expect_said(with_number(with_number(whole, 12, 0xFFFFFFFFU), 16, 0xFFFFFFFFU), "of 5 elements take 0");
  expect_said(with_number(with_number(whole, 12, 0), 16, 1), "0 layers of 1 KV heads of 5 elements take 32");
  expect_said(with_number(whole, 24, 0x7FC00000U), "layer 0 KV head 0 has nan");
  std::string damaged = whole;
  damaged[40] = static_cast<char>(damaged[40] ^ 1);
  EXPECT_EQ(rejection(damaged), "was damaged, its checksum is another: make the calibration again");
}

TEST_F(SurrogateFile, OfAnotherModelIsRefused) {
  save_surrogate(path(), surrogate());
  const ModelShape other{.layers = 3, .query_heads = 4, .kv_heads = 2, .head_dim = 8};
  const std::string said = message_of<FileError>([&] { load_surrogate(path(), other); });
  EXPECT_NE(said.find("is of 2 layers of 2 KV heads, the model has 3 of 2"), std::string::npos) << said;
  const fs::path nowhere = path().parent_path() / "nowhere" / "file.bin";
  EXPECT_NE(message_of<FileError>([&] { save_surrogate(nowhere, surrogate()); }).find("there is no folder"),
            std::string::npos);
}

}  // namespace
