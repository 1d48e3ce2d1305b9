// Files of records: one run at a time, each record once, whole lines, and nobody else's file touched.

#include "ckv/records.hpp"

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include <compresskv/core/error.hpp>
#include <csignal>
#include <filesystem>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "engine/error.hpp"
#include "message_of.hpp"
#include "tool.hpp"

namespace ckv_test {
namespace {

using compresskv::test::message_of;
using compresskv::test::says;

const ckv::Json header = {{"file", "ckv evaluate"}, {"settings", {{"seed", 1}}}};
const std::string head = header.dump() + "\n";

std::string key_of(const ckv::Json& record) { return "number " + record.at("n").dump(); }

class Records : public testing::Test {
 protected:
  static std::unique_ptr<ckv::RecordFile> open(const std::filesystem::path& path) {
    return std::make_unique<ckv::RecordFile>(path, header, key_of);
  }
  static std::string refusal(const std::filesystem::path& path) {
    return message_of<engine::Error>([&] { open(path); });
  }
  /// Refused, and not one byte of it changed.
  void expect_refused(const std::string& text, std::initializer_list<std::string_view> parts) const {
    const auto path = folder_.write("file", text);
    EXPECT_TRUE(says(refusal(path), parts));
    EXPECT_EQ(read(path), text);
  }

  Folder folder_;
};

TEST_F(Records, AreReadBackAndAddedTo) {
  const auto path = folder_.path("new");
  open(path)->add({{"n", 1}});
  EXPECT_EQ(read(path), head + "{\"n\":1}\n");
  const auto again = open(path);
  ASSERT_EQ(again->records().size(), 1U);
  again->add({{"n", 2}});
  EXPECT_EQ(read(path), head + "{\"n\":1}\n{\"n\":2}\n");
}

TEST_F(Records, ASecondRunOnAFileIsRefused) {
  const auto path = folder_.path("file");
  auto first = open(path);
  std::filesystem::create_symlink("file", folder_.path("link"));
  for (const char* name : {"file", "link"}) {
    EXPECT_TRUE(says(refusal(folder_.path(name)),
                     {"another run is writing to '" + folder_.path(name).string() + "': wait for its end"}));
  }
  first->add({{"n", 1}});
  first.reset();
  EXPECT_EQ(open(path)->records().size(), 1U);
}

TEST_F(Records, TheSameRecordTwiceIsRefused) {
  expect_refused(
      head + "{\"n\":1}\n{\"n\":2}\n{\"n\":1,\"more\":0}\n",
      {"file' lines 2 and 4 are both the record number 1: two runs wrote at once; keep one of the two"});
}

TEST_F(Records, AStoppedWriteIsDropped) {
  for (const std::string& torn : {std::string("{\"n\":2"), std::string("{"), std::string(100, '\0')}) {
    const auto path = folder_.write("file", head + "{\"n\":1}\n" + torn);
    EXPECT_EQ(open(path)->records().size(), 1U);
    EXPECT_EQ(read(path), head + "{\"n\":1}\n");
  }
  const auto path = folder_.write("file", head.substr(0, 9));
  EXPECT_TRUE(open(path)->records().empty());
  EXPECT_EQ(read(path), head);
}

TEST_F(Records, FilesOfSomeoneElseStayAsTheyAre) {
  expect_refused("A letter, which ends without a line break",
                 {"line 1 is no record: it is not from `ckv evaluate`"});
  expect_refused("two lines\nthe second of which is dropped", {"line 1 is no record"});
  expect_refused("{\"file\":\"another\"}\nand more", {"file is \"another\" there and \"ckv evaluate\" here"});
  expect_refused(head + "{\"m\":1}\n{\"n\"", {"line 2 is no record", "'n'"});
  expect_refused(head + "[1]\n", {"line 2 is no record", "no JSON object"});
  expect_refused(head + "{\"n\":1,\"n\":2}\n", {"line 2 is no record", "key \"n\" stands twice"});
  expect_refused(head + "{\"n\":1}" + std::string(1, '\0') + "{\"n\":2}\n", {"line 2 is no record", "NUL"});
  expect_refused(head + "{\"n\":" + std::string(300000, '[') + "\n",
                 {"line 2 is no record", "deeper than 16"});
  expect_refused("{\"file\":" + std::string(300000, '[') + "\n", {"line 1 is no record", "deeper than 16"});
  expect_refused(head + "{\"n\":NaN}\n", {"line 2 is no record", "not valid JSON"});
  expect_refused(head + "{\"n\":1e999}\n", {"line 2 is no record", "not valid JSON"});
  const auto hole = folder_.write("hole", "");
  std::filesystem::resize_file(hole, std::uintmax_t{1} << 40U);
  EXPECT_TRUE(says(refusal(hole), {"hole' line 1 is no record", "longer than 64 MiB"}));
  EXPECT_EQ(std::filesystem::file_size(hole), std::uintmax_t{1} << 40U);
}

TEST_F(Records, WhatIsNoRegularFileIsRefused) {
  const auto pipe = folder_.path("pipe");
  ASSERT_EQ(mkfifo(pipe.c_str(), 0600), 0);
  for (const std::filesystem::path& path :
       {std::filesystem::path("/dev/full"), {"/dev/zero"}, {"/dev/null"}, pipe}) {
    EXPECT_EQ(refusal(path), "cannot write records to '" + path.string() +
                                 "', it is a device, a pipe or a socket: give the path of a regular file");
  }
  EXPECT_TRUE(says(refusal(pipe.parent_path()), {"it is a folder: give the path of a regular file"}));
  EXPECT_TRUE(says(refusal(folder_.path("none") / "file"),
                   {"cannot write '", "No such file or directory: check that its folder exists"}));
}

// A limit on the size of files stands in for a full disk.
TEST_F(Records, AFullDiskIsAnErrorAndLeavesWholeLines) {
  const auto path = folder_.path("file");
  const auto file = open(path);
  file->add({{"n", 1}});
  const std::string before = read(path);
  rlimit old_limit{};
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &old_limit), 0);
  const auto old_handler = std::signal(SIGXFSZ, SIG_IGN);
  rlimit limit = old_limit;
  limit.rlim_cur = before.size() + 3;
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &limit), 0);
  const std::string message = message_of<engine::Error>([&] { file->add({{"n", 2}}); });
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &old_limit), 0);
  std::signal(SIGXFSZ, old_handler);
  EXPECT_TRUE(says(message, {"cannot write '" + path.string() + "', ", "has room"}));
  EXPECT_EQ(read(path), before);
  file->add({{"n", 2}});
  EXPECT_EQ(read(path), before + "{\"n\":2}\n");
}

TEST_F(Records, DigestsAreOfRegularFiles) {
  EXPECT_EQ(ckv::file_digest({}), nullptr);
  EXPECT_EQ(message_of<compresskv::FileError>([] { ckv::file_digest("/dev/zero"); }),
            "/dev/zero: is a device: give the path of a regular file");
  EXPECT_TRUE(says(message_of<compresskv::FileError>([&] { ckv::file_digest(folder_.path("none")); }),
                   {"none: no such file"}));
}

}  // namespace
}  // namespace ckv_test
