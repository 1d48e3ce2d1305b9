#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "compresskv/adapt/llama_cpp/state_bytes.hpp"
#include "compresskv/core/error.hpp"

namespace compresskv::llama_cpp::detail {

/// One cache's part of a state, whatever the width of its rows and the type of their elements: what libllama
/// writes of the layers that slide, behind the part of those that see every token. Its rows stay as they are.
class StatePart {
 public:
  /// Reads on where `reader`, over the same bytes, stands: the part of sequence `sequence`. Throws
  /// ArgumentError naming the first field that is not as it must be.
  StatePart(std::span<std::uint8_t> bytes, StateReader& reader, std::int32_t sequence) : bytes_(bytes) {
    take_streams(reader, [&](std::uint32_t cells) {
      positions_ = take_cells(reader, cells, sequence);
      rows_begin_ = reader.at();
      read_rows(reader);
      rows_end_ = reader.at();
    });
  }

  std::size_t layers() const { return keys_.size(); }
  /// Of the cells, as they lie.
  std::span<const std::int32_t> positions() const { return positions_; }
  /// The cell of the newest token; there must be one.
  std::size_t newest() const {
    return static_cast<std::size_t>(std::ranges::max_element(positions_) - positions_.begin());
  }
  std::span<const std::uint8_t> key_row(std::size_t layer, std::size_t cell) const {
    return bytes_.subspan(keys_[layer].at + cell * keys_[layer].row_bytes, keys_[layer].row_bytes);
  }

  /// Lays the cells out by ascending position. Throws ArgumentError where two have the same.
  void sort() {
    const std::vector<std::size_t> order = order_of(positions_);
    std::vector<std::uint8_t> scratch;
    for (const std::vector<Rows>* all : {&keys_, &values_}) {
      for (const Rows& rows : *all) {
        for (std::size_t i = 0; i < rows.pieces; ++i) {
          reorder(bytes_, rows.at + i * order.size() * rows.row_bytes, rows.row_bytes, order, scratch);
        }
      }
    }
    std::ranges::sort(positions_);
  }

  /// The part as another context may read it: all its cells, in the order in which they lie.
  void write(StateWriter& out, const StateTarget& target) const {
    out.put(target.streams);
    put_cells(out, positions_, target.sequence);
    out.put_bytes(bytes_.subspan(rows_begin_, rows_end_ - rows_begin_));
    put_empty_streams(out, target.streams);
  }

 private:
  /// Rows of a layer, or `pieces` runs of elements, one a cell, where values are transposed.
  struct Rows {
    std::size_t at = 0;
    std::size_t row_bytes = 0;
    std::size_t pieces = 1;
  };

  void read_rows(StateReader& reader) {
    const bool transposed = take_transposed(reader);
    const auto layers = reader.take<std::uint32_t>("layers");
    for (std::uint32_t layer = 0; layer < layers; ++layer) {
      reader.take<std::int32_t>("type of keys");
      keys_.push_back(take_rows(reader, layer));
    }
    for (std::uint32_t layer = 0; layer < layers; ++layer) {
      reader.take<std::int32_t>("type of values");
      values_.push_back(transposed ? take_elements(reader, layer) : take_rows(reader, layer));
    }
  }

  Rows take_rows(StateReader& reader, std::size_t layer) const {
    return skip(reader, layer, {.row_bytes = reader.take<std::uint64_t>("bytes of a row")});
  }
  Rows take_elements(StateReader& reader, std::size_t layer) const {
    const auto element = reader.take<std::uint32_t>("bytes of a value element");
    const auto width = reader.take<std::uint32_t>("width of values");
    return skip(reader, layer, {.row_bytes = element, .pieces = width});
  }
  Rows skip(StateReader& reader, std::size_t layer, Rows rows) const {
    const std::size_t row = product("sliding rows", layer, rows.row_bytes, rows.pieces);
    rows.at = reader.skip("rows", product("sliding rows", layer, row, positions_.size()));
    return rows;
  }

  std::span<std::uint8_t> bytes_;
  std::vector<std::int32_t> positions_;
  std::vector<Rows> keys_;
  std::vector<Rows> values_;
  std::size_t rows_begin_ = 0;
  std::size_t rows_end_ = 0;
};

}  // namespace compresskv::llama_cpp::detail
