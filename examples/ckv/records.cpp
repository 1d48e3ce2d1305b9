#include "records.hpp"

#include <fmt/core.h>

#include <compresskv/core/version.hpp>
#include <compresskv/kernel/code_path.hpp>
#include <string>
#include <system_error>
#include <utility>

#include "arguments.hpp"
#include "engine/error.hpp"
#include "engine/sha256.hpp"

namespace ckv {
namespace {

/// Throws where two headers differ, and says in what.
void check_same(const std::filesystem::path& path, const std::string& name, const Json& there,
                const Json& here) {
  if (there == here) {
    return;
  }
  if (there.is_object() && here.is_object()) {
    for (const auto& [key, value] : here.items()) {
      check_same(path, name.empty() ? key : name + "." + key, there.value(key, Json()), value);
    }
  }
  throw engine::Error(fmt::format(
      "'{}' holds records of other runs: {} is {} there and {} here; give another file, or the same settings",
      path.string(), name.empty() ? "the header" : name, there.dump(), here.dump()));
}

}  // namespace

Json record_header(std::string_view command, const std::filesystem::path& model, const std::string& sha256,
                   Json settings) {
  return {{"file", command},
          {"version", fmt::format("{}.{}.{}", COMPRESSKV_VERSION_MAJOR, COMPRESSKV_VERSION_MINOR,
                                  COMPRESSKV_VERSION_PATCH)},
          {"model", model.filename().string()},
          {"model_sha256", sha256},
          {"code_path", compresskv::kernel::name(compresskv::kernel::code_path())},
          {"settings", std::move(settings)}};
}

Json file_digest(const std::filesystem::path& path) {
  return path.empty() ? Json() : Json(engine::sha256_of_file(path));
}

Json haystack_json(const std::filesystem::path& haystack, const Json& file) {
  return haystack.empty() ? Json("King James text of Debian's bible-kjv") : file;
}

RecordFile::RecordFile(std::filesystem::path path, const Json& header) : path_(std::move(path)) {
  std::error_code failure;
  const bool there = std::filesystem::exists(path_, failure);
  bool has_header = false;
  if (there) {
    std::string text = read_text_file(path_);
    const std::size_t whole = text.rfind('\n') == std::string::npos ? 0 : text.rfind('\n') + 1;
    if (whole != text.size()) {
      std::filesystem::resize_file(path_, whole, failure);
      text.resize(whole);
    }
    std::size_t number = 0;
    for (std::size_t begin = 0; begin < text.size();) {
      const std::size_t end = text.find('\n', begin);
      Json line = Json::parse(text.substr(begin, end - begin), nullptr, false);
      ++number;
      if (!line.is_object()) {
        throw engine::Error(fmt::format("'{}' line {} is no record: it is not from `{}`; give another file",
                                        path_.string(), number, header.value("file", "ckv")));
      }
      if (has_header) {
        records_.push_back(std::move(line));
      } else {
        check_same(path_, "", line, header);
        has_header = true;
      }
      begin = end + 1;
    }
  }
  out_.open(path_, std::ios::binary | std::ios::app);
  if (!has_header) {
    write_line(header);
  }
}

void RecordFile::add(const Json& record) { write_line(record); }

void RecordFile::write_line(const Json& line) {
  // An answer cut off by the token limit may end inside a character.
  out_ << line.dump(-1, ' ', false, Json::error_handler_t::replace) << '\n' << std::flush;
  if (!out_) {
    throw engine::Error(
        fmt::format("cannot write '{}': check that its folder exists and has room", path_.string()));
  }
}

}  // namespace ckv
