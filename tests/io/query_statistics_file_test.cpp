#include "compresskv/io/query_statistics_file.hpp"

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "message_of.hpp"
#include "reference/queries.hpp"

namespace {

namespace fs = std::filesystem;
using compresskv::FileError;
using compresskv::ModelShape;
using compresskv::QueryStatistics;
using compresskv::Rotary;
using compresskv::io::load_query_statistics;
using compresskv::io::save_query_statistics;
using compresskv::test::message_of;

const ModelShape statistics_shape{.layers = 2, .query_heads = 4, .kv_heads = 2, .head_dim = 8};

/// A folder of its own for each test, removed afterwards.
class QueryStatisticsFile : public testing::Test {
 protected:
  QueryStatisticsFile()
      : folder_(fs::path(testing::TempDir()) / ("ckv-stats-" + std::to_string(std::random_device{}()))) {
    fs::create_directories(folder_);
  }
  ~QueryStatisticsFile() override { fs::remove_all(folder_); }
  QueryStatisticsFile(const QueryStatisticsFile&) = delete;
  QueryStatisticsFile& operator=(const QueryStatisticsFile&) = delete;

  fs::path path() const { return folder_ / "statistics.bin"; }

  std::string bytes_of(const QueryStatistics& statistics) const {
    save_query_statistics(path(), statistics);
    std::ifstream stream(path(), std::ios::binary);
    return {std::istreambuf_iterator<char>(stream), {}};
  }

  /// The message of the FileError, without the file's name in front.
  std::string rejection(const std::string& bytes) const {
    std::ofstream(path(), std::ios::binary) << bytes;
    const std::string message = message_of<FileError>([&] { load_query_statistics(path()); });
    const std::string name = path().string() + ": ";
    return message.starts_with(name) ? message.substr(name.size()) : "(not named) " + message;
  }

  /// With `number` at byte `at`, and the checksum that fits.
  template <class T>
  static std::string with_number(std::string bytes, std::size_t at, T number) {
    for (std::size_t i = 0; i < sizeof(T); ++i) {
      bytes[at + i] = static_cast<char>(number >> (8 * i) & 0xFFU);
    }
    return with_checksum(std::move(bytes));
  }
  static std::string with_checksum(std::string bytes) {
    std::uint64_t hash = 14695981039346656037U;
    for (std::size_t i = 0; i + 8 < bytes.size(); ++i) {
      hash = (hash ^ static_cast<unsigned char>(bytes[i])) * 1099511628211U;
    }
    for (std::size_t i = 0; i < 8; ++i) {
      bytes[bytes.size() - 8 + i] = static_cast<char>(hash >> (8 * i) & 0xFFU);
    }
    return bytes;
  }

 private:
  fs::path folder_;
};

TEST_F(QueryStatisticsFile, ReadsBackWhatWasWritten) {
  for (const Rotary& rotary : compresskv::reference::rotary_kinds(8)) {
    const QueryStatistics statistics = compresskv::reference::query_statistics(statistics_shape, 3, rotary);
    save_query_statistics(path(), statistics);
    EXPECT_EQ(load_query_statistics(path()), statistics);
    EXPECT_EQ(load_query_statistics(path(), statistics_shape), statistics);
  }
}

TEST_F(QueryStatisticsFile, HasTheFormThatIsWrittenDown) {
  const QueryStatistics statistics =
      compresskv::reference::query_statistics(statistics_shape, 3, {.base = 2.0});
  const std::string bytes = bytes_of(statistics);
  EXPECT_EQ(bytes.substr(0, 8), "ckvqstat");
  const std::string numbers = bytes.substr(8, 28);
  const std::string expected{1, 0, 0, 0, 2, 0, 0, 0, 4, 0, 0, 0, 8, 0,
                             0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0};
  EXPECT_EQ(numbers, expected);
  EXPECT_EQ(bytes.substr(36, 8), (std::string{0, 0, 0, 0, 0, 0, 0, 0x40})) << "2.0";
  EXPECT_EQ(bytes.size(), 52U + 8 * (8 + 4 * (8 + 4 + 36)) + 8);
  EXPECT_EQ(with_checksum(bytes), bytes);
}

TEST_F(QueryStatisticsFile, OfASmallModelTakesTwoMebibytes) {
  const ModelShape shape{.layers = 30, .query_heads = 9, .kv_heads = 3, .head_dim = 64};
  std::vector<QueryStatistics::Head> heads(270, {.count = 1,
                                                 .mean = std::vector<float>(64),
                                                 .modulus = std::vector<float>(32),
                                                 .covariance = std::vector<float>(64 * 65 / 2)});
  save_query_statistics(path(), {30, 9, 64, {}, std::move(heads)});
  EXPECT_LT(fs::file_size(path()), std::uintmax_t{5} << 19U);
  EXPECT_EQ(load_query_statistics(path(), shape).layers(), 30U);
}

TEST_F(QueryStatisticsFile, IsRefusedWhereverItIsCut) {
  const std::string bytes = bytes_of(compresskv::reference::query_statistics(statistics_shape));
  for (std::size_t length = 0; length < bytes.size(); length += length < 100 ? 1 : 97) {
    const std::string said = rejection(bytes.substr(0, length));
    EXPECT_NE(said.find(length < 8    ? "holds no query statistics"
                        : length < 60 ? "ends within its header"
                                      : "it was cut off"),
              std::string::npos)
        << length << ": " << said;
  }
  EXPECT_NE(rejection(bytes + "x").find("it was cut off or is of another kind"), std::string::npos);
}

TEST_F(QueryStatisticsFile, IsRefusedWhateverByteWasChanged) {
  const std::string bytes = bytes_of(compresskv::reference::query_statistics(statistics_shape));
  for (std::size_t at = 0; at < bytes.size(); at += at < 60 ? 1 : 13) {
    std::string changed = bytes;
    changed[at] = static_cast<char>(changed[at] ^ 0x10);
    EXPECT_NE(rejection(changed), "") << at;
  }
  std::string changed = bytes;
  changed[200] = static_cast<char>(changed[200] ^ 1);
  EXPECT_EQ(rejection(changed), "was damaged, its checksum is another: make the calibration again");
}

TEST_F(QueryStatisticsFile, NamesWhatIsWrong) {
  const std::string bytes = bytes_of(compresskv::reference::query_statistics(statistics_shape));
  EXPECT_EQ(rejection("{\"0\": [1, 0]}"),
            "holds no query statistics: give the file that `ckv calibrate --statistics` or "
            "save_query_statistics wrote");
  EXPECT_EQ(rejection(with_number(bytes, 8, 2U)),
            "has version 2, this library reads 1: make the calibration again");
  const auto expect_said = [&](const std::string& changed, const char* part) {
    const std::string said = rejection(changed);
    EXPECT_NE(said.find(part), std::string::npos) << said;
  };
  expect_said(with_number(bytes, 12, 3U), "bytes, 3 layers of 4 heads of 8 elements take 2460");
  expect_said(with_number(bytes, 12, 0xFFFFFFFFU), "4294967295 layers of 4 heads");
  expect_said(with_number(bytes, 20, 0xFFFFFFFFU), "4294967295 elements take 0");
  expect_said(with_number(bytes, 20, 0U), "has 8 elements that rotate of 0 and 0 frequency factors");
  expect_said(with_number(bytes, 24, 0U), "has 0 elements that rotate of 8");
  expect_said(with_number(bytes, 24, 9U), "has 9 elements that rotate of 8");
  expect_said(with_number(bytes, 28, 2U), "names pairing 2");
  expect_said(with_number(bytes, 28, 1U), "the pairing that the queries were taken by");
  expect_said(with_number(bytes, 32, 3U), "and 3 frequency factors");
  expect_said(with_number(bytes, 36, std::uint64_t{0}), "Rotary: base is 0");
  expect_said(with_number(bytes, 44, std::uint64_t{0x7FF0000000000000}), "position_scale is inf");
  expect_said(with_number(bytes, 52, std::uint64_t{0}), "layer 0 head 0 are of no query");
  expect_said(with_number(bytes, 60, 0x7FC00000U), "layer 0 head 0 have nan at place 0 of the mean");
}

TEST_F(QueryStatisticsFile, OfAnotherModelIsRefused) {
  save_query_statistics(path(), compresskv::reference::query_statistics(statistics_shape));
  for (const ModelShape& other : {ModelShape{.layers = 3, .query_heads = 4, .kv_heads = 2, .head_dim = 8},
                                  ModelShape{.layers = 2, .query_heads = 2, .kv_heads = 2, .head_dim = 8},
                                  ModelShape{.layers = 2, .query_heads = 4, .kv_heads = 2, .head_dim = 16}}) {
    const std::string said = message_of<FileError>([&] { load_query_statistics(path(), other); });
    EXPECT_NE(said.find("are of 2 layers of 4 heads of 8 elements, the model has"), std::string::npos)
        << said;
  }
  const fs::path absent = path().parent_path() / "absent.bin";
  EXPECT_EQ(message_of<FileError>([&] { load_query_statistics(absent); }),
            absent.string() + ": no such file: check the path");
  const fs::path nowhere = path().parent_path() / "nowhere" / "file.bin";
  const std::string said = message_of<FileError>(
      [&] { save_query_statistics(nowhere, compresskv::reference::query_statistics(statistics_shape)); });
  EXPECT_NE(said.find("cannot be written, there is no folder"), std::string::npos) << said;
}

}  // namespace
