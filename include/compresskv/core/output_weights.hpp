#pragma once

#include <atomic>
#include <cstddef>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "compresskv/core/element.hpp"
#include "compresskv/core/error.hpp"
#include "compresskv/core/sizes.hpp"

namespace compresskv {

/// Shape of a layer's output projection, `[hidden][query_head][dim]`.
struct OutputShape {
  std::size_t hidden = 0;  ///< elements of the model's hidden state
  std::size_t query_heads = 0;
  std::size_t head_dim = 0;
};

/// The output projections of a model, `W_o`, in the engine's own memory: for methods that weigh a token by
/// what its value adds to the layer's output, `W_o[h] value`. The columns of query head h are `W_o[h]`.
///
/// A constant of the model: copies are cheap and share it. What methods derive from it is made once per
/// layer, for all sequences and threads, and held: `head_dim * (head_dim + 1) / 2` floats a query head
/// (`kernel::output_lengths`).
class OutputWeights {
 public:
  /// `layers[l]` points to layer l's elements, row-major, one row an element of the hidden state: float, half
  /// or bfloat16; quantised weights are decoded before. The engine's memory must outlive all copies.
  ///
  /// Throws ArgumentError when there is no layer, a size is 0 or too large, or a layer is null.
  template <Element T>
  OutputWeights(const std::vector<const T*>& layers, const OutputShape& shape)
      : shape_(shape), kind_(kind_of_element<T>()) {
    detail::require(!layers.empty() && shape.hidden > 0 && shape.query_heads > 0 && shape.head_dim > 0,
                    "output weights need at least one layer, element of the hidden state, head and element "
                    "of a head, got ",
                    layers.size(), " layers of ", shape.hidden, " rows of ", shape.query_heads, " heads of ",
                    shape.head_dim, " elements");
    detail::require(
        detail::fits_in_memory(sizeof(T), {shape.hidden, shape.query_heads, shape.head_dim}) &&
            detail::fits_in_memory(2 * sizeof(double), {shape.query_heads, shape.head_dim, shape.head_dim}),
        "output weights of ", shape.hidden, " rows of ", shape.query_heads, " heads of ", shape.head_dim,
        " elements are of no model: give its sizes");
    for (std::size_t layer = 0; layer < layers.size(); ++layer) {
      detail::require(layers[layer] != nullptr, "output weights of layer ", layer,
                      " are null: give those of every layer");
      layers_.push_back(std::make_shared<Layer>(layers[layer]));
    }
  }

  std::size_t layers() const { return layers_.size(); }
  const OutputShape& shape() const { return shape_; }

  /// Decodes a row of a query head's weights, `W_o[query_head]`, to `head_dim` float32.
  void read(std::size_t layer, std::size_t query_head, std::size_t row, float* out) const {
    with_plain_kind(kind_, [&]<class T>(T*) {
      const T* const weights = static_cast<const T*>(layers_[layer]->weights) +
                               (row * shape_.query_heads + query_head) * shape_.head_dim;
      for (std::size_t e = 0; e < shape_.head_dim; ++e) {
        out[e] = to_float(weights[e]);
      }
    });
  }

  /// What was derived of a layer, or else what `make()` derives now, a `std::vector<float>`, which is then
  /// held. Threads that come at the same time may each make it, always to the same bits; none waits.
  template <class Make>
  std::span<const float> derived(std::size_t layer, Make&& make) const {
    std::atomic<const std::vector<float>*>& held = layers_[layer]->derived;
    if (const auto* made = held.load(std::memory_order_acquire)) {
      return *made;
    }
    auto own = std::make_unique<const std::vector<float>>(make());
    const std::vector<float>* other = nullptr;
    if (held.compare_exchange_strong(other, own.get(), std::memory_order_acq_rel)) {
      return *own.release();
    }
    return *other;
  }

  /// The same of some of the layers, which become 0, 1, ...: those of a plan for some of a model's layers.
  OutputWeights of_layers(std::span<const std::size_t> layers) const {
    OutputWeights some = *this;
    some.layers_.clear();
    for (const std::size_t layer : layers) {
      detail::require(layer < layers_.size(), "output weights have layers 0 to ", layers_.size() - 1,
                      ", layer ", layer, " was asked for");
      some.layers_.push_back(layers_[layer]);
    }
    return some;
  }

  /// Throws ArgumentError when they are not those of a model of these sizes.
  void validate(std::size_t layers, std::size_t query_heads, std::size_t head_dim) const {
    detail::require(
        layers_.size() == layers && shape_.query_heads == query_heads && shape_.head_dim == head_dim,
        "output weights are of ", layers_.size(), " layers of ", shape_.query_heads, " heads of ",
        shape_.head_dim, " elements, the model has ", layers, " of ", query_heads, " of ", head_dim,
        ": give the weights of this model");
  }

 private:
  struct Layer {
    explicit Layer(const void* of) : weights(of) {}
    Layer(const Layer&) = delete;
    Layer& operator=(const Layer&) = delete;
    ~Layer() { delete derived.load(std::memory_order_acquire); }

    const void* weights;
    std::atomic<const std::vector<float>*> derived{nullptr};
  };

  OutputShape shape_;
  ElementKind kind_;
  std::vector<std::shared_ptr<Layer>> layers_;
};

}  // namespace compresskv
