#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <random>
#include <set>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "compresskv/core/error.hpp"

/// How the files of this folder are read and written: regular files of bounded size, whole, JSON without what
/// JSON libraries pass over in silence.
namespace compresskv::io::detail {

/// No calibration is as large; what is would take many times its size to parse.
inline constexpr std::uintmax_t largest_file = std::uintmax_t{256} << 20U;

/// The formats nest three deep.
inline constexpr int deepest_json = 16;

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

/// In quotes and ASCII, with what moves a terminal's cursor escaped.
inline std::string quoted(std::string_view text) {
  return nlohmann::json(text).dump(-1, ' ', true, nlohmann::json::error_handler_t::replace);
}

/// Text of a file as a message shows it.
inline std::string shown_text(std::string_view text) {
  constexpr std::size_t most = 60;
  const std::string out = quoted(text.substr(0, most));
  return text.size() > most ? out + "... (" + std::to_string(text.size()) + " bytes)" : out;
}

/// A value as a message shows it: lists and objects by their kind alone, which bounds length and depth.
template <class Json>
std::string shown(const Json& value) {
  if (value.is_structured()) {
    return std::string("an ") + value.type_name();
  }
  return value.is_string() ? shown_text(value.template get_ref<const std::string&>()) : value.dump();
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

/// Throws FileError where reading could wait or go on for ever, or nothing is there. A file that cannot be
/// opened is left to who opens it.
inline void require_regular(const std::filesystem::path& file) {
  std::error_code failure;
  const std::filesystem::file_type type = std::filesystem::status(file, failure).type();
  require(type != std::filesystem::file_type::not_found, file, "no such file: check the path");
  require(type != std::filesystem::file_type::none, file, "cannot be looked at, ", failure.message(),
          ": check the path and its permissions");
  require(type != std::filesystem::file_type::directory, file,
          "is a folder: give the path of the file in it");
  require(type == std::filesystem::file_type::regular, file, "is ", kind_of(type),
          ": give the path of a regular file");
}

inline std::string read_text(const std::filesystem::path& file) {
  require_regular(file);
  const auto require_size = [&](std::uintmax_t bytes) {
    require(bytes <= largest_file, file, "is larger than ", largest_file >> 20U,
            " MiB, as no calibration is: check the path");
  };
  std::error_code unknown;
  const std::uintmax_t bytes = std::filesystem::file_size(file, unknown);
  require_size(unknown ? 0 : bytes);
  std::ifstream stream(file, std::ios::binary);
  require(stream.is_open(), file, "cannot be opened: check the permissions");
  std::string text;
  std::vector<char> piece(std::size_t{1} << 16U);
  while (stream.read(piece.data(), static_cast<std::streamsize>(piece.size())), stream.gcount() > 0) {
    text.append(piece.data(), static_cast<std::size_t>(stream.gcount()));
    require_size(text.size());  // it may grow, and files of /proc have no size
  }
  require(!stream.bad(), file, "cannot be read to its end: check the disk");
  require(text.find_first_not_of(" \t\r\n") != std::string::npos, file,
          "is empty: a calibration that was stopped may have left it, make it again");
  return text;
}

/// Parses `text`. `refuse` is called with what is wrong, followed by `where` (" in line 3 of the file", or
/// nothing), and must throw. JSON libraries end at a NUL byte, keep one of two keys that are the same, and
/// nest as deep as memory goes: all three are wrong here. `keys` gets the outermost object's in their order.
template <class Json, class Refuse>
Json parse_json(std::string_view text, const std::string& where, const Refuse& refuse,
                std::vector<std::string>* keys = nullptr) {
  const std::size_t nul = text.find('\0');
  if (nul != std::string_view::npos) {
    refuse("holds a NUL byte at place " + std::to_string(nul) + where +
           ": JSON is UTF-8 text without them; make the file again");
  }
  std::vector<std::set<std::string>> open_objects;
  const auto note = [&](int depth, typename Json::parse_event_t event, Json& parsed) {
    using Event = typename Json::parse_event_t;
    if ((event == Event::object_start || event == Event::array_start) && depth >= deepest_json) {
      refuse("nests lists and objects deeper than " + std::to_string(deepest_json) + where +
             ": no calibration does; make the file again");
    }
    if (event == Event::object_start) {
      open_objects.emplace_back();
    } else if (event == Event::object_end) {
      open_objects.pop_back();
    } else if (event == Event::key) {
      const auto& key = parsed.template get_ref<const std::string&>();
      if (!open_objects.back().insert(key).second) {
        refuse("key " + shown_text(key) + " stands twice" + where + ": remove one of the two");
      }
      if (keys != nullptr && open_objects.size() == 1) {
        keys->push_back(key);
      }
    }
    return true;
  };
  try {
    return Json::parse(text.begin(), text.end(), note);
  } catch (const typename Json::exception& error) {
    // What the parser says ends in what it read last, which may be all of the file.
    const std::string said = quoted(std::string_view(error.what()).substr(0, 200));
    refuse("not valid JSON" + where + ", " + said.substr(1, said.size() - 2) +
           ": numbers must be finite (no NaN, no Infinity) and the text whole; make the file again");
  }
  return Json();
}

/// Writes `text` beside `file` and moves it into place, so that neither a stopped run nor a full disk leaves
/// half a file or costs the one that was there. A link stays one: what it leads to is replaced. What is there
/// and no regular file is refused, for it would be replaced as well.
inline void write_text(const std::filesystem::path& file, const std::string& text) {
  std::error_code unknown;
  const auto folder = file.has_parent_path() ? file.parent_path() : std::filesystem::path(".");
  require(std::filesystem::is_directory(folder, unknown), file, "cannot be written, there is no folder ",
          folder.string(), ": create it first");
  const std::filesystem::file_type type = std::filesystem::status(file, unknown).type();
  require(type != std::filesystem::file_type::directory, file,
          "cannot be written, it is a folder: give the path of a file");
  require(type == std::filesystem::file_type::regular || type == std::filesystem::file_type::not_found, file,
          "cannot be written, it is ", kind_of(type), ": give the path of a regular file or of none");
  const std::filesystem::path target =
      type == std::filesystem::file_type::regular ? std::filesystem::canonical(file, unknown) : file;
  require(!target.empty(), file, "cannot be written, ", unknown.message(), ": check the path");
  const auto temporary =
      std::filesystem::path(target).concat(".tmp-" + std::to_string(std::random_device{}()));
  std::ofstream stream(temporary, std::ios::binary);
  require(stream.is_open(), file, "cannot be written, no file can be made in ", folder.string(),
          ": check the permissions");
  stream.write(text.data(), static_cast<std::streamsize>(text.size()));
  stream.close();
  std::error_code moved;
  if (stream.good()) {
    std::filesystem::rename(temporary, target, moved);
  }
  if (!stream.good() || moved) {
    std::filesystem::remove(temporary, unknown);
    fail(file, "cannot be written, ", moved ? moved.message() : "writing stopped short",
         ": check the space on the disk and the permissions; what was there is unchanged");
  }
}

}  // namespace compresskv::io::detail
