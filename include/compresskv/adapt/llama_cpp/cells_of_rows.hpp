#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "compresskv/adapt/llama_cpp/model.hpp"
#include "compresskv/core/error.hpp"
#include "compresskv/core/retained.hpp"
#include "compresskv/runtime/any_compressor.hpp"

namespace compresskv::llama_cpp::detail {

/// Rows that every layer and KV head was left with. Throws ArgumentError where they differ: a cell of
/// libllama is a row of all of them.
inline std::size_t rows_of_all(const AnyCompressor& compressor) {
  const std::size_t layers = compressor.plan().shape().layers;
  const std::size_t rows = compressor.retained(0).rows(0);
  for (std::size_t layer = 0; layer < layers; ++layer) {
    const Retained& kept = compressor.retained(layer);
    for (std::size_t head = 0; head < kept.lists(); ++head) {
      require(kept.rows(head) == rows, "method ", compressor.plan().method().name, " keeps ", kept.rows(head),
              " rows of layer ", layer, ", KV head ", head, ", and ", rows,
              " of the first: a cell of llama.cpp is one row of all layers and heads; take a method with a "
              "uniform "
              "budget, without layer errors: compresskv, snapkv, model-wide, tova, streaming");
    }
  }
  return rows;
}

/// Positions that the cells get: of each the newest token that a layer or head keeps in it. They ascend, and
/// serve the mask alone: every later token sees them all.
inline std::vector<std::int32_t> cell_positions(const AnyCompressor& compressor) {
  std::vector<std::int32_t> cells(rows_of_all(compressor), 0);
  for (std::size_t layer = 0; layer < compressor.plan().shape().layers; ++layer) {
    const Retained& kept = compressor.retained(layer);
    for (std::size_t head = 0; head < kept.lists(); ++head) {
      std::size_t row = 0;
      for (const std::uint32_t position : kept.positions(head)) {
        cells[row] = (std::max)(cells[row], static_cast<std::int32_t>(position));
        ++row;
      }
    }
  }
  return cells;
}

}  // namespace compresskv::llama_cpp::detail
