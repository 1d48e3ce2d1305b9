#pragma once

#include <llama.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <optional>
#include <span>
#include <string_view>
#include <system_error>
#include <vector>

#include "compresskv/adapt/llama_cpp/context_state.hpp"
#include "compresskv/adapt/llama_cpp/model.hpp"
#include "compresskv/adapt/llama_cpp/state_part.hpp"
#include "compresskv/core/error.hpp"

// Models some of whose layers see the last tokens alone. Their state is two parts, and no function of llama.h
// says which layer is in which. The graph names the cache of each layer, so a row of the state tells: the
// layer in whose cache it is found.

namespace compresskv::llama_cpp::detail {

/// The number behind `mark` in a tensor's name.
inline std::optional<std::size_t> number_after(std::string_view name, std::string_view mark) {
  const std::size_t at = name.find(mark);
  std::size_t number = 0;
  if (at == std::string_view::npos ||
      std::from_chars(name.data() + at + mark.size(), name.data() + name.size(), number).ec != std::errc{}) {
    return std::nullopt;
  }
  return number;
}

/// A layer's cache of keys, `[width, cell, stream]`.
class KeyCache {
 public:
  explicit KeyCache(const ggml_tensor& tensor) : tensor_(&tensor) {}

  std::size_t cells() const { return static_cast<std::size_t>(tensor_->ne[1] * tensor_->ne[2]); }
  std::size_t row_bytes() const { return tensor_->nb[1]; }
  bool has_at(std::size_t cell, std::span<const std::uint8_t> row) const {
    if (row.size() != row_bytes() || cell >= cells()) {
      return false;
    }
    std::vector<std::uint8_t> bytes(row.size());
    ggml_backend_tensor_get(tensor_, bytes.data(), cell * row_bytes(), bytes.size());
    return std::ranges::equal(bytes, row);
  }

  /// The first cell that holds one of the rows, and which.
  struct Found {
    std::size_t cell = 0;
    std::size_t row = 0;
  };
  template <std::size_t N>
  std::optional<Found> find(const std::array<std::span<const std::uint8_t>, N>& rows) const {
    constexpr std::size_t at_a_time = 256;
    std::vector<std::uint8_t> bytes;
    for (std::size_t first = 0; first < cells(); first += at_a_time) {
      const std::size_t count = (std::min)(at_a_time, cells() - first);
      bytes.resize(count * row_bytes());
      ggml_backend_tensor_get(tensor_, bytes.data(), first * row_bytes(), bytes.size());
      for (std::size_t i = 0; i < count; ++i) {
        const auto cell = std::span(bytes).subspan(i * row_bytes(), row_bytes());
        for (std::size_t row = 0; row < N; ++row) {
          if (std::ranges::equal(cell, rows[row])) {
            return Found{.cell = first + i, .row = row};
          }
        }
      }
    }
    return std::nullopt;
  }

 private:
  const ggml_tensor* tensor_;
};

/// Which layers of a model see every token: all but those that slide. Of a model with windows it is learnt
/// from the first graph and the state that it leaves.
class GlobalLayers {
 public:
  explicit GlobalLayers(std::size_t layers) : all_(layers), caches_(layers) {
    std::iota(all_.begin(), all_.end(), std::size_t{0});
  }

  /// Their numbers, ascending. Throws ArgumentError where it is not known yet.
  std::span<const std::size_t> of(const llama_model& model) const {
    if (llama_model_n_swa(&model) == 0) {
      return all_;
    }
    require(!global_.empty(), "the model has sliding-window layers of ", llama_model_n_swa(&model),
            " tokens, and no graph has shown yet which they are: decode the prompt with Sequence::read or "
            "Observer::decode, in a context that the observer was attached to");
    return global_;
  }

  /// Before a batch is decoded.
  void begin(const llama_context& context) {
    wanted_ = llama_model_n_swa(llama_get_model(&context)) > 0 && global_.empty();
    std::ranges::fill(caches_, nullptr);
  }
  /// A node of its graph: where keys are stored, the cache is that of the layer.
  void note(const ggml_tensor& node) {
    if (!wanted_ || node.op != GGML_OP_SET_ROWS || node.view_src == nullptr) {
      return;
    }
    constexpr std::string_view mark = "cache_k_l";
    const auto layer = number_after(node.view_src->name, mark);
    if (layer && *layer < caches_.size() && std::string_view(node.view_src->name).starts_with(mark)) {
      caches_[*layer] = node.view_src;
    }
  }
  /// After it was decoded, one of its sequences named. Throws ArgumentError where it cannot be told.
  void learn(const Place& place) {
    if (!wanted_ || std::ranges::count(caches_, nullptr) == std::ssize(caches_)) {
      return;
    }
    StateBytes bytes;
    bytes.read(place);
    StateReader reader(bytes.span());
    const std::int32_t sequence = take_sequence(reader);
    const StatePart seeing_all(bytes.span(), reader, sequence);
    if (reader.left() == 0) {
      global_ = all_;  // the family has windows, this model's layers none
      return;
    }
    const StatePart sliding(bytes.span(), reader, sequence);
    require(seeing_all.layers() > 0, "all layers of the model slide over ",
            llama_model_n_swa(llama_get_model(place.context)),
            " tokens: there is no layer to compress, leave its sequences as they are");
    require(reader.left() == 0 && !sliding.positions().empty(), "the model's state has ", reader.left(),
            " bytes behind its sliding-window layers: such states are not known here");
    global_ = layers_of(seeing_all, sliding);
  }

 private:
  std::vector<std::size_t> layers_of(const StatePart& seeing_all, const StatePart& sliding) const {
    require(seeing_all.layers() + sliding.layers() == caches_.size(), "the model's state holds ",
            seeing_all.layers(), " layers and ", sliding.layers(), " that slide, the model has ",
            caches_.size(), ": models whose layers share caches are not compressed here");
    std::vector<std::size_t> found;
    std::array<std::size_t, 2> cells = {0, 0};
    for (std::size_t layer = 0; layer < caches_.size(); ++layer) {
      const std::size_t slid = layer - found.size();
      std::array<std::span<const std::uint8_t>, 2> rows;
      if (found.size() < seeing_all.layers()) {
        rows[0] = seeing_all.key_row(found.size(), seeing_all.newest());
      }
      if (slid < sliding.layers()) {
        rows[1] = sliding.key_row(slid, sliding.newest());
      }
      if (part_of(layer, rows, cells) == 0) {
        found.push_back(layer);
      }
    }
    return found;
  }

  /// In which part a layer is: whose row its cache holds. `cells` are where the layers before had theirs: so
  /// one row is read of most layers.
  std::size_t part_of(std::size_t layer, const std::array<std::span<const std::uint8_t>, 2>& rows,
                      std::array<std::size_t, 2>& cells) const {
    require(caches_[layer] != nullptr, "layer ", layer,
            " stores no keys of its own: models whose layers share caches are not compressed here");
    const KeyCache cache(*caches_[layer]);
    const std::array<bool, 2> same = {cache.has_at(cells[0], rows[0]), cache.has_at(cells[1], rows[1])};
    if (same[0] != same[1]) {
      return same[0] ? 0 : 1;
    }
    const auto found = cache.find(rows);
    require(found.has_value() && !std::ranges::equal(rows[0], rows[1]), "layer ", layer,
            ": its cache does not tell whether it slides: libllama writes states in a format that is not "
            "known here");
    cells[found->row] = found->cell;
    return found->row;
  }

  std::vector<std::size_t> all_;
  std::vector<const ggml_tensor*> caches_;  // [layer], of the graph that is being computed
  bool wanted_ = false;
  std::vector<std::size_t> global_;  // empty: not known
};

/// Throws ArgumentError where a sequence of a model with sliding-window layers could not go on at `position`:
/// tokens of the window before it have left those layers' cache.
inline void require_window(const Place& place, std::size_t position) {
  const auto window = static_cast<std::size_t>(llama_model_n_swa(llama_get_model(place.context)));
  const llama_pos oldest = llama_memory_seq_pos_min(llama_get_memory(place.context), place.sequence);
  const std::size_t needed = position + 1 > window ? position + 1 - window : 0;
  require(oldest >= 0 && static_cast<std::size_t>(oldest) <= needed, "truncate: position is ", position,
          ", whose sliding window of ", window, " tokens begins at ", needed,
          ", and these layers' cache holds tokens from ", oldest,
          " on: take back fewer, or decode drafts in one batch before they are taken back");
}

}  // namespace compresskv::llama_cpp::detail
