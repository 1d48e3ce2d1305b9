// Any bytes as each of the calibration files that are read: refused with an Error of one short line, or what
// loads is written and read back equal.
#include <compresskv/io/calibration_files.hpp>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <string_view>
#include <vector>

#include "ckv/calibration_results.hpp"
#include "ckv/needle_table.hpp"
#include "ckv/records.hpp"
#include "engine/error.hpp"

namespace {

namespace fs = std::filesystem;
using namespace compresskv::io;

void check(bool holds) {
  if (!holds) std::abort();
}

/// In memory, where the system has such a folder; gone at the end.
struct Folder {
  Folder() {
    std::string name = fs::is_directory("/dev/shm") ? "/dev/shm/json-fuzz-XXXXXX" : "/tmp/json-fuzz-XXXXXX";
    check(mkdtemp(name.data()) != nullptr);
    path = name;
  }
  ~Folder() { fs::remove_all(path); }
  fs::path path;
};

fs::path file_in_folder(const char* name) {
  static const Folder folder;
  return folder.path / name;
}

fs::path write(const char* name, std::string_view text) {
  const fs::path file = file_in_folder(name);
  std::ofstream(file, std::ios::binary) << text;
  return file;
}

void check_message(std::string_view message, const fs::path& file) {
  check(message.find(file.string()) != std::string_view::npos);
  check(message.size() < 2000);
  for (const char c : message) check(c >= ' ' && c <= '~');
}

template <class Load, class Save>
void round_trip(const fs::path& file, const Load& load, const Save& save) {
  try {
    const auto loaded = load(file);
    const fs::path again = file_in_folder("again");
    save(again, loaded);
    check(load(again) == loaded);
  } catch (const compresskv::FileError& error) {
    check_message(error.what(), file);
  }
}

void records(std::string_view text) {
  const ckv::Json header = {{"file", "ckv calibrate"}};
  const fs::path file = write("records", header.dump() + "\n" + std::string(text));
  const auto key = [](const ckv::Json& record) { return ckv::key_of(record).dump(); };
  try {
    const auto load = [&] {
      const ckv::RecordFile whole{file, header, key};
      return std::vector<ckv::Json>(whole.records().begin(), whole.records().end());
    };
    const std::vector<ckv::Json> loaded = load();
    fs::remove(file);
    {
      ckv::RecordFile copy{file, header, key};
      for (const ckv::Json& record : loaded) copy.add(record);
    }
    check(load() == loaded);
  } catch (const engine::Error& error) {
    check_message(error.what(), file);
  }
}

void needles(const fs::path& file) {
  try {
    check(!ckv::read_needles(file).empty());
  } catch (const engine::Error& error) {
    check_message(error.what(), file);
  }
}

/// A file of numbers as far as magic and checksum go, which nothing would come upon.
fs::path numbers_of(std::string_view magic, std::string_view text) {
  detail::ByteWriter out;
  out.add_text(magic);
  out.add_text(text);
  out.add(detail::checksum(out.bytes()));
  return write("numbers", out.bytes());
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  const fs::path file = write("file", text);
  round_trip(
      file, [](const fs::path& from) { return load_head_ranking(from); }, save_head_ranking);
  round_trip(
      file, [](const fs::path& from) { return load_head_scores(from); }, save_head_scores);
  round_trip(
      file, [](const fs::path& from) { return load_layer_errors(from); }, save_layer_errors);
  const auto load_statistics = [](const fs::path& from) { return load_query_statistics(from); };
  round_trip(file, load_statistics, save_query_statistics);
  round_trip(numbers_of(detail::statistics_magic, text), load_statistics, save_query_statistics);
  const auto load_one = [](const fs::path& from) { return load_surrogate(from); };
  round_trip(file, load_one, save_surrogate);
  round_trip(numbers_of(detail::surrogate_magic, text), load_one, save_surrogate);
  needles(file);
  records(text);
  return 0;
}
