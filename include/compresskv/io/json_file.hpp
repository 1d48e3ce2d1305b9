#pragma once

#include <algorithm>
#include <cstddef>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "compresskv/io/text_file.hpp"

/// How the files of this folder are read: regular files of bounded size, JSON without what JSON libraries
/// pass over in silence.
namespace compresskv::io::detail {

/// The formats nest three deep.
inline constexpr int deepest_json = 16;

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

inline std::string read_text(const std::filesystem::path& file) {
  std::string text = read_whole(file);
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

}  // namespace compresskv::io::detail
