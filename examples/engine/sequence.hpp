// One sequence being generated: its cache, and the forward pass over a model's weights.
//
//   Sequence sequence{model, {.kv_type = KvType::f32}};
//   auto logits = sequence.prefill(prompt, {.window = 8, .on_layer = compress_and_shrink});
//   for (position = next_position; ...; ++position) logits = sequence.decode(token, position);
//   logits = sequence.prefill(next_turn, ...);
//
// Prefill goes layer by layer over all tokens that it is given: the prompt, the next chunk of a long one, or
// what the user says next. A layer's cache is complete when `on_layer` sees it, and what the callback gives
// up is freed before the next layer starts: one layer at a time holds more than is kept.
#pragma once

#include <chrono>
#include <compare>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "kv_cache.hpp"
#include "model.hpp"

namespace engine {

/// A layer at the end of its prefill, as `PrefillOptions::on_layer` sees it: the rows that it held before and
/// those of the tokens just read. Valid during the callback alone.
class LayerView {
 public:
  int layer = 0;
  KvType type = KvType::f32;
  int heads = 0;  ///< query heads
  int kv_heads = 0;
  int head_dim = 0;
  std::size_t rows = 0;            ///< of the longest KV head; row == position where nothing was evicted
  std::size_t allocated_rows = 0;  ///< rows from one KV head to the next
  /// [kv_heads]: rows of each, where an eviction left them unlike.
  std::span<const std::size_t> head_rows;
  std::size_t window = 0;          ///< queries per head: min(PrefillOptions::window, tokens just read)
  const float* queries = nullptr;  ///< [heads][window][head_dim], post-RoPE, of the last tokens read
  /// [window], of the same tokens: the length of the hidden state that attention was given, after its norm.
  const float* hidden_norms = nullptr;

  /// [kv_heads][allocated_rows][head_dim], post-RoPE; T must be the element type of `type`.
  template <typename T>
  T* keys() const {
    return cache_->keys<T>(0);
  }
  template <typename T>
  T* values() const {
    return cache_->values<T>(0);
  }

  /// The callback has moved the rows it keeps to the front: every KV head holds `rows_kept` now. The layer's
  /// memory is cut to that when the callback returns. Throws Error for more rows than there are.
  void shrink(std::size_t rows_kept);
  /// The same with one length per KV head, [kv_heads].
  void shrink(std::span<const std::size_t> rows_kept);

  /// A copy of the layer's cache, to be compressed instead of it: from here on every decode step runs this
  /// layer's attention on both and tells `Hooks::shadow`; the hidden state that goes on is that of the cache
  /// itself. The first call makes the copy. No more than decoding may follow: neither prefill nor truncate.
  LayerView& shadow();

  /// A layer before this one, of which more is to go now that this one has come (CAKE's budgets): it may be
  /// shrunk again, and is cut when this layer's callback returns. Queries are not kept, so `window` is 0.
  /// Throws Error for a layer that has not come yet, and where KV heads hold different numbers of rows.
  LayerView& earlier(int earlier_layer);

 private:
  friend class Sequence;
  LayerView(int layer_index, LayerCache& cache, int query_heads);

  LayerCache* cache_ = nullptr;
  std::vector<std::size_t> kept_;                    // empty: all
  std::span<LayerCache> before_;                     // the caches of the layers before this one
  std::span<std::optional<LayerCache>> shadows_;     // of all layers
  std::vector<std::unique_ptr<LayerView>> earlier_;  // [layer], those asked for
  std::unique_ptr<LayerView> shadow_;
  std::optional<LayerCache> shadow_cache_;
};

struct PrefillOptions {
  std::size_t window = 8;                    ///< queries kept for `LayerView::queries`
  std::function<void(LayerView&)> on_layer;  ///< after each layer; may throw to stop
  /// Asked for: the logits of all positions read, a tile at a time, ascending: [tokens][vocabulary] from
  /// position `first` on.
  std::function<void(std::size_t first, const Matrix& logits)> on_logits;
};

/// What a caller may watch; each costs time only where it is set.
struct Hooks {
  /// Softmax row of one query head over the rows of its KV head (row == position where nothing was evicted).
  /// Called for the last token that a prefill reads (its query produces the next token), before on_layer, and
  /// for each decoded token, in order of layer and head.
  std::function<void(int layer, int head, std::span<const float> row)> attention;
  /// At each decode step: the layer's queries of the token fed, [heads][head_dim], post-RoPE.
  std::function<void(int layer, std::span<const float> queries)> queries;
  /// At each decode step, for layers with a shadow: the attention block's output after the output projection,
  /// [embedding], from the layer's cache and from its shadow.
  std::function<void(int layer, std::span<const float> full, std::span<const float> shadow)> shadow;
};

/// A query head of a layer.
struct HeadIndex {
  int layer = 0;
  int head = 0;

  auto operator<=>(const HeadIndex&) const = default;
};

struct SequenceOptions {
  KvType kv_type = KvType::f32;
  /// Heads whose attention output is zero, as if their columns of the output projection were: what a model is
  /// without them. Hooks still see their attention.
  std::vector<HeadIndex> masked_heads = {};
};

class Sequence;

/// One step of one sequence: feed `token` at its true position. Position, not row: rows may have been
/// evicted.
struct DecodeStep {
  Sequence* sequence = nullptr;
  TokenId token = 0;
  std::size_t position = 0;
};

/// Advances several sequences of one model with one pass over the weights. Each sequence's logits() are then
/// those of its token, bit for bit what decoding it alone gives. Throws Error before anything changes: no
/// steps, a null or repeated sequence, different models, a token out of the vocabulary, a position out of the
/// context, no prefill. Where a hook throws, the step is half done and its sequences are of no more use.
void decode_batch(std::span<const DecodeStep> steps);

/// Movable; the model must outlive it. Not for use by two threads at once.
class Sequence {
 public:
  /// Throws Error where a masked head does not exist.
  explicit Sequence(const Model& model, SequenceOptions options = {});

  /// Reads a prompt, or what follows: the next chunk of it, the next turn of a conversation. The tokens stand
  /// at positions next_position(), +1, ... and see all rows held and, causally, one another. Returns the last
  /// token's logits, [vocabulary], valid until the next call.
  ///
  /// A prompt read in chunks gives the same bits as in one go, as long as nothing is evicted in between.
  ///
  /// Throws Error before anything changes: no tokens, more than the context holds (with both numbers), a
  /// token out of the vocabulary, a layer that has a shadow. Where a callback throws, layers may have been
  /// compressed already, and the whole sequence is empty again.
  std::span<const float> prefill(std::span<const TokenId> tokens, const PrefillOptions& options = {});

  /// Feeds one token at its true position; returns the logits that follow it. See decode_batch.
  std::span<const float> decode(TokenId token, std::size_t position);

  /// Takes back the tokens from `position` on, such as rejected speculative ones: their rows go, the sequence
  /// goes on at `position`, and what is fed there gives the bits that it would have given without them.
  /// logits() stay those of the last token fed. The memory is kept as room.
  ///
  /// Only for tokens fed since a layer was last shrunk, whose rows are the last of every KV head. Throws
  /// Error for positions before them, for 0, for one ahead of next_position(), and where a layer has a
  /// shadow.
  void truncate(std::size_t position);

  /// The same for any position. `rows_left(layer, kv_head)` says how many rows, the first ones, stay: those
  /// at positions before `position`: what `compressor.truncate(position)` returns says it,
  /// `held.rows(layer, kv_head)`. Throws
  /// Error before anything changes, for more rows than a KV head holds too.
  void truncate(std::size_t position, const std::function<std::size_t(int layer, int kv_head)>& rows_left);

  /// A deep copy, cache included: several continuations of one prompt. Hooks are not copied.
  Sequence clone() const;

  /// The same, layer by layer: `on_layer` sees each copied layer as prefill shows it, but without queries,
  /// and what it gives up is freed before the next one is copied. So one prefill serves many ways to
  /// compress. Throws Error where a layer has a shadow.
  Sequence clone(const std::function<void(LayerView&)>& on_layer) const;

  /// Takes up where another sequence stood whose caches were written down: `caches` has one a layer, and the
  /// sequence goes on at `next_position`. What is fed next gives the bits that it would have given there.
  /// There are no logits before. Throws Error, and changes nothing, where the caches are not of this model
  /// and element type, or the position is 0 or beyond the context.
  void restore(std::vector<LayerCache> caches, std::size_t next_position);

  /// Shows every layer again, as prefill does but without queries, so that a cache may shrink while an answer
  /// grows long; what each layer gives up is freed before the next one is shown. Throws Error where there is
  /// no prefill or a layer has a shadow. Where `on_layer` throws, the whole sequence is empty again.
  void revisit(const std::function<void(LayerView&)>& on_layer);

  std::span<const float> logits() const { return {logits_.data(), static_cast<std::size_t>(logits_.size())}; }
  Hooks& hooks() { return hooks_; }
  const Model& model() const { return *model_; }
  KvType kv_type() const { return options_.kv_type; }
  /// One after the last token fed; 0 for an empty sequence.
  std::size_t next_position() const { return next_position_; }

  const LayerCache& cache(int layer) const { return caches_[static_cast<std::size_t>(layer)]; }
  std::size_t rows(int layer, int kv_head) const { return cache(layer).rows(kv_head); }

  /// Bytes of cache allocated now (shadows not counted), the most since construction, and the most up to the
  /// end of the last prefill. Allocations are exact at the end of a prefill: the sum of all layers' rows.
  std::size_t cache_bytes() const { return meter_.current; }
  std::size_t peak_cache_bytes() const { return meter_.peak; }
  std::size_t prefill_peak_cache_bytes() const { return prefill_peak_; }
  /// Time that prefill took to cut layers to what `LayerView::shrink` asked for.
  std::chrono::duration<double, std::milli> shrink_time() const { return shrink_time_; }

  /// Bytes of cache that `tokens` tokens take in all layers when nothing is evicted.
  static std::size_t full_cache_bytes(const ModelConfig& config, KvType type, std::size_t tokens);

  /// Room for `tokens` more tokens in every layer, so that decoding need not grow the cache; a prefill gives
  /// back what is left of it. Optional.
  void reserve(std::size_t tokens);

 private:
  friend void decode_batch(std::span<const DecodeStep> steps);

  void run_prefill(std::span<const TokenId> tokens, const PrefillOptions& options);
  bool show_layer(int layer, std::size_t window, const float* queries, const float* hidden_norms,
                  const std::function<void(LayerView&)>& on_layer);
  void show_last_attention(int layer, std::span<const float> query) const;
  void mask_heads(int layer, std::span<float> attention) const;
  void check_truncate(std::size_t position) const;
  void check_no_shadow(const char* what) const;
  void clear();

  const Model* model_;
  SequenceOptions options_;
  Hooks hooks_;
  CacheMeter meter_;
  CacheMeter shadow_meter_;
  std::vector<LayerCache> caches_;                  // [layers]
  std::vector<std::optional<LayerCache>> shadows_;  // [layers]
  std::size_t next_position_ = 0;
  std::size_t contiguous_from_ = 0;  // rows of positions from here on are the last of every KV head
  std::size_t prefill_peak_ = 0;
  std::chrono::duration<double, std::milli> shrink_time_{};
  Vector logits_;  // [vocabulary]
};

}  // namespace engine
