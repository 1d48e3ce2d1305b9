#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <limits>

namespace compresskv::detail {

/// Rows that one KV head can have: positions and selections are held in 32 bits.
inline constexpr std::size_t max_rows = (std::numeric_limits<std::uint32_t>::max)();

/// Bytes that one array can have: distances within it are `std::ptrdiff_t`.
inline constexpr std::size_t max_bytes =
    static_cast<std::size_t>((std::numeric_limits<std::ptrdiff_t>::max)());

/// Whether an array of so many units of `unit_bytes` can be: their product does not wrap.
constexpr bool fits_in_memory(std::size_t unit_bytes, std::initializer_list<std::size_t> counts) {
  std::size_t room = max_bytes / unit_bytes;
  for (const std::size_t count : counts) {
    if (count > room) {
      return false;
    }
    room = count == 0 ? room : room / count;
  }
  return true;
}

}  // namespace compresskv::detail
