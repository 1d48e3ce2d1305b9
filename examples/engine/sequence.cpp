#include "sequence.hpp"

#include <fmt/core.h>

#include <algorithm>
#include <chrono>
#include <initializer_list>
#include <utility>

#include "attention.hpp"
#include "block.hpp"
#include "error.hpp"
#include "gemm.hpp"

namespace engine {
namespace {

using Index = Eigen::Index;

// Pieces of work for the threads.
constexpr Index token_tile = 128;   // tokens, in prefill
constexpr Index output_tile = 64;   // outputs of a weight matrix, in decode
constexpr Index logits_tile = 128;  // tokens a call of on_logits
constexpr std::size_t growth = 64;  // rows that a full cache grows by in decode

Index tiles(Index count, Index tile) { return (count + tile - 1) / tile; }

std::span<const float> row_of(const Matrix& m, Index r) {
  return {m.data() + r * m.cols(), static_cast<std::size_t>(m.cols())};
}
std::span<float> row_of(Matrix& m, Index r) {
  return {m.data() + r * m.cols(), static_cast<std::size_t>(m.cols())};
}

ConstRows rows_from(const Matrix& m, Index first) { return {m.data() + first * m.cols(), m.cols()}; }
Rows rows_from(Matrix& m, Index first) { return {m.data() + first * m.cols(), m.cols()}; }

void embed(const Model& model, TokenId token, std::span<float> out) {
  for (std::size_t i = 0; i < out.size(); ++i) out[i] = model.embedding()(token, static_cast<Index>(i));
}

void check_token(const Model& model, TokenId token) {
  if (token < 0 || token >= model.config().vocabulary) {
    throw Error(
        fmt::format("token id {} is outside the vocabulary, 0 to {}", token, model.config().vocabulary - 1));
  }
}

// One product of a decode step: out = in * weights^T, one row a sequence.
struct Product {
  const Matrix& in;
  const PackedMatrix& weights;
  Matrix& out;
};

// Independent products in one loop over pieces of their weights, each read once for all sequences.
void multiply_all(std::initializer_list<Product> products, ThreadPool& pool) {
  Index pieces = 0;
  for (const Product& product : products) {
    product.out.resize(product.in.rows(), product.weights.outputs());
    pieces += tiles(product.weights.outputs(), output_tile);
  }
  pool.parallel_for(static_cast<std::size_t>(pieces), [&](std::size_t piece) {
    auto tile = static_cast<Index>(piece);
    for (const Product& product : products) {
      const PackedMatrix& weights = product.weights;
      if (const Index own = tiles(weights.outputs(), output_tile); tile >= own) {
        tile -= own;
        continue;
      }
      const Index first = tile * output_tile;
      const Range outputs{first, std::min(output_tile, weights.outputs() - first)};
      multiply(rows_from(product.in, 0), product.in.rows(), weights, outputs, {0, weights.inputs()}, false,
               {product.out.data() + first, product.out.cols()});
      return;
    }
  });
}

void norm_rows(const Matrix& in, const Vector& weight, float epsilon, Matrix& out) {
  out.resize(in.rows(), in.cols());
  for (Index r = 0; r < in.rows(); ++r) rms_norm(row_of(in, r), weight, epsilon, row_of(out, r));
}

}  // namespace

LayerView::LayerView(int layer_index, LayerCache& cache, int query_heads)
    : layer{layer_index},
      type{cache.type()},
      heads{query_heads},
      kv_heads{cache.kv_heads()},
      head_dim{cache.head_dim()},
      rows{std::ranges::max(cache.rows())},
      allocated_rows{cache.allocated_rows(0)},
      head_rows{cache.rows()},
      cache_{&cache} {}

void LayerView::shrink(std::size_t rows_kept) {
  shrink(std::vector<std::size_t>(static_cast<std::size_t>(kv_heads), rows_kept));
}

void LayerView::shrink(std::span<const std::size_t> rows_kept) {
  if (rows_kept.size() != static_cast<std::size_t>(kv_heads)) {
    throw Error(fmt::format("layer {}: {} lengths for {} KV heads; give one each", layer, rows_kept.size(),
                            kv_heads));
  }
  for (std::size_t h = 0; h < rows_kept.size(); ++h) {
    if (rows_kept[h] > head_rows[h]) {
      throw Error(fmt::format("layer {}: KV head {} cannot keep {} rows of {}", layer, h, rows_kept[h],
                              head_rows[h]));
    }
  }
  kept_.assign(rows_kept.begin(), rows_kept.end());
}

LayerView& LayerView::shadow() {
  if (!shadow_) {
    shadow_cache_.emplace(*cache_);
    shadow_.reset(new LayerView{layer, *shadow_cache_, heads});
    shadow_->window = window;
    shadow_->queries = queries;
    shadow_->hidden_norms = hidden_norms;
    shadow_->shadows_ = shadows_;
  }
  return *shadow_;
}

LayerView& LayerView::earlier(int earlier_layer) {
  if (earlier_layer < 0 || earlier_layer >= layer) {
    throw Error(fmt::format("layer {}: layer {} has not come before it", layer, earlier_layer));
  }
  const auto l = static_cast<std::size_t>(earlier_layer);
  if (before_.empty() && !shadows_[l]) {
    throw Error(fmt::format("layer {}: layer {} before it has no shadow", layer, earlier_layer));
  }
  LayerCache& cache = before_.empty() ? *shadows_[l] : before_[l];
  if (std::ranges::min(cache.rows()) != std::ranges::max(cache.rows())) {
    throw Error(
        fmt::format("layer {}: the KV heads of layer {} hold different numbers of rows, so that they do not "
                    "lie at one distance",
                    layer, earlier_layer));
  }
  earlier_.resize(static_cast<std::size_t>(layer));
  if (!earlier_[l]) earlier_[l].reset(new LayerView{earlier_layer, cache, heads});
  return *earlier_[l];
}

Sequence::Sequence(const Model& model, SequenceOptions options)
    : model_{&model}, options_{std::move(options)} {
  const ModelConfig& c = model.config();
  for (const auto& [layer, head] : options_.masked_heads) {
    if (layer < 0 || layer >= c.layers || head < 0 || head >= c.heads) {
      throw Error(
          fmt::format("masked_heads names layer {} head {}, the model has layers 0 to {} of heads 0 to {}",
                      layer, head, c.layers - 1, c.heads - 1));
    }
  }
  clear();
}

void Sequence::clear() {
  const ModelConfig& c = model_->config();
  caches_.assign(static_cast<std::size_t>(c.layers), LayerCache{options_.kv_type, c.kv_heads, c.head_dim});
  shadows_.assign(static_cast<std::size_t>(c.layers), std::nullopt);
  meter_ = {};
  shadow_meter_ = {};
  next_position_ = 0;
  contiguous_from_ = 0;
  prefill_peak_ = 0;
  shrink_time_ = {};
  logits_.resize(0);
}

std::size_t Sequence::full_cache_bytes(const ModelConfig& config, KvType type, std::size_t tokens) {
  return tokens * config.kv_elements_per_token() * kv_element_bytes(type);
}

void Sequence::reserve(std::size_t tokens) {
  for (LayerCache& cache : caches_) cache.reserve(tokens, meter_);
}

Sequence Sequence::clone() const {
  Sequence copy{*model_, options_};
  copy.meter_ = meter_;
  copy.shadow_meter_ = shadow_meter_;
  copy.caches_ = caches_;
  copy.shadows_ = shadows_;
  copy.next_position_ = next_position_;
  copy.contiguous_from_ = contiguous_from_;
  copy.prefill_peak_ = prefill_peak_;
  copy.shrink_time_ = shrink_time_;
  copy.logits_ = logits_;
  return copy;
}

Sequence Sequence::clone(const std::function<void(LayerView&)>& on_layer) const {
  check_no_shadow("clone");
  Sequence copy{*model_, options_};
  copy.next_position_ = next_position_;
  copy.contiguous_from_ = contiguous_from_;
  copy.logits_ = logits_;
  for (std::size_t l = 0; l < caches_.size(); ++l) {
    copy.caches_[l] = caches_[l];
    copy.meter_.change(0, caches_[l].bytes());
    if (copy.show_layer(static_cast<int>(l), 0, nullptr, nullptr, on_layer))
      copy.contiguous_from_ = next_position_;
    copy.caches_[l].fit(copy.meter_);
  }
  copy.prefill_peak_ = copy.meter_.peak;
  return copy;
}

void Sequence::restore(std::vector<LayerCache> caches, std::size_t next_position) {
  const ModelConfig& c = model_->config();
  if (caches.size() != static_cast<std::size_t>(c.layers)) {
    throw Error(
        fmt::format("restore: there are {} caches for {} layers; give one each", caches.size(), c.layers));
  }
  for (std::size_t l = 0; l < caches.size(); ++l) {
    const LayerCache& cache = caches[l];
    if (cache.type() != options_.kv_type || cache.kv_heads() != c.kv_heads ||
        cache.head_dim() != c.head_dim) {
      throw Error(fmt::format(
          "restore: the cache of layer {} has {} KV heads of {} elements of {}, the sequence {} of {} of {}",
          l, cache.kv_heads(), cache.head_dim(), kv_type_name(cache.type()), c.kv_heads, c.head_dim,
          kv_type_name(options_.kv_type)));
    }
  }
  if (next_position == 0 || next_position > c.context) {
    throw Error(fmt::format("restore: next_position is {}, must be from 1 to the model's context of {}",
                            next_position, c.context));
  }
  clear();
  caches_ = std::move(caches);
  for (const LayerCache& cache : caches_) meter_.change(0, cache.bytes());
  next_position_ = next_position;
  contiguous_from_ = next_position;
  prefill_peak_ = meter_.peak;
}

void Sequence::revisit(const std::function<void(LayerView&)>& on_layer) {
  if (next_position_ == 0) throw Error("revisit: the sequence is empty; call prefill first");
  check_no_shadow("revisit");
  try {
    for (int l = 0; l < model_->config().layers; ++l) {
      if (show_layer(l, 0, nullptr, nullptr, on_layer)) contiguous_from_ = next_position_;
      caches_[static_cast<std::size_t>(l)].fit(meter_);
    }
  } catch (...) {
    clear();
    throw;
  }
}

std::span<const float> Sequence::prefill(std::span<const TokenId> tokens, const PrefillOptions& options) {
  const ModelConfig& c = model_->config();
  if (tokens.empty()) throw Error("prefill: there are no tokens; give at least one");
  if (next_position_ + tokens.size() > c.context) {
    throw Error(
        fmt::format("prefill: the sequence would have {} tokens, but the model's context holds {}; "
                    "shorten the prompt",
                    next_position_ + tokens.size(), c.context));
  }
  for (const TokenId token : tokens) check_token(*model_, token);
  check_no_shadow("prefill");
  try {
    run_prefill(tokens, options);
  } catch (...) {
    clear();
    throw;
  }
  return logits();
}

void Sequence::run_prefill(std::span<const TokenId> tokens, const PrefillOptions& options) {
  const Model& model = *model_;
  const ModelConfig& c = model.config();
  ThreadPool& pool = model.pool();
  const auto count = static_cast<Index>(tokens.size());
  const Index head_dim = c.head_dim;
  const auto head_size = static_cast<std::size_t>(head_dim);

  Matrix hidden(count, c.embedding);
  std::vector<Rotation> rotations;
  rotations.reserve(tokens.size());
  for (Index t = 0; t < count; ++t) {
    embed(model, tokens[static_cast<std::size_t>(t)], row_of(hidden, t));
    rotations.emplace_back(model, next_position_ + static_cast<std::size_t>(t));
  }
  const auto for_token_tiles = [&](const auto& task) {
    pool.parallel_for(static_cast<std::size_t>(tiles(count, token_tile)), [&](std::size_t tile) {
      const Index first = static_cast<Index>(tile) * token_tile;
      task(first, std::min(token_tile, count - first));
    });
  };
  const auto norm_tile = [&](Index first, Index rows, const Vector& weight) {
    Matrix normed(rows, c.embedding);
    for (Index t = 0; t < rows; ++t)
      rms_norm(row_of(hidden, first + t), weight, c.rms_epsilon, row_of(normed, t));
    return normed;
  };

  const auto window = static_cast<Index>(std::min(options.window, tokens.size()));
  std::vector<float> window_queries(static_cast<std::size_t>(c.heads * window * head_dim));
  std::vector<float> hidden_norms(tokens.size());
  Matrix queries(count, c.heads * head_dim);
  Matrix attention;
  bool shrunk = false;

  for (int l = 0; l < c.layers; ++l) {
    const LayerWeights& weights = model.layers()[static_cast<std::size_t>(l)];
    LayerCache& cache = caches_[static_cast<std::size_t>(l)];
    cache.extend(tokens.size(), meter_);

    for_token_tiles([&](Index first, Index rows) {
      const Matrix normed = norm_tile(first, rows, weights.attention_norm);
      Matrix keys(rows, c.kv_heads * head_dim);
      Matrix values(rows, c.kv_heads * head_dim);
      multiply(rows_from(normed, 0), rows, weights.query, false, rows_from(queries, first));
      multiply(rows_from(normed, 0), rows, weights.key, false, rows_from(keys, 0));
      multiply(rows_from(normed, 0), rows, weights.value, false, rows_from(values, 0));
      for (Index t = 0; t < rows; ++t) {
        hidden_norms[static_cast<std::size_t>(first + t)] = length(row_of(normed, t));
        const Rotation& rotation = rotations[static_cast<std::size_t>(first + t)];
        rotation.apply(row_of(queries, first + t), head_size);
        rotation.apply(row_of(keys, t), head_size);
        for (int h = 0; h < c.kv_heads; ++h) {
          const std::size_t at = static_cast<std::size_t>(h) * head_size;
          const std::size_t row = cache.rows(h) - tokens.size() + static_cast<std::size_t>(first + t);
          cache.write(h, row, row_of(keys, t).subspan(at, head_size),
                      row_of(values, t).subspan(at, head_size));
        }
      }
    });

    prefill_attention(cache, queries, pool, attention);
    if (!options_.masked_heads.empty()) {
      for (Index t = 0; t < count; ++t) mask_heads(l, row_of(attention, t));
    }
    if (hooks_.attention) show_last_attention(l, row_of(queries, count - 1));

    if (options.on_layer) {
      for (int h = 0; h < c.heads; ++h) {
        Eigen::Map<Matrix>{window_queries.data() + h * window * head_dim, window, head_dim} =
            queries.block(count - window, h * head_dim, window, head_dim);
      }
      shrunk = show_layer(l, static_cast<std::size_t>(window), window_queries.data(),
                          hidden_norms.data() + (count - window), options.on_layer) ||
               shrunk;
    }
    const auto start = std::chrono::steady_clock::now();
    cache.fit(meter_);
    shrink_time_ += std::chrono::steady_clock::now() - start;

    for_token_tiles([&](Index first, Index rows) {
      multiply(rows_from(attention, first), rows, weights.output, true, rows_from(hidden, first));
      const Matrix normed = norm_tile(first, rows, weights.feed_forward_norm);
      Matrix gate(rows, c.feed_forward);
      Matrix up(rows, c.feed_forward);
      multiply(rows_from(normed, 0), rows, weights.gate, false, rows_from(gate, 0));
      multiply(rows_from(normed, 0), rows, weights.up, false, rows_from(up, 0));
      for (Index t = 0; t < rows; ++t) swiglu(row_of(gate, t), row_of(up, t));
      multiply(rows_from(gate, 0), rows, weights.down, true, rows_from(hidden, first));
    });
  }

  const auto logits_of = [&](Index first, Index rows) {
    const Matrix normed = norm_tile(first, rows, model.output_norm());
    Matrix logits;
    multiply_all({{normed, model.output(), logits}}, pool);
    return logits;
  };
  if (options.on_logits) {
    for (Index first = 0; first < count; first += logits_tile) {
      options.on_logits(next_position_ + static_cast<std::size_t>(first),
                        logits_of(first, std::min(logits_tile, count - first)));
    }
  }
  logits_ = logits_of(count - 1, 1).transpose();
  next_position_ += tokens.size();
  if (shrunk) contiguous_from_ = next_position_;
  prefill_peak_ = meter_.peak;
}

// Shows a layer and takes from it, and from those before it, what the callback gave up; whether it did.
bool Sequence::show_layer(int layer, std::size_t window, const float* queries, const float* hidden_norms,
                          const std::function<void(LayerView&)>& on_layer) {
  const auto l = static_cast<std::size_t>(layer);
  LayerView view{layer, caches_[l], model_->config().heads};
  view.window = window;
  view.queries = queries;
  view.hidden_norms = hidden_norms;
  view.before_ = std::span(caches_).first(l);
  view.shadows_ = shadows_;
  on_layer(view);
  bool shrunk = !view.kept_.empty();
  if (shrunk) caches_[l].truncate(view.kept_);
  const auto start = std::chrono::steady_clock::now();
  const auto cut = [](LayerCache& cache, const LayerView& shown, CacheMeter& meter) {
    if (shown.kept_.empty()) return false;
    cache.truncate(shown.kept_);
    cache.fit(meter);
    return true;
  };
  for (const std::unique_ptr<LayerView>& earlier : view.earlier_) {
    if (earlier && cut(caches_[static_cast<std::size_t>(earlier->layer)], *earlier, meter_)) shrunk = true;
  }
  shrink_time_ += std::chrono::steady_clock::now() - start;
  if (view.shadow_) {
    for (const std::unique_ptr<LayerView>& earlier : view.shadow_->earlier_) {
      if (earlier) cut(*shadows_[static_cast<std::size_t>(earlier->layer)], *earlier, shadow_meter_);
    }
    if (!view.shadow_->kept_.empty()) view.shadow_cache_->truncate(view.shadow_->kept_);
    view.shadow_cache_->fit(shadow_meter_);
    shadows_[l] = std::move(view.shadow_cache_);
  }
  return shrunk;
}

void Sequence::check_no_shadow(const char* what) const {
  for (std::size_t l = 0; l < shadows_.size(); ++l) {
    if (shadows_[l]) {
      throw Error(
          fmt::format("{}: layer {} has a shadow, after which tokens can only be decoded; use a "
                      "sequence without",
                      what, l));
    }
  }
}

void Sequence::check_truncate(std::size_t position) const {
  if (position == 0) throw Error("truncate: position is 0, nothing would be left; use a new sequence");
  if (position > next_position_) {
    throw Error(fmt::format("truncate: position {} lies ahead, the sequence has {} tokens; give at most that",
                            position, next_position_));
  }
  check_no_shadow("truncate");
}

void Sequence::truncate(std::size_t position) {
  check_truncate(position);
  if (position < contiguous_from_) {
    throw Error(
        fmt::format("truncate: position {} lies before {}, where the cache was last shrunk; say how "
                    "many rows are left of each KV head",
                    position, contiguous_from_));
  }
  const std::size_t taken = next_position_ - position;
  truncate(position, [&](int layer, int kv_head) { return rows(layer, kv_head) - taken; });
}

void Sequence::truncate(std::size_t position,
                        const std::function<std::size_t(int layer, int kv_head)>& rows_left) {
  check_truncate(position);
  std::vector<std::vector<std::size_t>> left(caches_.size());
  for (std::size_t l = 0; l < left.size(); ++l) {
    for (int h = 0; h < caches_[l].kv_heads(); ++h) {
      left[l].push_back(rows_left(static_cast<int>(l), h));
      if (left[l].back() > caches_[l].rows(h)) {
        throw Error(fmt::format("truncate: layer {}, KV head {}: {} rows cannot be left of {}", l, h,
                                left[l].back(), caches_[l].rows(h)));
      }
    }
  }
  for (std::size_t l = 0; l < left.size(); ++l) caches_[l].truncate(left[l]);
  next_position_ = position;
  contiguous_from_ = std::min(contiguous_from_, position);
}

void Sequence::show_last_attention(int layer, std::span<const float> query) const {
  const ModelConfig& c = model_->config();
  const auto head_size = static_cast<std::size_t>(c.head_dim);
  std::vector<float> row;
  std::vector<float> out(head_size);
  for (int h = 0; h < c.heads; ++h) {
    const std::span<const float> head = query.subspan(static_cast<std::size_t>(h) * head_size, head_size);
    decode_attention(cache(layer), h / c.group(), head, row, out);
    hooks_.attention(layer, h, row);
  }
}

// Zeros in place of what the layer's masked heads draw from the cache, [heads * head_dim].
void Sequence::mask_heads(int layer, std::span<float> attention) const {
  const auto head_size = static_cast<std::size_t>(model_->config().head_dim);
  for (const HeadIndex& masked : options_.masked_heads) {
    if (masked.layer != layer) continue;
    std::ranges::fill(attention.subspan(static_cast<std::size_t>(masked.head) * head_size, head_size), 0.0F);
  }
}

std::span<const float> Sequence::decode(TokenId token, std::size_t position) {
  const DecodeStep step{.sequence = this, .token = token, .position = position};
  decode_batch({&step, 1});
  return logits();
}

void decode_batch(std::span<const DecodeStep> steps) {
  if (steps.empty()) throw Error("decode: no sequences; give at least one step");
  for (std::size_t b = 0; b < steps.size(); ++b) {
    const Sequence* sequence = steps[b].sequence;
    if (sequence == nullptr) throw Error(fmt::format("decode: step {} has no sequence", b));
    if (sequence->model_ != steps[0].sequence->model_) {
      throw Error(
          fmt::format("decode: step {} is of another model than step 0; batch sequences of one model", b));
    }
    for (std::size_t other = 0; other < b; ++other) {
      if (steps[other].sequence == sequence) {
        throw Error(fmt::format(
            "decode: steps {} and {} are of the same sequence; it can take one step at a time", other, b));
      }
    }
    if (sequence->next_position_ == 0)
      throw Error(fmt::format("decode: step {} has no prompt; call prefill first", b));
    check_token(*sequence->model_, steps[b].token);
    if (steps[b].position >= sequence->model_->config().context) {
      throw Error(fmt::format("decode: position {} does not fit into the model's context of {}",
                              steps[b].position, sequence->model_->config().context));
    }
  }

  const Model& model = *steps[0].sequence->model_;
  const ModelConfig& c = model.config();
  ThreadPool& pool = model.pool();
  const auto head_size = static_cast<std::size_t>(c.head_dim);
  const auto batch = static_cast<Index>(steps.size());

  const auto make_room = [](LayerCache& cache, CacheMeter& meter) {
    for (int h = 0; h < cache.kv_heads(); ++h) {
      if (cache.rows(h) == cache.allocated_rows(h)) {
        cache.reserve(growth, meter);
        return;
      }
    }
  };
  Matrix hidden(batch, c.embedding);
  std::vector<Rotation> rotations;
  for (Index b = 0; b < batch; ++b) {
    const DecodeStep& step = steps[static_cast<std::size_t>(b)];
    for (LayerCache& cache : step.sequence->caches_) make_room(cache, step.sequence->meter_);
    for (std::optional<LayerCache>& shadow : step.sequence->shadows_) {
      if (shadow) make_room(*shadow, step.sequence->shadow_meter_);
    }
    embed(model, step.token, row_of(hidden, b));
    rotations.emplace_back(model, step.position);
  }

  Matrix normed;
  Matrix queries;
  Matrix keys;
  Matrix values;
  Matrix attention(batch, c.heads * c.head_dim);
  Matrix block;
  Matrix shadow_block;
  Matrix gate;
  Matrix up;
  std::vector<std::vector<float>> softmax(
      static_cast<std::size_t>(batch * c.heads));  // a row a sequence and head

  // Attention of every sequence and head over the layer's caches that `cache_of` gives; it may give none.
  const auto attend = [&](int l, const auto& cache_of) {
    pool.parallel_for(softmax.size(), [&](std::size_t unit) {
      const auto b = static_cast<Index>(unit) / c.heads;
      const auto h = static_cast<std::size_t>(static_cast<Index>(unit) % c.heads);
      const LayerCache* cache = cache_of(*steps[static_cast<std::size_t>(b)].sequence);
      if (cache == nullptr) return;
      decode_attention(*cache, static_cast<int>(h) / c.group(),
                       row_of(queries, b).subspan(h * head_size, head_size), softmax[unit],
                       row_of(attention, b).subspan(h * head_size, head_size));
    });
    for (Index b = 0; b < batch; ++b) {
      steps[static_cast<std::size_t>(b)].sequence->mask_heads(l, row_of(attention, b));
    }
  };

  for (int l = 0; l < c.layers; ++l) {
    const auto layer = static_cast<std::size_t>(l);
    const LayerWeights& weights = model.layers()[layer];
    norm_rows(hidden, weights.attention_norm, c.rms_epsilon, normed);
    multiply_all(
        {{normed, weights.query, queries}, {normed, weights.key, keys}, {normed, weights.value, values}},
        pool);

    bool shadowed = false;
    for (Index b = 0; b < batch; ++b) {
      Sequence& sequence = *steps[static_cast<std::size_t>(b)].sequence;
      std::optional<LayerCache>& shadow = sequence.shadows_[layer];
      rotations[static_cast<std::size_t>(b)].apply(row_of(queries, b), head_size);
      rotations[static_cast<std::size_t>(b)].apply(row_of(keys, b), head_size);
      for (int h = 0; h < c.kv_heads; ++h) {
        const std::size_t at = static_cast<std::size_t>(h) * head_size;
        const std::span<const float> key = row_of(keys, b).subspan(at, head_size);
        const std::span<const float> value = row_of(values, b).subspan(at, head_size);
        sequence.caches_[layer].append(h, key, value);
        if (shadow) shadow->append(h, key, value);
      }
      if (sequence.hooks_.queries) sequence.hooks_.queries(l, row_of(queries, b));
      shadowed = shadowed || (shadow && sequence.hooks_.shadow);
    }

    attend(l, [&](const Sequence& sequence) { return &sequence.caches_[layer]; });
    multiply_all({{attention, weights.output, block}}, pool);
    for (Index b = 0; b < batch; ++b) {
      const Hooks& hooks = steps[static_cast<std::size_t>(b)].sequence->hooks_;
      for (int h = 0; hooks.attention && h < c.heads; ++h) {
        hooks.attention(l, h, softmax[static_cast<std::size_t>(b * c.heads + h)]);
      }
    }

    if (shadowed) {
      attend(l, [&](const Sequence& sequence) {
        const std::optional<LayerCache>& shadow = sequence.shadows_[layer];
        return shadow ? &*shadow : nullptr;
      });
      multiply_all({{attention, weights.output, shadow_block}}, pool);
      for (Index b = 0; b < batch; ++b) {
        const Sequence& sequence = *steps[static_cast<std::size_t>(b)].sequence;
        if (!sequence.shadows_[layer] || !sequence.hooks_.shadow) continue;
        sequence.hooks_.shadow(l, row_of(block, b), row_of(shadow_block, b));
      }
    }

    hidden += block;
    norm_rows(hidden, weights.feed_forward_norm, c.rms_epsilon, normed);
    multiply_all({{normed, weights.gate, gate}, {normed, weights.up, up}}, pool);
    for (Index b = 0; b < batch; ++b) swiglu(row_of(gate, b), row_of(up, b));
    multiply_all({{gate, weights.down, block}}, pool);
    hidden += block;
  }

  norm_rows(hidden, model.output_norm(), c.rms_epsilon, normed);
  multiply_all({{normed, model.output(), block}}, pool);
  for (Index b = 0; b < batch; ++b) {
    Sequence& sequence = *steps[static_cast<std::size_t>(b)].sequence;
    sequence.logits_ = block.row(b).transpose();
    const std::size_t position = steps[static_cast<std::size_t>(b)].position;
    if (position != sequence.next_position_) sequence.contiguous_from_ = position;  // keys were re-rotated
    sequence.next_position_ = position + 1;
  }
}

}  // namespace engine
