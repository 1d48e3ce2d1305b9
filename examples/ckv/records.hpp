// A file of JSON Lines that a long run adds to and a later run goes on with.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace ckv {

using Json = nlohmann::ordered_json;

/// A header: what writes the records, for which model and by which code; `settings` is all else that decides
/// what they say.
Json record_header(std::string_view command, const std::filesystem::path& model, const std::string& sha256,
                   Json settings);

/// A file's SHA-256; null where no file is named. Throws compresskv::FileError where it is no regular file,
/// engine::Error where it cannot be read.
Json file_digest(const std::filesystem::path& path);

/// What a text's file is called by, `file`; the text that stands for none has a name of its own.
Json haystack_json(const std::filesystem::path& haystack, const Json& file);

/// What tells a record from all others of its file. Throws anything where a part that will be used is absent.
using RecordKey = std::function<std::string(const Json& record)>;

/// The first line is the header: what all records have in common. A line is written whole or, where the
/// program is killed, dropped by the next run. While one run has the file, another is refused.
class RecordFile {
 public:
  /// Opens a file, or makes it. Throws engine::Error where it cannot be read or written, is no regular file
  /// or another run has it, where a line is no record, two are of one key, and where its header is another,
  /// naming the first value that differs; a file that is there then stays as it is.
  RecordFile(std::filesystem::path path, const Json& header, const RecordKey& key);
  RecordFile(const RecordFile&) = delete;
  RecordFile& operator=(const RecordFile&) = delete;
  ~RecordFile();

  /// Those that were there already.
  std::span<const Json> records() const { return records_; }

  /// Adds a line and hands it to the system.
  void add(const Json& record);

 private:
  void open();
  void read(const Json& header, const RecordKey& key);
  void write_line(const Json& line);
  [[noreturn]] void fail_to_write() const;

  std::filesystem::path path_;
  std::vector<Json> records_;
  int file_ = -1;
  std::uintmax_t bytes_ = 0;  // of whole lines
};

}  // namespace ckv
