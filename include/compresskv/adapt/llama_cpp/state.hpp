#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "compresskv/adapt/llama_cpp/state_bytes.hpp"
#include "compresskv/adapt/llama_cpp/state_part.hpp"
#include "compresskv/core/element.hpp"
#include "compresskv/core/error.hpp"
#include "compresskv/core/shape.hpp"
#include "compresskv/view/any_kv.hpp"
#include "compresskv/view/layout.hpp"
#include "compresskv/view/strided_kv.hpp"

// The state of one sequence as `llama_state_seq_get_data` writes it (libllama 0.5), all in the machine's byte
// order:
//
//     u32 magic, i32 sequence, u32 streams
//     per stream: u32 cells; where there are any:
//       per cell: i32 position, u32 sequences (1), i32 sequence
//       u32 whether values are transposed, u32 layers
//       per layer: i32 type of keys, u64 bytes of a row, rows
//       per layer: i32 type of values, u64 bytes of a row, rows
//         or transposed: i32 type, u32 bytes of an element, u32 width, [width][cell] elements
//
// Where layers slide, these are the layers that do not; the same follows for those that do, from `streams`
// on, with the cells of the last window alone.
//
// Nothing here needs libllama: what it wrote is checked field by field.

namespace compresskv::llama_cpp {

/// The state of one sequence, looked at where it lies: views of its layers, and a smaller state of the rows
/// that were kept.
class State {
 public:
  /// What follows the layers of the shape.
  enum class Second : std::uint8_t {
    none,
    sliding,  ///< a second part, that of the layers that slide
  };

  /// Reads what stands in `bytes`, which must outlive this object and are written by what moves rows in its
  /// views. `shape` is the model's, its layers those that do not slide. Throws ArgumentError naming the first
  /// field that is not as it must be: another format, a second part where none was expected (sliding-window
  /// and recurrent layers) or none where one was, rows of another width, types that are no type of the
  /// library's, two sequences in one cell. Cost: a pass over the cells; rows are not read.
  State(std::span<std::uint8_t> bytes, const ModelShape& shape, Second second = Second::none)
      : bytes_(bytes), shape_(shape) {
    detail::StateReader reader(bytes);
    sequence_ = detail::take_sequence(reader);
    streams_ = detail::take_streams(reader, [&](std::uint32_t cells) {
      positions_ = detail::take_cells(reader, cells, sequence_);
      read_rows(reader);
    });
    if (second == Second::sliding) {
      read_sliding(reader);
    }
    detail::require(reader.left() == 0, "state: ", reader.left(), " bytes follow the last layer's values: ",
                    second == Second::sliding
                        ? "more than two parts are not known here"
                        : "the model has sliding-window or recurrent layers, whose part was not expected",
                    "; leave the sequence as it is");
  }

  std::size_t cells() const { return positions_.size(); }
  /// Of the cells, as they lie.
  std::span<const std::int32_t> positions() const { return positions_; }
  bool transposed() const { return transposed_; }
  std::uint32_t streams() const { return streams_; }
  std::int32_t sequence() const { return sequence_; }
  ElementKind key_kind(std::size_t layer) const { return layers_[layer].key_kind; }
  ElementKind value_kind(std::size_t layer) const { return layers_[layer].value_kind; }

  /// Lays the rows out by ascending position, which cells that were used before need not have. Throws
  /// ArgumentError where two cells have one position. Cost: nothing where they lie so, else a copy of every
  /// row.
  void sort() {
    if (std::ranges::adjacent_find(positions_, std::ranges::greater_equal{}) == positions_.end()) {
      return;
    }
    const std::vector<std::size_t> order = detail::order_of(positions_);
    std::vector<std::uint8_t> scratch;
    for (const Layer& layer : layers_) {
      detail::reorder(bytes_, layer.keys, layer.key_bytes, order, scratch);
      const std::size_t pieces = transposed_ ? width() : 1;
      for (std::size_t i = 0; i < pieces; ++i) {
        detail::reorder(bytes_, layer.values + i * cells() * layer.value_bytes, layer.value_bytes, order,
                        scratch);
      }
    }
    std::ranges::sort(positions_);
  }

  /// The same for the layers that slide, which compression leaves as they lie; nothing where there are none.
  void sort_sliding() {
    if (sliding_) {
      sliding_->sort();
    }
  }

  /// Keys and values of a layer where they lie in the state: all rows, or the first `head_rows` of each KV
  /// head where it has shrunk. Valid as long as its bytes and `head_rows`. Throws ArgumentError where they do
  /// not lie at an address that their type may have.
  AnyKv view(std::size_t layer, std::span<const std::size_t> head_rows = {}) const {
    const Layer& at = layers_[layer];
    const KvShape shape{.kv_heads = shape_.kv_heads,
                        .rows = cells(),
                        .head_dim = shape_.head_dim,
                        .allocated_rows = cells(),
                        .head_rows = head_rows};
    return detail::with_ggml_kind(at.key_kind, [&]<class Key>(Key*) {
      return detail::with_ggml_kind(at.value_kind, [&]<class Value>(Value*) {
        Key* keys = elements<Key>("keys", layer, at.keys);
        Value* values = elements<Value>("values", layer, at.values);
        return transposed_ ? AnyKv(StridedKv<Key, Value>(keys, values, shape, layout::token_head_dim,
                                                         layout::head_dim_token))
                           : AnyKv(StridedKv<Key, Value>(keys, values, shape, layout::token_head_dim));
      });
    });
  }

  /// A state of the first rows of every layer, as many as there are `positions`, which its cells get:
  /// ascending. The layers that slide keep theirs, byte for byte. Throws ArgumentError where there are more
  /// than cells. Cost: a copy of these rows.
  std::vector<std::uint8_t> first_rows(std::span<const std::int32_t> positions,
                                       const StateTarget& target) const {
    const std::size_t rows = positions.size();
    detail::require(rows >= 1 && rows <= cells(), "state: rows to write are ", rows, ", must be 1 to the ",
                    cells(), " cells that it has");
    detail::StateWriter out(rows * (bytes_.size() / cells() + 1) + 4096);
    out.put(detail::state_magic);
    out.put(target.sequence);
    out.put(target.streams);
    detail::put_cells(out, positions, target.sequence);
    out.put(std::uint32_t{transposed_ ? 1U : 0U});
    out.put(static_cast<std::uint32_t>(layers_.size()));
    for (const Layer& layer : layers_) {
      out.put(ggml_type_of(layer.key_kind));
      out.put(std::uint64_t{layer.key_bytes});
      out.put_bytes(bytes_.subspan(layer.keys, rows * layer.key_bytes));
    }
    for (const Layer& layer : layers_) {
      out.put(ggml_type_of(layer.value_kind));
      if (!transposed_) {
        out.put(std::uint64_t{layer.value_bytes});
        out.put_bytes(bytes_.subspan(layer.values, rows * layer.value_bytes));
        continue;
      }
      out.put(static_cast<std::uint32_t>(layer.value_bytes));
      out.put(static_cast<std::uint32_t>(width()));
      for (std::size_t i = 0; i < width(); ++i) {
        out.put_bytes(
            bytes_.subspan(layer.values + i * cells() * layer.value_bytes, rows * layer.value_bytes));
      }
    }
    detail::put_empty_streams(out, target.streams);
    if (sliding_) {
      sliding_->write(out, target);
    }
    return std::move(out).take();
  }

 private:
  /// Where a layer's rows begin, and the bytes of a cell's row, or of one element where they are transposed.
  struct Layer {
    ElementKind key_kind = ElementKind::float16;
    ElementKind value_kind = ElementKind::float16;
    std::size_t keys = 0;
    std::size_t values = 0;
    std::size_t key_bytes = 0;
    std::size_t value_bytes = 0;
  };

  std::size_t width() const { return shape_.kv_heads * shape_.head_dim; }

  static ElementKind kind_of(std::int32_t type, std::string_view what, std::size_t layer) {
    for (const detail::GgmlType& row : detail::ggml_types) {
      if (row.type == type) {
        return row.kind;
      }
    }
    detail::fail<ArgumentError>("state: ", what, " of layer ", layer, " have ggml's type ", type,
                                ": make the context with type_k and type_v f32, f16, bf16, q8_0 or q4_0");
  }
  static std::int32_t ggml_type_of(ElementKind kind) {
    return std::ranges::find(detail::ggml_types, kind, &detail::GgmlType::kind)->type;
  }

  void read_sliding(detail::StateReader& reader) {
    sliding_.emplace(bytes_, reader, sequence_);
    const auto newest = [](std::span<const std::int32_t> positions) {
      return positions.empty() ? -1 : *std::ranges::max_element(positions);
    };
    detail::require(newest(sliding_->positions()) == newest(positions_),
                    "state: the newest position of the layers that slide is ", newest(sliding_->positions()),
                    ", of the others ", newest(positions_),
                    ": it was changed by others; leave the sequence as it is");
  }

  void read_rows(detail::StateReader& reader) {
    transposed_ = detail::take_transposed(reader);
    const auto layers = reader.take<std::uint32_t>("layers");
    detail::require(layers == shape_.layers, "state: layers are ", layers, ", the model has ", shape_.layers,
                    ": models whose layers share caches, or have none, are not compressed here");
    layers_.resize(layers);
    for (std::size_t l = 0; l < layers; ++l) {
      Layer& layer = layers_[l];
      layer.key_kind = kind_of(reader.take<std::int32_t>("type of keys"), "keys", l);
      layer.key_bytes = row_of("keys", l, layer.key_kind, reader.take<std::uint64_t>("bytes of a key row"));
      layer.keys = reader.skip("keys", detail::product("keys", l, layer.key_bytes, cells()));
    }
    for (std::size_t l = 0; l < layers; ++l) {
      Layer& layer = layers_[l];
      layer.value_kind = kind_of(reader.take<std::int32_t>("type of values"), "values", l);
      if (!transposed_) {
        layer.value_bytes =
            row_of("values", l, layer.value_kind, reader.take<std::uint64_t>("bytes of a value row"));
        layer.values = reader.skip("values", detail::product("values", l, layer.value_bytes, cells()));
        continue;
      }
      layer.value_bytes = reader.take<std::uint32_t>("bytes of a value element");
      const auto wide = reader.take<std::uint32_t>("width of values");
      detail::require(layer.value_kind != ElementKind::q8_0 && layer.value_kind != ElementKind::q4_0,
                      "state: transposed values of layer ", l, " are quantised: turn flash attention on");
      detail::require(layer.value_bytes == detail::bytes_of_elements(layer.value_kind, 1),
                      "state: an element of values of layer ", l, " has ", layer.value_bytes,
                      " bytes, must have ", detail::bytes_of_elements(layer.value_kind, 1));
      detail::require(wide == width(), "state: values of layer ", l, " are ", wide, " wide, the model's are ",
                      width(), ": layers of unequal width are not compressed here");
      layer.values =
          reader.skip("values", detail::product("values", l, layer.value_bytes * width(), cells()));
    }
  }

  std::size_t row_of(std::string_view what, std::size_t layer, ElementKind kind, std::uint64_t bytes) const {
    detail::require(with_units(kind), "state: ", what, " of layer ", layer, " are ", name(kind),
                    ", whose blocks do not divide head_dim ", shape_.head_dim,
                    ": take another type_k or type_v");
    const std::size_t known = detail::bytes_of_elements(kind, width());
    detail::require(bytes == known, "state: a row of ", what, " of layer ", layer, " has ", bytes, " bytes, ",
                    shape_.kv_heads, " KV heads of ", shape_.head_dim, " have ", known,
                    ": layers of unequal width are not compressed here");
    return known;
  }
  bool with_units(ElementKind kind) const {
    return detail::with_ggml_kind(kind,
                                  [&]<class T>(T*) { return shape_.head_dim % elements_per_unit<T>() == 0; });
  }

  template <class T>
  T* elements(std::string_view what, std::size_t layer, std::size_t at) const {
    std::uint8_t* address = bytes_.data() + at;
    detail::require(reinterpret_cast<std::uintptr_t>(address) % alignof(T) == 0, "state: ", what,
                    " of layer ", layer, " lie at byte ", at, ", not at a multiple of ", alignof(T),
                    ": do not mix q4_0 or q8_0 keys with f32 values, and give memory from new");
    return static_cast<T*>(static_cast<void*>(address));
  }

  std::span<std::uint8_t> bytes_;
  ModelShape shape_;
  std::uint32_t streams_ = 1;
  std::int32_t sequence_ = 0;
  bool transposed_ = false;
  std::vector<std::int32_t> positions_;
  std::vector<Layer> layers_;
  std::optional<detail::StatePart> sliding_;
};

}  // namespace compresskv::llama_cpp
