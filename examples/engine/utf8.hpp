#pragma once

#include <algorithm>
#include <cstddef>
#include <string_view>

/// UTF-8 as RFC 3629 defines it: no overlong forms, no surrogates, nothing above U+10FFFF.
namespace engine::utf8 {

inline unsigned byte_at(std::string_view text, std::size_t at) {
  return static_cast<unsigned char>(text[at]);
}

/// Bytes of a sequence that starts with `lead`, or 0 where no sequence can start with it.
constexpr std::size_t expected_length(unsigned lead) {
  if (lead < 0x80) return 1;
  if (lead < 0xC2 || lead > 0xF4) return 0;
  if (lead < 0xE0) return 2;
  return lead < 0xF0 ? 3 : 4;
}

/// Whether `next` may follow `lead` as the second byte; that byte alone decides on overlong forms, surrogates
/// and the upper bound.
constexpr bool second_byte_fits(unsigned lead, unsigned next) {
  if (lead == 0xE0) return next >= 0xA0 && next <= 0xBF;
  if (lead == 0xED) return next >= 0x80 && next <= 0x9F;
  if (lead == 0xF0) return next >= 0x90 && next <= 0xBF;
  if (lead == 0xF4) return next >= 0x80 && next <= 0x8F;
  return next >= 0x80 && next <= 0xBF;
}

/// How many bytes from `at` on agree with a well-formed sequence, up to the whole of it; 0 at a byte that
/// cannot start one.
inline std::size_t agreeing_bytes(std::string_view text, std::size_t at) {
  const unsigned lead = byte_at(text, at);
  const std::size_t end = std::min(expected_length(lead), text.size() - at);
  std::size_t count = std::min<std::size_t>(end, 1);
  while (count < end) {
    const unsigned next = byte_at(text, at + count);
    const bool fits = count == 1 ? second_byte_fits(lead, next) : (next & 0xC0U) == 0x80U;
    if (!fits) break;
    ++count;
  }
  return count;
}

/// Bytes of the well-formed character at `at`, or 0 where there is none.
inline std::size_t character_length(std::string_view text, std::size_t at) {
  const std::size_t expected = expected_length(byte_at(text, at));
  return agreeing_bytes(text, at) == expected ? expected : 0;
}

/// Bytes at the end of `text` that begin a character whose rest may still come: 0 to 3.
inline std::size_t unfinished_suffix(std::string_view text) {
  for (std::size_t back = 1; back <= std::min<std::size_t>(3, text.size()); ++back) {
    const std::size_t at = text.size() - back;
    const std::size_t expected = expected_length(byte_at(text, at));
    if (expected > back && agreeing_bytes(text, at) == back) return back;
    if (expected != 0)
      return 0;  // a lead byte whose sequence is whole or broken: nothing earlier can be open
  }
  return 0;
}

}  // namespace engine::utf8
