// A file of JSON Lines that a long run adds to and a later run goes on with.
#pragma once

#include <filesystem>
#include <fstream>
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

/// A file's SHA-256; null where no file is named. Throws engine::Error where it cannot be read.
Json file_digest(const std::filesystem::path& path);

/// What a text's file is called by, `file`; the text that stands for none has a name of its own.
Json haystack_json(const std::filesystem::path& haystack, const Json& file);

/// The first line is the header: what all records have in common. A line is written whole or, where the
/// program is killed, dropped by the next run.
class RecordFile {
 public:
  /// Opens a file, or makes it. Throws engine::Error where it cannot be read or written, where a line is no
  /// record, and where its header is another, naming the first value that differs.
  RecordFile(std::filesystem::path path, const Json& header);

  /// Those that were there already.
  std::span<const Json> records() const { return records_; }

  /// Adds a line and hands it to the system.
  void add(const Json& record);

 private:
  void write_line(const Json& line);

  std::filesystem::path path_;
  std::vector<Json> records_;
  std::ofstream out_;
};

}  // namespace ckv
