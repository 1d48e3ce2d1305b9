#pragma once

#include <llama.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "compresskv/adapt/llama_cpp/micro_batches.hpp"
#include "compresskv/adapt/llama_cpp/model.hpp"
#include "compresskv/adapt/llama_cpp/sliding_layers.hpp"
#include "compresskv/core/error.hpp"
#include "compresskv/core/shape.hpp"
#include "compresskv/view/query_window.hpp"
#include "compresskv/view/recent_queries.hpp"

namespace compresskv::llama_cpp {

namespace detail {

/// The node in which a layer's queries meet its keys: what it multiplies, and how.
struct AttentionNode {
  std::size_t layer = 0;
  const ggml_tensor* queries = nullptr;  // [head_dim, token, head, stream], float32
  bool fused = false;                    // flash attention: scale and soft cap are the node's own
};

/// Which layer's cache a tensor of keys comes from: a view of it, a copy of such a view on another device, or
/// one that was cast.
inline std::optional<std::size_t> layer_of_keys(const ggml_tensor* keys) {
  for (int steps = 0; keys != nullptr && steps < 8; ++steps) {
    for (const ggml_tensor* at : {keys, static_cast<const ggml_tensor*>(keys->view_src)}) {
      if (const auto layer = at == nullptr ? std::nullopt : number_after(at->name, "cache_k_l")) {
        return layer;
      }
    }
    keys = keys->src[0];
  }
  return std::nullopt;
}

inline std::optional<AttentionNode> attention_node(const ggml_tensor& node) {
  const bool fused = node.op == GGML_OP_FLASH_ATTN_EXT;
  if (!fused && (node.op != GGML_OP_MUL_MAT || std::strncmp(node.name, "kq-", 3) != 0)) {
    return std::nullopt;
  }
  const std::optional<std::size_t> layer = layer_of_keys(node.src[fused ? 1 : 0]);
  require(layer.has_value(),
          "observer: the graph's attention reads no cache of a layer: libllama names it otherwise");
  return AttentionNode{.layer = *layer, .queries = node.src[fused ? 0 : 1], .fused = fused};
}

inline float float_parameter(const ggml_tensor& node, std::size_t index) {
  float value = 0.0F;
  std::memcpy(&value,
              static_cast<const char*>(static_cast<const void*>(node.op_params)) + index * sizeof(float),
              sizeof(float));
  return value;
}

}  // namespace detail

/// Sees the last queries of each sequence while libllama computes them: the function that a context calls for
/// each node of its graph (`cb_eval`).
///
///     Observer observer{llama_cpp::model_shape(model), plan.window()};
///     observer.attach(context_params);                    // before llama_init_from_model
///     observer.decode(context, batch);                    // in place of llama_decode
///
/// Queries are taken where they meet the keys, so rotated as the cache is, with the graph's own scale, soft
/// cap and sinks. They are read through ggml's backends: they may lie on a GPU or another machine. One object
/// serves any number of contexts of a model, one thread at a time, and must outlive them. It holds `layers *
/// query_heads * window * head_dim` floats a sequence that is observed.
///
/// What it costs: a micro-batch with one of the last `window` tokens stops once a layer. All others, and all
/// that `llama_decode` computes by itself, are asked nothing of.
class Observer {
 public:
  /// `window` queries are held of each layer and sequence: at least `AnyPlan::window()`. Throws ArgumentError
  /// on 0.
  Observer(const ModelShape& shape, std::size_t window)
      : shape_(shape), window_(window), layers_(shape.layers), global_layers_(shape.layers) {
    detail::require(window > 0, "Observer: window is 0: give the plan's window, or more");
    shape.validate();
  }
  Observer(const Observer&) = delete;
  Observer& operator=(const Observer&) = delete;

  /// A context made with these parameters shows its graphs to this object.
  void attach(llama_context_params& params) {
    params.cb_eval = &Observer::call;
    params.cb_eval_user_data = this;
  }

  /// `llama_decode`, observed: of each sequence the last `window` tokens of the batch are looked at.
  /// `following` is the number of tokens that later batches add before the sequence is compressed; where it
  /// is known nothing is looked at that would be forgotten again. Returns what `llama_decode` returns; where
  /// that is not 0 the sequences of the batch are forgotten. Throws ArgumentError where the batch cannot be
  /// observed (embeddings without sequences are fine), or the graph is not as expected, or does not tell
  /// which layers slide: the batch has then been decoded all the same.
  std::int32_t decode(llama_context* context, const llama_batch& batch, std::size_t following = 0) {
    detail::require(context != nullptr, "Observer: context is null: give the one that decodes");
    micro_batches_ = detail::MicroBatches(*context, batch, window_, following);
    global_layers_.begin(*context);
    context_ = context;
    current_ = -1;
    positions_ = nullptr;
    failure_.clear();
    const std::int32_t status = llama_decode(context, batch);
    context_ = nullptr;
    if (status != 0 || !failure_.empty()) {
      for (const llama_seq_id sequence : micro_batches_.sequences()) {
        forget({context, sequence});
      }
    }
    detail::require(failure_.empty(), failure_);
    if (status == 0 && !micro_batches_.sequences().empty()) {
      global_layers_.learn({context, micro_batches_.sequences().front()});
    }
    return status;
  }

  /// Queries held of every layer whose last one is of position `next_position - 1`; 0 where others were seen
  /// last.
  std::size_t seen(const Place& place, std::size_t next_position) const {
    const auto found = watched_.find(key(place));
    if (found == watched_.end()) {
      return 0;
    }
    std::size_t least = window_;
    for (const Watched& layer : found->second) {
      least = layer.next == next_position ? (std::min)(least, layer.queries.size()) : 0;
    }
    return least;
  }

  /// The last queries of a layer. Valid until the sequence is observed again. Throws ArgumentError where
  /// there are none.
  QueryWindow<float> queries(const Place& place, std::size_t layer) const {
    const auto found = watched_.find(key(place));
    detail::require(found != watched_.end() && layer < found->second.size(), "Observer: layer ", layer,
                    " of sequence ", place.sequence,
                    " was not observed: decode its last tokens with Observer::decode");
    const RecentQueries<float>& recent = found->second[layer].queries;
    const QueryWindow<float> held = recent.view();
    const Attention& attention = layers_[layer];
    return {held.query_run(0).base,
            QueryShape{.query_heads = shape_.query_heads,
                       .queries = held.queries(),
                       .head_dim = shape_.head_dim,
                       .scale = attention.scale,
                       .soft_cap = attention.soft_cap,
                       .sinks = attention.sinks},
            QueryStrides{.head = window_ * shape_.head_dim, .query = shape_.head_dim}};
  }

  /// Layers of a model that see every token, ascending: all of them, or those without a sliding window. Which
  /// these are is learnt from the first batch decoded by this object, whose state is read once for it. Throws
  /// ArgumentError before. Valid as long as this object.
  std::span<const std::size_t> global_layers(const llama_model* model) const {
    detail::require(model != nullptr, "Observer: model is null: give the llama_model that is observed");
    return global_layers_.of(*model);
  }

  /// A sequence's window goes with it: after `llama_memory_seq_cp`, or to another context. Nothing where
  /// there is none.
  void copy(const Place& from, const Place& to) {
    const auto found = watched_.find(key(from));
    if (found != watched_.end()) {
      std::vector<Watched> window = found->second;
      watched_.insert_or_assign(key(to), std::move(window));
    }
  }
  void forget(const Place& place) { watched_.erase(key(place)); }

  std::size_t window() const { return window_; }
  const ModelShape& shape() const { return shape_; }

 private:
  using Key = std::pair<const llama_context*, llama_seq_id>;

  struct Watched {
    RecentQueries<float> queries;
    std::size_t next = 0;  // position after the last one held
  };
  /// What the graph does with a layer's logits.
  struct Attention {
    float scale = 0.0F;
    float soft_cap = 0.0F;
    std::vector<float> sinks;
  };

  static Key key(const Place& place) { return {place.context, place.sequence}; }

  /// No exception may pass through libllama: what went wrong is thrown by `decode`.
  static bool call(ggml_tensor* node, bool ask, void* object) {
    auto& self = *static_cast<Observer*>(object);
    if (self.context_ == nullptr || !self.failure_.empty()) {
      return !ask;
    }
    try {
      return ask ? self.wants(*node) : self.take(*node);
    } catch (const std::exception& error) {
      self.failure_ = error.what();
      return !ask;
    }
  }

  bool wants(const ggml_tensor& node) {
    global_layers_.note(node);
    if (node.op == GGML_OP_ROPE) {
      positions_ = node.src[1];
      return false;
    }
    if (node.op == GGML_OP_SOFT_MAX) {
      note_soft_max(node);
      return false;
    }
    const auto attention = detail::attention_node(node);
    if (!attention) {
      return false;
    }
    if (attention->layer == 0) {
      ++current_;
    }
    const detail::MicroBatch& batch = micro_batches_.at(current_);
    if (!batch.wanted()) {
      return false;
    }
    detail::require(attention->layer < shape_.layers, "observer: the graph has layer ", attention->layer,
                    ", the model ", shape_.layers);
    const ggml_tensor& q = *attention->queries;
    const auto size = [&](int axis) { return static_cast<std::size_t>(q.ne[axis]); };
    detail::require(q.type == GGML_TYPE_F32 && size(0) == shape_.head_dim && size(2) == shape_.query_heads,
                    "observer: queries of layer ", attention->layer, " are ", ggml_type_name(q.type), " in ",
                    size(2), " heads of ", size(0), ", must be f32 in ", shape_.query_heads, " heads of ",
                    shape_.head_dim);
    detail::require(size(1) * size(3) == batch.tokens.size(), "observer: libllama computes ",
                    size(1) * size(3), " tokens where ", batch.tokens.size(),
                    " were expected: decode one sequence a batch");
    if (attention->fused) {
      note_fused(node, attention->layer);
    }
    return true;
  }

  bool take(const ggml_tensor& node) {
    const auto attention = detail::attention_node(node);
    const detail::MicroBatch& batch = micro_batches_.at(current_);
    if (attention->layer == 0) {
      check_positions(batch);
    }
    const ggml_tensor& q = *attention->queries;
    const auto per_stream = static_cast<std::size_t>(q.ne[1]);
    for (std::size_t first = 0; first < batch.tokens.size(); first += per_stream) {
      take_stream(q, attention->layer, first / per_stream,
                  std::span(batch.tokens).subspan(first, per_stream));
    }
    return true;
  }

  /// Queries of a stream's tokens that are wanted: read from the first to the last in one go.
  void take_stream(const ggml_tensor& q, std::size_t layer, std::size_t stream,
                   std::span<const detail::BatchToken> tokens) {
    const auto wanted = [](const detail::BatchToken& token) { return !token.wanted_by.empty(); };
    const auto first = std::ranges::find_if(tokens, wanted);
    if (first == tokens.end()) {
      return;
    }
    const auto skipped = static_cast<std::size_t>(first - tokens.begin());
    const std::size_t row = q.nb[1] / sizeof(float);
    const std::size_t head = q.nb[2] / sizeof(float);
    const std::size_t count = tokens.size() - skipped;
    buffer_.resize((count - 1) * row + (shape_.query_heads - 1) * head + shape_.head_dim);
    ggml_backend_tensor_get(&q, buffer_.data(), stream * q.nb[3] + skipped * q.nb[1],
                            buffer_.size() * sizeof(float));
    for (std::size_t i = 0; i < count; ++i) {
      const detail::BatchToken& token = tokens[skipped + i];
      for (const llama_seq_id sequence : token.wanted_by) {
        Watched& watched = watch({context_, sequence})[layer];
        if (watched.next != token.position) {
          watched.queries.clear();
        }
        watched.queries.append(buffer_.data() + i * row, 1,
                               QueryStrides{.head = head, .query = shape_.head_dim});
        watched.next = token.position + 1;
      }
    }
  }

  std::vector<Watched>& watch(const Place& place) {
    const auto found = watched_.find(key(place));
    if (found != watched_.end()) {
      return found->second;
    }
    const QueryShape shape{
        .query_heads = shape_.query_heads, .queries = window_, .head_dim = shape_.head_dim};
    return watched_
        .emplace(key(place), std::vector<Watched>(shape_.layers, Watched{RecentQueries<float>(shape)}))
        .first->second;
  }

  /// The graph's own positions tell whether its tokens are in the order that is expected.
  void check_positions(const detail::MicroBatch& batch) {
    if (positions_ == nullptr || positions_->type != GGML_TYPE_I32 ||
        static_cast<std::size_t>(positions_->ne[0]) != batch.tokens.size()) {
      return;
    }
    graph_positions_.resize(batch.tokens.size());
    ggml_backend_tensor_get(positions_, graph_positions_.data(), 0,
                            graph_positions_.size() * sizeof(std::int32_t));
    for (std::size_t i = 0; i < batch.tokens.size(); ++i) {
      detail::require(static_cast<std::size_t>(graph_positions_[i]) == batch.tokens[i].position,
                      "observer: token ", i, " of a micro-batch has position ", graph_positions_[i],
                      " where ", batch.tokens[i].position,
                      " was expected: libllama orders tokens otherwise; decode one sequence a batch");
    }
  }

  void note_fused(const ggml_tensor& node, std::size_t layer) {
    check_bias(detail::float_parameter(node, 1));
    layers_[layer].scale = detail::float_parameter(node, 0);
    layers_[layer].soft_cap = detail::float_parameter(node, 2);
    note_sinks(node.src[4], layer);
  }

  void note_soft_max(const ggml_tensor& node) {
    const auto layer = detail::number_after(node.name, "kq_soft_max-");
    if (!layer || *layer >= layers_.size() || !micro_batches_.at(current_).wanted()) {
      return;
    }
    check_bias(detail::float_parameter(node, 1));
    const ggml_tensor* logits = node.src[0];
    detail::require(logits != nullptr && logits->op == GGML_OP_MUL_MAT, "observer: the logits of layer ",
                    *layer, " are changed before the softmax (soft cap, bias): turn flash attention on");
    layers_[*layer].scale = detail::float_parameter(node, 0);
    note_sinks(node.src[2], *layer);
  }

  static void check_bias(float max_bias) {
    detail::require(max_bias == 0.0F, "observer: the model has ALiBi, max_bias ", max_bias,
                    ": positions after compression would be others; it is not compressed here");
  }

  void note_sinks(const ggml_tensor* sinks, std::size_t layer) {
    if (sinks == nullptr || !layers_[layer].sinks.empty()) {
      return;
    }
    detail::require(
        sinks->type == GGML_TYPE_F32 && static_cast<std::size_t>(sinks->ne[0]) == shape_.query_heads,
        "observer: sinks of layer ", layer, " are not one float a query head");
    std::vector<float> values(shape_.query_heads);
    ggml_backend_tensor_get(sinks, values.data(), 0, values.size() * sizeof(float));
    layers_[layer].sinks = std::move(values);
  }

  ModelShape shape_;
  std::size_t window_;
  std::vector<Attention> layers_;
  detail::GlobalLayers global_layers_;
  std::map<Key, std::vector<Watched>> watched_;  // [layer]
  // The batch that is being decoded.
  llama_context* context_ = nullptr;
  detail::MicroBatches micro_batches_;
  std::ptrdiff_t current_ = -1;
  const ggml_tensor* positions_ = nullptr;
  std::vector<float> buffer_;
  std::vector<std::int32_t> graph_positions_;
  std::string failure_;
};

}  // namespace compresskv::llama_cpp
