#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <span>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "compresskv/core/element.hpp"
#include "compresskv/core/error.hpp"

// What a state is read and written with: see state.hpp. Nothing here needs libllama.

namespace compresskv::llama_cpp {

namespace detail {

using compresskv::detail::fail;
using compresskv::detail::require;

inline constexpr std::uint32_t state_magic = 0xaf143cd8;
/// More than libllama's LLAMA_MAX_SEQ: a number above is no number of streams.
inline constexpr std::uint32_t max_streams = 4096;

struct GgmlType {
  std::int32_t type;
  ElementKind kind;
};
/// ggml's numbers of the types that a cache may hold here.
inline constexpr GgmlType ggml_types[] = {{0, ElementKind::float32},
                                          {1, ElementKind::float16},
                                          {2, ElementKind::q4_0},
                                          {8, ElementKind::q8_0},
                                          {30, ElementKind::bfloat16}};

/// Calls `f` with a null pointer of the kind's type; a cache of ggml holds no int8 rows.
template <class F>
decltype(auto) with_ggml_kind(ElementKind kind, F&& f) {
  switch (kind) {
    case ElementKind::q8_0:
      return f(static_cast<BlockQ8_0*>(nullptr));
    case ElementKind::q4_0:
      return f(static_cast<BlockQ4_0*>(nullptr));
    default:
      return with_plain_kind(kind, f);
  }
}

inline std::size_t bytes_of_elements(ElementKind kind, std::size_t count) {
  return with_ggml_kind(kind, [&]<class T>(T*) { return row_bytes<T>(count); });
}

/// Takes one field after the other from a state, never past its end.
class StateReader {
 public:
  explicit StateReader(std::span<const std::uint8_t> bytes) : bytes_(bytes) {}

  std::size_t at() const { return at_; }
  std::size_t left() const { return bytes_.size() - at_; }

  template <class T>
  T take(std::string_view field) {
    T value{};
    std::memcpy(&value, bytes_.data() + skip(field, sizeof(T)), sizeof(T));
    return value;
  }
  /// Where `count` bytes begin, which are passed over.
  std::size_t skip(std::string_view field, std::size_t count) {
    require(count <= left(), "state: ", field, " at byte ", at_, " takes ", count, " bytes, ", left(),
            " are left: the state is cut off, or of a format that is not known here");
    return std::exchange(at_, at_ + count);
  }

 private:
  std::span<const std::uint8_t> bytes_;
  std::size_t at_ = 0;
};

class StateWriter {
 public:
  explicit StateWriter(std::size_t bytes) { bytes_.reserve(bytes); }

  template <class T>
  requires std::is_arithmetic_v<T>
  void put(T value) {
    const std::size_t at = bytes_.size();
    bytes_.resize(at + sizeof(T));
    std::memcpy(bytes_.data() + at, &value, sizeof(T));
  }
  void put_bytes(std::span<const std::uint8_t> bytes) {
    bytes_.insert(bytes_.end(), bytes.begin(), bytes.end());
  }
  std::vector<std::uint8_t> take() && { return std::move(bytes_); }

 private:
  std::vector<std::uint8_t> bytes_;
};

/// The sequence of a state, whose first fields are read. Throws ArgumentError for another format.
inline std::int32_t take_sequence(StateReader& reader) {
  const auto magic = reader.take<std::uint32_t>("magic");
  require(magic == state_magic, "state: magic is ", magic, ", must be ", state_magic,
          ": this libllama writes states in a format that is not known here (known: libllama 0.5)");
  return reader.take<std::int32_t>("sequence");
}

/// The number of streams. `read(cells)` reads on in the one that holds cells, where there is one.
template <class Read>
std::uint32_t take_streams(StateReader& reader, Read&& read) {
  const auto streams = reader.take<std::uint32_t>("streams");
  require(streams >= 1 && streams <= max_streams, "state: streams are ", streams, ", must be 1 to ",
          max_streams);
  bool found = false;
  for (std::uint32_t stream = 0; stream < streams; ++stream) {
    if (const auto cells = reader.take<std::uint32_t>("cells of a stream"); cells > 0) {
      require(!found, "state: streams ", stream, " and one before it hold cells: a sequence lies in one");
      found = true;
      read(cells);
    }
  }
  return streams;
}

/// The streams behind the first one: no cells.
inline void put_empty_streams(StateWriter& out, std::uint32_t streams) {
  for (std::uint32_t stream = 1; stream < streams; ++stream) {
    out.put(std::uint32_t{0});
  }
}

inline bool take_transposed(StateReader& reader) {
  const auto transposed = reader.take<std::uint32_t>("whether values are transposed");
  require(transposed <= 1, "state: whether values are transposed is ", transposed, ", must be 0 or 1");
  return transposed == 1;
}

/// Positions of a sequence's cells, as they lie: each has one sequence, which is this one.
inline std::vector<std::int32_t> take_cells(StateReader& reader, std::uint32_t cells,
                                            std::int32_t own_sequence) {
  constexpr std::size_t cell_bytes = 12;
  require(cells <= reader.left() / cell_bytes, "state: cells are ", cells, ", the ", reader.left(),
          " bytes left hold at most ", reader.left() / cell_bytes, ": the state is cut off");
  std::vector<std::int32_t> positions(cells);
  for (std::size_t cell = 0; cell < cells; ++cell) {
    positions[cell] = reader.take<std::int32_t>("position");
    const auto sequences = reader.take<std::uint32_t>("sequences of a cell");
    const auto sequence = reader.take<std::int32_t>("sequence of a cell");
    require(positions[cell] >= 0, "state: position of cell ", cell, " is ", positions[cell],
            ", must be 0 or more");
    require(sequences == 1 && sequence == own_sequence, "state: cell ", cell, " is of ", sequences,
            " sequences, first ", sequence, ", must be of sequence ", own_sequence,
            " alone: models with M-RoPE or other marks on their cells are not compressed here");
  }
  return positions;
}

inline void put_cells(StateWriter& out, std::span<const std::int32_t> positions, std::int32_t sequence) {
  out.put(static_cast<std::uint32_t>(positions.size()));
  for (const std::int32_t position : positions) {
    out.put(position);
    out.put(std::uint32_t{1});
    out.put(sequence);
  }
}

inline std::size_t product(std::string_view what, std::size_t layer, std::size_t bytes, std::size_t count) {
  std::size_t all = 0;
  require(!__builtin_mul_overflow(bytes, count, &all), "state: ", what, " of layer ", layer, " are ", count,
          " times ", bytes, " bytes, which no memory holds");
  return all;
}

/// Cells in the order of their positions. Throws ArgumentError where two have the same.
inline std::vector<std::size_t> order_of(std::span<const std::int32_t> positions) {
  std::vector<std::size_t> order(positions.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::ranges::sort(order, {}, [&](std::size_t cell) { return positions[cell]; });
  for (std::size_t i = 1; i < order.size(); ++i) {
    require(positions[order[i - 1]] != positions[order[i]], "state: two cells have position ",
            positions[order[i]], ": a sequence has one token a position");
  }
  return order;
}

/// Row `i` of the rows that begin at `at` becomes what row `order[i]` was.
inline void reorder(std::span<std::uint8_t> all, std::size_t at, std::size_t row_bytes,
                    std::span<const std::size_t> order, std::vector<std::uint8_t>& scratch) {
  const std::span<std::uint8_t> rows = all.subspan(at, order.size() * row_bytes);
  scratch.assign(rows.begin(), rows.end());
  for (std::size_t row = 0; row < order.size(); ++row) {
    std::memcpy(rows.data() + row * row_bytes, scratch.data() + order[row] * row_bytes, row_bytes);
  }
}

}  // namespace detail

/// Where a state is to be read: another context may have other streams, and the sequence another number.
struct StateTarget {
  std::uint32_t streams = 1;
  std::int32_t sequence = 0;
};

}  // namespace compresskv::llama_cpp
