#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "compresskv/core/error.hpp"

// The bytes of a saved sequence: whole numbers, little endian whatever the machine, and texts behind their
// lengths; around them
//
//     "CKVSEQ\r\n" | version, 4 bytes | bytes of what follows, 8 | what is saved | checksum, 8
//
// Version 1. A change of what is saved, or of its order, is another version.

namespace compresskv::sequence {

/// Throws FileError.
template <class... Parts>
[[noreturn]] void fail_of_saved(const Parts&... parts) {
  detail::fail<FileError>("saved sequence: ", parts...);
}
template <class... Parts>
void require_saved(bool holds, const Parts&... parts) {
  if (!holds) [[unlikely]] {
    fail_of_saved(parts...);
  }
}

/// FNV-1a in 64 bits. It tells any one byte that changed, and other damage but for one in 2^64; it is no
/// signature.
class Checksum {
 public:
  void add(std::string_view bytes) {
    for (const char byte : bytes) {
      value_ = (value_ ^ static_cast<unsigned char>(byte)) * 0x100000001B3U;
    }
  }
  std::uint64_t value() const { return value_; }

 private:
  std::uint64_t value_ = 0xCBF29CE484222325U;
};

/// Puts what is saved together.
class SavedWriter {
 public:
  void number(std::uint64_t value, std::size_t width = 8) {
    for (std::size_t byte = 0; byte < width; ++byte) {
      bytes_ += static_cast<char>(value >> (8 * byte) & 0xFFU);
    }
  }
  void text(std::string_view text) {
    number(text.size());
    bytes_ += text;
  }
  std::string_view bytes() const { return bytes_; }

 private:
  std::string bytes_;
};

/// Takes it apart. Throws FileError where it ends too soon; `what` says within what.
class SavedReader {
 public:
  explicit SavedReader(std::string_view bytes) : rest_(bytes) {}

  std::uint64_t number(const char* what, std::size_t width = 8) {
    const std::string_view bytes = take(width, what);
    std::uint64_t value = 0;
    for (std::size_t byte = 0; byte < width; ++byte) {
      value |= std::uint64_t{static_cast<unsigned char>(bytes[byte])} << (8 * byte);
    }
    return value;
  }
  /// Of things that follow, `width` bytes each at least: there cannot be more of them than bytes.
  std::size_t count(const char* what, std::size_t width) {
    const std::uint64_t value = number(what);
    require_saved(value <= rest_.size() / width, "has ", value, " ", what, ", and ", rest_.size(),
                  " bytes for them: it is damaged");
    return value;
  }
  bool flag(const char* what) {
    const std::uint64_t value = number(what, 1);
    require_saved(value <= 1, "says ", value, " of its ", what, ", must be 0 or 1: it is damaged");
    return value == 1;
  }
  std::string_view text(const char* what) { return take(count(what, 1), what); }

  void end() const {
    require_saved(rest_.empty(), "has ", rest_.size(), " bytes behind its end: it is damaged");
  }

 private:
  std::string_view take(std::size_t count, const char* what) {
    require_saved(count <= rest_.size(), "ends within its ", what, ": it is damaged");
    const std::string_view taken = rest_.substr(0, count);
    rest_.remove_prefix(count);
    return taken;
  }

  std::string_view rest_;
};

inline constexpr std::string_view saved_magic = "CKVSEQ\r\n";
inline constexpr std::uint32_t saved_version = 1;

/// Writes what is saved to a stream, a `std::ostream`. Throws FileError where it does not take all.
template <class Out>
void write_saved(Out& out, const SavedWriter& saved) {
  SavedWriter head;
  head.number(saved_version, 4);
  head.number(saved.bytes().size());
  Checksum sum;
  const auto write = [&](std::string_view bytes) {
    sum.add(bytes);
    out.write(bytes.data(), static_cast<std::ptrdiff_t>(bytes.size()));
  };
  write(saved_magic);
  write(head.bytes());
  write(saved.bytes());
  SavedWriter tail;
  tail.number(sum.value());
  write(tail.bytes());
  require_saved(static_cast<bool>(out), "the stream does not take it: check the space on the disk");
}

/// Reads it back from a stream, a `std::istream`, and no byte more. No more memory is taken than the stream
/// holds, whatever its numbers say. Throws FileError.
template <class In>
std::string read_saved(In& in) {
  Checksum sum;
  const auto read = [&](std::uint64_t count, const char* what) {
    constexpr std::uint64_t most = std::uint64_t{1} << 16U;
    std::string bytes;
    while (bytes.size() < count) {
      const std::size_t before = bytes.size();
      const std::size_t piece = (std::min)(most, count - before);
      bytes.resize(before + piece);
      in.read(bytes.data() + before, static_cast<std::ptrdiff_t>(piece));
      require_saved(static_cast<std::size_t>(in.gcount()) == piece, "ends within its ", what, ", ",
                    before + static_cast<std::size_t>(in.gcount()), " bytes of ", count,
                    " are there: it was cut off");
    }
    return bytes;
  };
  const std::string magic = read(saved_magic.size(), "first bytes");
  require_saved(magic == saved_magic, "there is none at this place of the stream: give what save() wrote");
  sum.add(magic);
  const std::string head = read(12, "head");
  sum.add(head);
  SavedReader numbers(head);
  const std::uint64_t version = numbers.number("version", 4);
  require_saved(version == saved_version, "has version ", version, ", this library reads version ",
                saved_version, ": compress the context again");
  std::string saved = read(numbers.number("length"), "contents");
  sum.add(saved);
  const std::string tail = read(8, "checksum");
  require_saved(SavedReader(tail).number("checksum") == sum.value(),
                "its checksum is not that of its bytes: it is damaged");
  return saved;
}

}  // namespace compresskv::sequence
