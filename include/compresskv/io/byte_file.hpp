#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "compresskv/core/error.hpp"
#include "compresskv/io/text_file.hpp"

// What files of numbers side by side have in common: little-endian on any machine, and a checksum at the end.

namespace compresskv::io::detail {

inline constexpr std::size_t checksum_bytes = 8;

/// FNV-1a, 64 bits.
inline std::uint64_t checksum(std::string_view bytes) {
  std::uint64_t hash = 0xcbf29ce484222325U;
  for (const char byte : bytes) {
    hash = (hash ^ static_cast<unsigned char>(byte)) * 0x100000001b3U;
  }
  return hash;
}

/// Adds numbers to the bytes of a file.
class ByteWriter {
 public:
  template <class T>
  void add(T number) {
    for (std::size_t i = 0; i < sizeof(T); ++i) {
      bytes_ += static_cast<char>(number >> (8 * i) & 0xFFU);
    }
  }
  void add_real(double number) { add(std::bit_cast<std::uint64_t>(number)); }
  void add_all(std::span<const float> numbers) {
    for (const float number : numbers) {
      add(std::bit_cast<std::uint32_t>(number));
    }
  }
  void add_text(std::string_view text) { bytes_ += text; }
  const std::string& bytes() const { return bytes_; }

 private:
  std::string bytes_;
};

/// Takes numbers from bytes that are long enough.
class ByteReader {
 public:
  explicit ByteReader(std::string_view bytes) : bytes_(bytes) {}

  template <class T>
  T take() {
    T number = 0;
    for (std::size_t i = 0; i < sizeof(T); ++i) {
      number |= static_cast<T>(static_cast<T>(static_cast<unsigned char>(bytes_[at_ + i])) << (8 * i));
    }
    at_ += sizeof(T);
    return number;
  }
  double take_real() { return std::bit_cast<double>(take<std::uint64_t>()); }
  std::vector<float> take_all(std::size_t count) {
    std::vector<float> numbers;
    numbers.reserve(count);
    for (std::size_t i = 0; i < count; ++i) {
      numbers.push_back(std::bit_cast<float>(take<std::uint32_t>()));
    }
    return numbers;
  }
  std::string_view take_text(std::size_t count) {
    at_ += count;
    return bytes_.substr(at_ - count, count);
  }

 private:
  std::string_view bytes_;
  std::size_t at_ = 0;
};

/// Runs `make`; what it refuses becomes an error of `file`.
template <class Make>
auto made_of(const std::filesystem::path& file, const Make& make) {
  try {
    return make();
  } catch (const ArgumentError& error) {
    fail(file, error.what());
  }
}

}  // namespace compresskv::io::detail
