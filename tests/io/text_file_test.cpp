#include "compresskv/io/text_file.hpp"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/time.h>

#include <csignal>
#include <filesystem>
#include <fstream>
#include <random>
#include <string>
#include <string_view>

namespace compresskv::io::detail {
namespace {

namespace fs = std::filesystem;

/// A folder of its own for each test, removed afterwards.
class TextFile : public testing::Test {
 protected:
  TextFile()
      : folder_(fs::path(testing::TempDir()) / ("ckv-text-" + std::to_string(std::random_device{}()))) {
    fs::create_directories(folder_);
  }
  ~TextFile() override { fs::remove_all(folder_); }

  fs::path path(const char* name) const { return folder_ / name; }

 private:
  fs::path folder_;
};

/// Signals that break into what waits, until it goes.
class Signals {
 public:
  Signals() {
    struct sigaction action = {};
    action.sa_handler = [](int) {};
    sigaction(SIGALRM, &action, &old_);
    set(20000);
  }
  Signals(const Signals&) = delete;
  Signals& operator=(const Signals&) = delete;
  ~Signals() {
    set(0);
    sigaction(SIGALRM, &old_, nullptr);
  }

 private:
  static void set(suseconds_t microseconds) {
    const itimerval timer{.it_interval = {.tv_sec = 0, .tv_usec = microseconds},
                          .it_value = {.tv_sec = 0, .tv_usec = microseconds}};
    setitimer(ITIMER_REAL, &timer, nullptr);
  }

  struct sigaction old_ = {};
};

TEST_F(TextFile, ComesBackAsItWasWritten) {
  for (const std::size_t size : {0U, 1U, 65535U, 65536U, 65537U, 200000U}) {
    std::string text(size, '\0');
    std::mt19937 random(1);
    for (char& c : text) {
      c = static_cast<char>(random() % 256U);
    }
    write_text(path("file"), text);
    std::string back;
    read_pieces(path("file"), [&](std::string_view piece) { back += piece; });
    EXPECT_TRUE(back == text) << size;
  }
}

struct Stopped {};

TEST_F(TextFile, ASignalEndsTheWaitForAPipe) {
  const Signals signals;
  const fs::path pipe = path("pipe");
  ASSERT_EQ(mkfifo(pipe.c_str(), 0600), 0);
  std::string text;
  int breaks = 0;
  const auto take = [&](std::string_view piece) {
    text += piece;
    breaks += piece.empty() ? 1 : 0;
    if (breaks == 3) {
      throw Stopped();
    }
  };
  EXPECT_THROW(read_pieces(pipe, take), Stopped);  // nobody opens it for writing
  std::fstream writer(pipe);
  writer << "half of it" << std::flush;
  breaks = 0;
  EXPECT_THROW(read_pieces(pipe, take), Stopped);  // and nobody closes it
  EXPECT_EQ(text, "half of it");
}

TEST_F(TextFile, APipeIsReadWhereItMayBeOne) {
  const fs::path pipe = path("pipe");
  ASSERT_EQ(mkfifo(pipe.c_str(), 0600), 0);
  EXPECT_EQ(why_not_read(pipe), "is a pipe: give the path of a regular file");
  EXPECT_EQ(why_not_read(pipe, true), "");
  EXPECT_EQ(why_not_read("/dev/null", true), "is a device: give the path of a regular file");
  EXPECT_EQ(why_not_read(""), "is no path: give the path of a file");
}

TEST_F(TextFile, AStreamIsWrittenWhereItMayBeOne) {
  EXPECT_EQ(why_not_written("/dev/full"),
            "cannot be written, it is a device: give the path of a regular file or of none");
  EXPECT_EQ(why_not_written("/dev/full", true), "");
  EXPECT_EQ(overwrite("/dev/full", "text"), "No space left on device");
  EXPECT_EQ(overwrite("/dev/null", "text"), "");
  EXPECT_EQ(why_not_written("file", true), "");
  EXPECT_EQ(why_not_written(path("file"), true), "");
  EXPECT_NE(why_not_written(path("none") / "file", true), "");
}

}  // namespace
}  // namespace compresskv::io::detail
