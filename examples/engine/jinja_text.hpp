// Characters as Jinja and Python see them, of text in UTF-8; a byte that belongs to no character is one.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <string_view>
#include <vector>

#include "utf8.hpp"

namespace engine::jinja {

inline std::size_t length_at(std::string_view text, std::size_t at) {
  return std::max<std::size_t>(utf8::character_length(text, at), 1);
}

// What Python's str.isspace() says.
inline bool is_space(std::string_view character) {
  if (character.size() == 1) {
    const auto c = static_cast<unsigned char>(character[0]);
    return (c >= 0x09 && c <= 0x0D) || (c >= 0x1C && c <= 0x20);
  }
  constexpr auto wide = std::to_array<std::string_view>(
      {"\xC2\x85", "\xC2\xA0", "\xE1\x9A\x80", "\xE2\x80\x80", "\xE2\x80\x81", "\xE2\x80\x82", "\xE2\x80\x83",
       "\xE2\x80\x84", "\xE2\x80\x85", "\xE2\x80\x86", "\xE2\x80\x87", "\xE2\x80\x88", "\xE2\x80\x89",
       "\xE2\x80\x8A", "\xE2\x80\xA8", "\xE2\x80\xA9", "\xE2\x80\xAF", "\xE2\x81\x9F", "\xE3\x80\x80"});
  return std::find(wide.begin(), wide.end(), character) != wide.end();
}

inline std::vector<std::string_view> characters(std::string_view text) {
  std::vector<std::string_view> out;
  for (std::size_t at = 0; at < text.size();) {
    out.push_back(text.substr(at, length_at(text, at)));
    at += out.back().size();
  }
  return out;
}

// The part of `text` without the characters at its ends that `drops` takes.
struct Stretch {
  std::size_t begin = 0;
  std::size_t end = 0;
};

template <class Drops>
Stretch stripped(std::string_view text, bool left, bool right, const Drops& drops) {
  Stretch kept{.begin = 0, .end = text.size()};
  while (left && kept.begin < kept.end) {
    const std::size_t length = length_at(text, kept.begin);
    if (!drops(text.substr(kept.begin, length))) break;
    kept.begin += length;
  }
  while (right && kept.end > kept.begin) {
    std::size_t at = kept.end - 1;
    while (at > kept.begin && kept.end - at < 4 && (utf8::byte_at(text, at) & 0xC0U) == 0x80U) --at;
    if (length_at(text, at) != kept.end - at) at = kept.end - 1;  // no whole character: a byte of its own
    if (!drops(text.substr(at, kept.end - at))) break;
    kept.end = at;
  }
  return kept;
}

inline bool is_ascii(std::string_view text) {
  return std::all_of(text.begin(), text.end(), [](char c) { return static_cast<unsigned char>(c) < 0x80; });
}
inline bool is_lower(char c) { return c >= 'a' && c <= 'z'; }
inline bool is_upper(char c) { return c >= 'A' && c <= 'Z'; }
inline bool is_digit(char c) { return c >= '0' && c <= '9'; }
inline bool is_letter(char c) { return is_lower(c) || is_upper(c); }
inline bool is_name(char c) { return is_letter(c) || is_digit(c) || c == '_'; }
inline char lower(char c) { return is_upper(c) ? static_cast<char>(c + 32) : c; }
inline char upper(char c) { return is_lower(c) ? static_cast<char>(c - 32) : c; }

}  // namespace engine::jinja
