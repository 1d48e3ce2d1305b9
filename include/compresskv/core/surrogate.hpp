#pragma once

#include <algorithm>
#include <cstddef>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "compresskv/core/error.hpp"
#include "compresskv/core/float_bits.hpp"
#include "compresskv/core/sizes.hpp"

namespace compresskv {

/// Foretells the score of a token from what goes into a layer's attention, a linear map a KV head, fitted
/// once per model by `calibrate::SurrogateAccumulator`: `score::KvZap` then needs no second pass over the
/// text.
///
/// Immutable: copies are cheap and share it.
class Surrogate {
 public:
  /// `weights` is `[layer][kv_head][hidden_size]`, `biases` `[layer][kv_head]`.
  ///
  /// Throws ArgumentError when there is no layer, KV head or element, lists have other lengths, or a number
  /// is not finite.
  Surrogate(std::size_t layers, std::size_t kv_heads, std::size_t hidden_size, std::vector<float> weights,
            std::vector<float> biases) {
    detail::require(layers > 0 && kv_heads > 0 && hidden_size > 0,
                    "a surrogate needs at least one layer, KV head and element, got ", layers, " layers of ",
                    kv_heads, " KV heads of ", hidden_size, " elements");
    detail::require(detail::fits_in_memory(sizeof(float), {layers, kv_heads, hidden_size}), "a surrogate of ",
                    layers, " layers of ", kv_heads, " KV heads of ", hidden_size,
                    " elements is of no model: give its sizes");
    const std::size_t heads = layers * kv_heads;
    detail::require(weights.size() == heads * hidden_size && biases.size() == heads, "surrogate has ",
                    weights.size(), " weights and ", biases.size(), " biases, ", layers, " layers of ",
                    kv_heads, " KV heads of ", hidden_size, " elements need ", heads * hidden_size, " and ",
                    heads);
    for (std::size_t i = 0; i < heads; ++i) {
      const std::span<const float> of_head = std::span(weights).subspan(i * hidden_size, hidden_size);
      const auto wrong = std::find_if(of_head.begin(), of_head.end(),
                                      [](const float& weight) { return !detail::is_finite(weight); });
      detail::require(wrong == of_head.end() && detail::is_finite(biases[i]), "surrogate of layer ",
                      i / kv_heads, " KV head ", i % kv_heads, " has ",
                      wrong == of_head.end() ? biases[i] : *wrong,
                      wrong == of_head.end() ? " as its bias" : "", ": every number must be finite");
    }
    held_ = std::make_shared<const Held>(
        Held{layers, kv_heads, hidden_size, std::move(weights), std::move(biases)});
  }

  std::size_t layers() const { return held_->layers; }
  std::size_t kv_heads() const { return held_->kv_heads; }
  std::size_t hidden_size() const { return held_->hidden_size; }

  std::span<const float> weights(std::size_t layer, std::size_t kv_head) const {
    return std::span(held_->weights)
        .subspan((layer * held_->kv_heads + kv_head) * held_->hidden_size, held_->hidden_size);
  }
  float bias(std::size_t layer, std::size_t kv_head) const {
    return held_->biases[layer * held_->kv_heads + kv_head];
  }

  /// The same of some of the layers, which become 0, 1, ...: that of a plan for some of a model's layers.
  Surrogate of_layers(std::span<const std::size_t> layers) const {
    std::vector<float> weights;
    std::vector<float> biases;
    for (const std::size_t layer : layers) {
      detail::require(layer < held_->layers, "surrogate has layers 0 to ", held_->layers - 1, ", layer ",
                      layer, " was asked for");
      for (std::size_t head = 0; head < held_->kv_heads; ++head) {
        const std::span<const float> row = this->weights(layer, head);
        weights.insert(weights.end(), row.begin(), row.end());
        biases.push_back(bias(layer, head));
      }
    }
    return {layers.size(), held_->kv_heads, held_->hidden_size, std::move(weights), std::move(biases)};
  }

  /// Throws ArgumentError when it is not that of a model of these sizes.
  void validate(std::size_t layers, std::size_t kv_heads) const {
    detail::require(held_->layers == layers && held_->kv_heads == kv_heads, "surrogate is of ", held_->layers,
                    " layers of ", held_->kv_heads, " KV heads, the model has ", layers, " of ", kv_heads,
                    ": use the surrogate calibrated for this model");
  }

  friend bool operator==(const Surrogate& a, const Surrogate& b) { return *a.held_ == *b.held_; }

 private:
  struct Held {
    std::size_t layers = 0;
    std::size_t kv_heads = 0;
    std::size_t hidden_size = 0;
    std::vector<float> weights = {};
    std::vector<float> biases = {};
    friend bool operator==(const Held&, const Held&) = default;
  };

  std::shared_ptr<const Held> held_;
};

}  // namespace compresskv
