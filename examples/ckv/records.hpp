// A file of JSON Lines that a long run adds to and a later run goes on with.
#pragma once

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <span>

namespace ckv {

using Json = nlohmann::ordered_json;

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
