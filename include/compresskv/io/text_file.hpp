#pragma once

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <random>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include "compresskv/core/error.hpp"

/// How files are looked at, read and written: nothing is waited for that may never come, a file is written
/// whole or not at all, and what goes wrong is said in the same words everywhere.
namespace compresskv::io::detail {

template <class... Parts>
[[noreturn]] void fail(const std::filesystem::path& file, const Parts&... parts) {
  compresskv::detail::fail<FileError>(file.string(), ": ", parts...);
}

template <class... Parts>
void require(bool holds, const std::filesystem::path& file, const Parts&... parts) {
  if (!holds) [[unlikely]] {
    fail(file, parts...);
  }
}

/// The system's words for a value of errno; iostreams would not promise to leave one.
inline std::string reason_of(int failure) {
  return std::generic_category().message(failure == 0 ? EIO : failure);
}

inline std::string cannot_be_opened(int failure) {
  return "cannot be opened, " + reason_of(failure) + ": check the permissions";
}

/// "a pipe" and the like of what is there but no regular file.
inline std::string kind_of(std::filesystem::file_type type) {
  using Type = std::filesystem::file_type;
  return type == Type::directory   ? "a folder"
         : type == Type::fifo      ? "a pipe"
         : type == Type::socket    ? "a socket"
         : type == Type::character ? "a device"
         : type == Type::block     ? "a device"
                                   : "no regular file";
}

/// What is wrong with `file` for who reads it, and what to do: reading could wait or go on for ever, or
/// nothing is there. Empty where it is a regular file, or a pipe that may be one. Whether it can be opened
/// shows when it is.
inline std::string why_not_read(const std::filesystem::path& file, bool may_be_pipe = false) {
  using Type = std::filesystem::file_type;
  std::error_code failure;
  const Type type = std::filesystem::status(file, failure).type();
  if (type == Type::regular || (type == Type::fifo && may_be_pipe)) {
    return {};
  }
  if (type == Type::none) {
    return "cannot be looked at, " + failure.message() + ": check the path and its permissions";
  }
  return file.empty()              ? "is no path: give the path of a file"
         : type == Type::not_found ? "no such file: check the path"
         : type == Type::directory ? "is a folder: give the path of the file in it"
                                   : "is " + kind_of(type) + ": give the path of a regular file";
}

/// Throws FileError where `why_not_read` finds something.
inline void require_regular(const std::filesystem::path& file) {
  const std::string wrong = why_not_read(file);
  require(wrong.empty(), file, wrong);
}

struct CloseFile {
  void operator()(std::FILE* file) const { static_cast<void>(std::fclose(file)); }
};
using OpenFile = std::unique_ptr<std::FILE, CloseFile>;

/// Hands on all bytes of `file` as they come, and none of them each time a signal breaks in: `take` may
/// throw. Throws FileError with the system's reason.
template <class Take>
void read_pieces(const std::filesystem::path& file, const Take& take) {
  OpenFile stream;
  while (stream.reset(std::fopen(file.string().c_str(), "rb")), stream == nullptr) {
    require(errno == EINTR, file, cannot_be_opened(errno));  // while a pipe waits for who writes it
    take(std::string_view());
  }
  std::vector<char> piece(std::size_t{1} << 16U);
  while (std::feof(stream.get()) == 0) {
    const std::size_t count = std::fread(piece.data(), 1, piece.size(), stream.get());
    if (std::ferror(stream.get()) != 0) {
      require(errno == EINTR, file, "cannot be read to its end, ", reason_of(errno), ": check the disk");
      std::clearerr(stream.get());
    }
    take(std::string_view(piece.data(), count));
  }
}

/// No calibration is as large; what is would take many times its size to parse.
inline constexpr std::uintmax_t largest_file = std::uintmax_t{256} << 20U;

/// All bytes of a regular file. Throws FileError, also where it is larger than any calibration.
inline std::string read_whole(const std::filesystem::path& file) {
  require_regular(file);
  const auto require_size = [&](std::uintmax_t bytes) {
    require(bytes <= largest_file, file, "is larger than ", largest_file >> 20U,
            " MiB, as no calibration is: check the path");
  };
  std::error_code unknown;
  const std::uintmax_t bytes = std::filesystem::file_size(file, unknown);
  require_size(unknown ? 0 : bytes);
  std::string text;
  read_pieces(file, [&](std::string_view piece) {
    text += piece;
    require_size(text.size());  // it may grow, and files of /proc have no size
  });
  return text;
}

/// What links lead to, whether or not it is there. They must not go round: `std::filesystem::status` tells.
inline std::filesystem::path behind_links(std::filesystem::path file) {
  std::error_code failure;
  while (std::filesystem::is_symlink(file, failure)) {
    const std::filesystem::path target = std::filesystem::read_symlink(file, failure);
    file = file.parent_path() / target;
  }
  return file;
}

/// What is wrong at sight with `file` for who writes it, and what to do; empty where it is a regular file or
/// could become one, or is a device or a pipe that may be one.
inline std::string why_not_written(const std::filesystem::path& file, bool may_be_stream = false) {
  using Type = std::filesystem::file_type;
  const std::string no = "cannot be written, ";
  std::error_code failure;
  const Type type = std::filesystem::status(file, failure).type();
  if (type == Type::none) {
    return no + failure.message() + ": check the path and its permissions";
  }
  if (type == Type::directory) {
    return no + "it is a folder: give the path of a file";
  }
  if (type != Type::regular && type != Type::not_found) {
    return may_be_stream ? std::string()
                         : no + "it is " + kind_of(type) + ": give the path of a regular file or of none";
  }
  const std::filesystem::path folder = behind_links(file).parent_path();
  return folder.empty() || std::filesystem::is_directory(folder, failure)
             ? std::string()
             : no + "there is no folder " + folder.string() + ": create it first";
}

/// Writes `text` over what `file` holds. Why that stopped, where it did.
inline std::string overwrite(const std::filesystem::path& file, std::string_view text) {
  OpenFile stream(std::fopen(file.string().c_str(), "wb"));
  if (stream == nullptr) {
    return reason_of(errno);
  }
  std::setvbuf(stream.get(), nullptr, _IONBF, 0);  // what is counted as written is
  while (!text.empty()) {
    text.remove_prefix(std::fwrite(text.data(), 1, text.size(), stream.get()));
    if (std::ferror(stream.get()) != 0) {
      if (errno != EINTR) {
        return reason_of(errno);
      }
      std::clearerr(stream.get());
    }
  }
  // Some systems tell only now that a disk is full.
  return std::fclose(stream.release()) == 0 ? std::string() : reason_of(errno);
}

/// Writes `text` beside `file` and moves it into place, so that neither a stopped run nor a full disk leaves
/// half a file or costs the one that was there. A link stays one: what it leads to is replaced, or made where
/// it is not there. What is there and no regular file is refused, for it would be replaced as well.
inline void write_text(const std::filesystem::path& file, std::string_view text) {
  const std::string wrong = why_not_written(file);
  require(wrong.empty(), file, wrong);
  const std::filesystem::path place = behind_links(file);
  const auto temporary =
      std::filesystem::path(place).concat(".tmp-" + std::to_string(std::random_device{}()));
  std::string reason = overwrite(temporary, text);
  if (reason.empty()) {
    std::error_code moved;
    std::filesystem::rename(temporary, place, moved);
    reason = moved ? moved.message() : std::string();
  }
  if (!reason.empty()) {
    std::error_code unknown;
    std::filesystem::remove(temporary, unknown);
    fail(file, "cannot be written, ", reason,
         ": check the space on the disk and the permissions; what was there is unchanged");
  }
}

}  // namespace compresskv::io::detail
