#include "records.hpp"

#include <fcntl.h>
#include <fmt/core.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <compresskv/core/version.hpp>
#include <compresskv/io/json_file.hpp>
#include <compresskv/kernel/code_path.hpp>
#include <cstddef>
#include <exception>
#include <map>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "engine/error.hpp"
#include "engine/sha256.hpp"

namespace ckv {
namespace {

/// A line of the file, as it is written. An answer cut off by the token limit may end inside a character.
std::string text_of(const Json& line) {
  return line.dump(-1, ' ', false, Json::error_handler_t::replace) + '\n';
}

/// A value of a header as a message shows it.
std::string shown(const Json& value) {
  const std::string text = value.dump(-1, ' ', true);
  return text.size() > 200 ? text.substr(0, 200) + "..." : text;
}

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
    for (const auto& [key, value] : there.items()) {
      check_same(path, name.empty() ? key : name + "." + key, value, here.value(key, Json()));
    }
  }
  throw engine::Error(fmt::format(
      "'{}' holds records of other runs: {} is {} there and {} here; give another file, or the same settings",
      path.string(), name.empty() ? "the header" : name, shown(there), shown(here)));
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
  if (path.empty()) {
    return nullptr;
  }
  compresskv::io::detail::require_regular(path);
  return engine::sha256_of_file(path);
}

Json haystack_json(const std::filesystem::path& haystack, const Json& file) {
  return haystack.empty() ? Json("King James text of Debian's bible-kjv") : file;
}

RecordFile::RecordFile(std::filesystem::path path, const Json& header, const RecordKey& key)
    : path_(std::move(path)) {
  try {
    open();
    read(header, key);
    if (bytes_ == 0) {
      write_line(header);
    }
  } catch (...) {
    close(file_);
    throw;
  }
}

RecordFile::~RecordFile() { close(file_); }

void RecordFile::open() {
  // Without O_NONBLOCK a pipe that nobody reads would be waited for.
  file_ = ::open(path_.c_str(), O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC | O_NONBLOCK, 0666);
  struct stat status {};
  const bool is_folder = file_ < 0 && errno == EISDIR;
  if (is_folder || (file_ >= 0 && fstat(file_, &status) == 0 && !S_ISREG(status.st_mode))) {
    throw engine::Error(fmt::format("cannot write records to '{}', it is {}: give the path of a regular file",
                                    path_.string(), is_folder ? "a folder" : "a device, a pipe or a socket"));
  }
  if (file_ < 0) {
    fail_to_write();
  }
  // Processes of a run that was killed have the lock for a moment after it.
  constexpr int tries = 20;
  for (int i = 0; flock(file_, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK; ++i) {
    if (i == tries) {
      throw engine::Error(fmt::format(
          "another run is writing to '{}': wait for its end, or give another file", path_.string()));
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
  }
}

void RecordFile::read(const Json& header, const RecordKey& key) {
  const std::string command = header.value("file", "ckv");
  std::map<std::string, std::size_t> lines;  // by key
  std::size_t number = 0;
  const auto refuse = [&](std::string_view why) {
    throw engine::Error(fmt::format("'{}' line {} is no record: it is not from `{}`; give another file ({})",
                                    path_.string(), number, command, why));
  };
  const auto take = [&](std::string_view text) {
    ++number;
    Json line = compresskv::io::detail::parse_json<Json>(text, "", refuse);
    if (!line.is_object()) {
      refuse("no JSON object");
    }
    if (number == 1) {
      check_same(path_, "", line, header);
      return;
    }
    std::string own;
    try {
      own = key(line);
    } catch (const std::exception& error) {
      refuse(error.what());
    }
    const auto [first, fresh] = lines.emplace(own, number);
    if (!fresh) {
      throw engine::Error(fmt::format(
          "'{}' lines {} and {} are both the record {}: two runs wrote at once; keep one of the two",
          path_.string(), first->second, number, own));
    }
    records_.push_back(std::move(line));
  };

  constexpr std::size_t longest_line = std::size_t{64} << 20U;
  std::string rest;  // behind the last line that is whole
  std::vector<char> piece(std::size_t{1} << 20U);
  while (true) {
    const ssize_t count = pread(file_, piece.data(), piece.size(), static_cast<off_t>(bytes_ + rest.size()));
    if (count < 0) {
      throw engine::Error(
          fmt::format("cannot read '{}': {}", path_.string(), std::generic_category().message(errno)));
    }
    if (count == 0) {
      break;
    }
    std::size_t searched = rest.size();
    rest.append(piece.data(), static_cast<std::size_t>(count));
    std::size_t begin = 0;
    for (std::size_t end = 0; (end = rest.find('\n', searched)) != std::string::npos;
         begin = searched = end + 1) {
      take(std::string_view(rest).substr(begin, end - begin));
    }
    bytes_ += begin;
    rest.erase(0, begin);
    if (rest.size() > longest_line) {
      ++number;
      refuse("longer than 64 MiB");
    }
  }
  if (bytes_ == 0 && !text_of(header).starts_with(rest)) {
    ++number;
    refuse("not a line");  // someone else's file: not one byte of it is dropped
  }
  if (!rest.empty() && ftruncate(file_, static_cast<off_t>(bytes_)) != 0) {
    fail_to_write();
  }
}

void RecordFile::add(const Json& record) { write_line(record); }

void RecordFile::write_line(const Json& line) {
  const std::string text = text_of(line);
  for (std::string_view rest = text; !rest.empty();) {
    const ssize_t count = write(file_, rest.data(), rest.size());
    if (count < 0 && errno != EINTR) {
      const int failure = errno;
      // What is written of it leaves again: the file stays whole lines. Where that fails the next run does
      // it.
      [[maybe_unused]] const int cut = ftruncate(file_, static_cast<off_t>(bytes_));
      errno = failure;
      fail_to_write();
    }
    rest.remove_prefix(count < 0 ? 0 : static_cast<std::size_t>(count));
  }
  bytes_ += text.size();
}

void RecordFile::fail_to_write() const {
  const std::string reason = std::generic_category().message(errno);
  throw engine::Error(
      fmt::format("cannot write '{}', {}: check that its folder exists, may be written to and has room",
                  path_.string(), reason));
}

}  // namespace ckv
