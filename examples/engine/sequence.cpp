#include "sequence.hpp"

#include <fmt/core.h>
#include <omp.h>

#include <algorithm>
#include <cmath>

#include "attention.hpp"
#include "error.hpp"

namespace engine {
namespace {

using Index = Eigen::Index;

// Work is cut into pieces of fixed size, whatever the thread count, so that results do not depend on it.
constexpr Index token_tile = 128;   // tokens a piece in prefill
constexpr Index output_tile = 64;   // rows of a weight matrix a piece in decode
constexpr Index logits_tile = 128;  // tokens a call of on_logits
constexpr std::size_t growth = 64;  // rows that a full cache grows by in decode

std::span<float> span_of(Vector& v) { return {v.data(), static_cast<std::size_t>(v.size())}; }

Index tiles(Index count, Index tile) { return (count + tile - 1) / tile; }

template <typename In, typename Out>
void rms_norm(const In& x, const Vector& weight, float epsilon, Out&& out) {
  const float mean_square = x.squaredNorm() / static_cast<float>(x.size());
  out = x.cwiseProduct(weight.transpose()) / std::sqrt(mean_square + epsilon);
}

// SwiGLU: gate * sigmoid(gate) * up, into gate.
template <typename Gate, typename Up>
void swiglu(Gate& gate, const Up& up) {
  gate = gate.array() / (1.0F + (-gate.array()).exp()) * up.array();
}

// Cosine and sine of each rotated pair at one position.
struct Rotation {
  std::vector<float> cosine;  // [rope_dimensions / 2]
  std::vector<float> sine;

  Rotation(const Model& model, std::size_t position) {
    for (const double frequency : model.rope_frequencies()) {
      const double angle = static_cast<double>(position) * frequency;
      cosine.push_back(static_cast<float>(model.rope_magnitude() * std::cos(angle)));
      sine.push_back(static_cast<float>(model.rope_magnitude() * std::sin(angle)));
    }
  }

  // GGUF's llama keeps the two numbers of a pair side by side.
  void apply(float* head) const {
    for (std::size_t i = 0; i < cosine.size(); ++i) {
      const float a = head[2 * i];
      const float b = head[2 * i + 1];
      head[2 * i] = a * cosine[i] - b * sine[i];
      head[2 * i + 1] = a * sine[i] + b * cosine[i];
    }
  }
};

void check_token(const Model& model, TokenId token) {
  if (token < 0 || token >= model.config().vocabulary) {
    throw Error(
        fmt::format("token id {} is outside the vocabulary, 0 to {}", token, model.config().vocabulary - 1));
  }
}

// What one sequence carries through a decode step. Vectors of their own, so that each is aligned alike and
// every sum runs in the same order whichever place in the batch the sequence has.
struct DecodeState {
  DecodeState(const Model& model, const DecodeStep& step)
      : sequence{step.sequence},
        rotation{model, step.position},
        hidden{model.embedding().row(step.token).transpose()},
        attention(model.config().heads * model.config().head_dim),
        rows(static_cast<std::size_t>(model.config().heads)) {}

  Sequence* sequence;
  Rotation rotation;
  Vector hidden;
  Vector normed;
  Vector query;
  Vector key;
  Vector value;
  Vector attention;         // [heads * head_dim]
  Vector shadow_attention;  // the same from the shadow cache
  Vector block;             // [embedding], what a block adds to the hidden state
  Vector shadow_block;
  Vector gate;
  Vector up;
  std::vector<Vector> rows;         // [heads], softmax rows
  std::vector<Vector> shadow_rows;  // [heads]
};

// out = weights * in, for all sequences in one pass over the weights: a piece of them stays in the cache
// while each sequence is multiplied with it.
void multiply(const Matrix& weights, std::span<DecodeState> batch, Vector DecodeState::*in,
              Vector DecodeState::*out, int threads) {
  for (DecodeState& state : batch) (state.*out).resize(weights.rows());
#pragma omp parallel for schedule(static) num_threads(threads)
  for (Index tile = 0; tile < tiles(weights.rows(), output_tile); ++tile) {
    const Index first = tile * output_tile;
    const Index count = std::min(output_tile, weights.rows() - first);
    for (DecodeState& state : batch) {
      (state.*out).segment(first, count).noalias() = weights.middleRows(first, count) * (state.*in);
    }
  }
}

void norm_all(std::span<DecodeState> batch, const Vector& weight, float epsilon) {
  for (DecodeState& state : batch) {
    state.normed.resize(weight.size());
    rms_norm(state.hidden.transpose(), weight, epsilon, state.normed.transpose());
  }
}

}  // namespace

void LayerView::shrink(std::size_t rows_kept) {
  shrink(std::vector<std::size_t>(static_cast<std::size_t>(kv_heads), rows_kept));
}

void LayerView::shrink(std::span<const std::size_t> rows_kept) {
  if (rows_kept.size() != static_cast<std::size_t>(kv_heads)) {
    throw Error(fmt::format("layer {}: {} lengths for {} KV heads; give one each", layer, rows_kept.size(),
                            kv_heads));
  }
  for (const std::size_t kept : rows_kept) {
    if (kept > rows) throw Error(fmt::format("layer {}: cannot keep {} rows of {}", layer, kept, rows));
  }
  kept_.assign(rows_kept.begin(), rows_kept.end());
}

LayerView& LayerView::shadow() {
  if (!shadow_) {
    shadow_cache_.emplace(*cache_);
    shadow_ = std::make_unique<LayerView>();
    shadow_->layer = layer;
    shadow_->type = type;
    shadow_->heads = heads;
    shadow_->kv_heads = kv_heads;
    shadow_->head_dim = head_dim;
    shadow_->rows = rows;
    shadow_->allocated_rows = allocated_rows;
    shadow_->window = window;
    shadow_->queries = queries;
    shadow_->cache_ = &*shadow_cache_;
  }
  return *shadow_;
}

Sequence::Sequence(const Model& model, SequenceOptions options) : model_{&model}, options_{options} {
  clear();
}

void Sequence::clear() {
  const ModelConfig& c = model_->config();
  caches_.assign(static_cast<std::size_t>(c.layers), LayerCache{options_.kv_type, c.kv_heads, c.head_dim});
  shadows_.assign(static_cast<std::size_t>(c.layers), std::nullopt);
  meter_ = {};
  shadow_meter_ = {};
  prompt_tokens_ = 0;
  next_position_ = 0;
  prefill_peak_ = 0;
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
  copy.prompt_tokens_ = prompt_tokens_;
  copy.next_position_ = next_position_;
  copy.prefill_peak_ = prefill_peak_;
  copy.logits_ = logits_;
  return copy;
}

std::span<const float> Sequence::prefill(std::span<const TokenId> tokens, const PrefillOptions& options) {
  const ModelConfig& c = model_->config();
  if (prompt_tokens_ != 0) {
    throw Error(
        fmt::format("the sequence already holds a prompt of {} tokens; use a new one", prompt_tokens_));
  }
  if (tokens.empty()) throw Error("the prompt is empty; give at least one token");
  if (tokens.size() > c.context) {
    throw Error(fmt::format("the prompt has {} tokens, but the model's context holds {}; shorten the prompt",
                            tokens.size(), c.context));
  }
  for (const TokenId token : tokens) check_token(*model_, token);
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
  const int threads = model.threads();
  const auto count = static_cast<Index>(tokens.size());
  const Index head_dim = c.head_dim;
  const Index token_tiles = tiles(count, token_tile);

  Matrix hidden(count, c.embedding);
  std::vector<Rotation> rotations;
  rotations.reserve(tokens.size());
  for (Index t = 0; t < count; ++t) {
    hidden.row(t) = model.embedding().row(tokens[static_cast<std::size_t>(t)]);
    rotations.emplace_back(model, static_cast<std::size_t>(t));
  }

  const auto window = static_cast<Index>(std::min(options.window, tokens.size()));
  std::vector<float> window_queries(static_cast<std::size_t>(c.heads * window * head_dim));
  Matrix queries(count, c.heads * head_dim);
  Matrix attention;
  Vector row;
  Vector head_out(head_dim);

  for (int l = 0; l < c.layers; ++l) {
    const LayerWeights& weights = model.layers()[static_cast<std::size_t>(l)];
    LayerCache& cache = caches_[static_cast<std::size_t>(l)];
    cache.reset(tokens.size(), meter_);

#pragma omp parallel num_threads(threads)
    {
      Matrix normed;
      Matrix keys;
      Matrix values;
#pragma omp for schedule(dynamic)
      for (Index tile = 0; tile < token_tiles; ++tile) {
        const Index first = tile * token_tile;
        const Index rows = std::min(token_tile, count - first);
        normed.resize(rows, c.embedding);
        for (Index t = 0; t < rows; ++t) {
          rms_norm(hidden.row(first + t), weights.attention_norm, c.rms_epsilon, normed.row(t));
        }
        queries.middleRows(first, rows).noalias() = normed * weights.query.transpose();
        keys.resize(rows, c.kv_heads * head_dim);
        values.resize(rows, c.kv_heads * head_dim);
        keys.noalias() = normed * weights.key.transpose();
        values.noalias() = normed * weights.value.transpose();
        for (Index t = 0; t < rows; ++t) {
          const Rotation& rotation = rotations[static_cast<std::size_t>(first + t)];
          for (int h = 0; h < c.heads; ++h) rotation.apply(&queries(first + t, h * head_dim));
          for (int h = 0; h < c.kv_heads; ++h) rotation.apply(&keys(t, h * head_dim));
        }
        with_kv_type(cache.type(), [&]<typename T>(T*) {
          using Rows = Eigen::Map<Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>>;
          for (int h = 0; h < c.kv_heads; ++h) {
            Rows{cache.keys<T>(h) + first * head_dim, rows, head_dim} =
                keys.middleCols(h * head_dim, head_dim).template cast<T>();
            Rows{cache.values<T>(h) + first * head_dim, rows, head_dim} =
                values.middleCols(h * head_dim, head_dim).template cast<T>();
          }
        });
      }
    }

    prefill_attention(cache, queries, threads, attention);

    if (hooks_.attention) {
      for (int h = 0; h < c.heads; ++h) {
        decode_attention(cache, h / c.group(),
                         {&queries(count - 1, h * head_dim), static_cast<std::size_t>(head_dim)}, row,
                         span_of(head_out));
        hooks_.attention(l, h, span_of(row));
      }
    }

    if (options.on_layer) {
      for (int h = 0; h < c.heads; ++h) {
        Eigen::Map<Matrix>{window_queries.data() + h * window * head_dim, window, head_dim} =
            queries.block(count - window, h * head_dim, window, head_dim);
      }
      LayerView view;
      view.layer = l;
      view.type = cache.type();
      view.heads = c.heads;
      view.kv_heads = c.kv_heads;
      view.head_dim = c.head_dim;
      view.rows = tokens.size();
      view.allocated_rows = tokens.size();
      view.window = static_cast<std::size_t>(window);
      view.queries = window_queries.data();
      view.cache_ = &cache;
      options.on_layer(view);
      if (!view.kept_.empty()) cache.shrink(view.kept_, meter_);
      if (view.shadow_) {
        if (!view.shadow_->kept_.empty()) view.shadow_cache_->shrink(view.shadow_->kept_, shadow_meter_);
        shadows_[static_cast<std::size_t>(l)] = std::move(view.shadow_cache_);
      }
    }

#pragma omp parallel num_threads(threads)
    {
      Matrix normed;
      Matrix gate;
      Matrix up;
#pragma omp for schedule(dynamic)
      for (Index tile = 0; tile < token_tiles; ++tile) {
        const Index first = tile * token_tile;
        const Index rows = std::min(token_tile, count - first);
        auto state = hidden.middleRows(first, rows);
        state.noalias() += attention.middleRows(first, rows) * weights.output.transpose();
        normed.resize(rows, c.embedding);
        for (Index t = 0; t < rows; ++t) {
          rms_norm(state.row(t), weights.feed_forward_norm, c.rms_epsilon, normed.row(t));
        }
        gate.resize(rows, c.feed_forward);
        up.resize(rows, c.feed_forward);
        gate.noalias() = normed * weights.gate.transpose();
        up.noalias() = normed * weights.up.transpose();
        swiglu(gate, up);
        state.noalias() += gate * weights.down.transpose();
      }
    }
  }

  const auto logits_of = [&](Index first, Index rows) {
    Matrix normed(rows, c.embedding);
    for (Index t = 0; t < rows; ++t) {
      rms_norm(hidden.row(first + t), model.output_norm(), c.rms_epsilon, normed.row(t));
    }
    Matrix logits(rows, c.vocabulary);
    const Index columns = 16 * output_tile;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (Index tile = 0; tile < tiles(c.vocabulary, columns); ++tile) {
      const Index from = tile * columns;
      const Index width = std::min(columns, c.vocabulary - from);
      logits.middleCols(from, width).noalias() = normed * model.output().middleRows(from, width).transpose();
    }
    return logits;
  };
  if (options.on_logits) {
    for (Index first = 0; first < count; first += logits_tile) {
      options.on_logits(static_cast<std::size_t>(first),
                        logits_of(first, std::min(logits_tile, count - first)));
    }
  }
  logits_ = logits_of(count - 1, 1).transpose();
  prompt_tokens_ = tokens.size();
  next_position_ = tokens.size();
  prefill_peak_ = meter_.peak;
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
    if (sequence->prompt_tokens_ == 0)
      throw Error(fmt::format("decode: step {} has no prompt; call prefill first", b));
    check_token(*sequence->model_, steps[b].token);
    if (steps[b].position >= sequence->model_->config().context) {
      throw Error(fmt::format("decode: position {} does not fit into the model's context of {}",
                              steps[b].position, sequence->model_->config().context));
    }
  }

  const Model& model = *steps[0].sequence->model_;
  const ModelConfig& c = model.config();
  const int threads = model.threads();
  const auto head_dim = static_cast<std::size_t>(c.head_dim);

  const auto make_room = [](LayerCache& cache, CacheMeter& meter) {
    for (int h = 0; h < cache.kv_heads(); ++h) {
      if (cache.rows(h) == cache.allocated_rows(h)) {
        cache.reserve(growth, meter);
        return;
      }
    }
  };
  std::vector<DecodeState> batch;
  batch.reserve(steps.size());
  for (const DecodeStep& step : steps) {
    for (LayerCache& cache : step.sequence->caches_) make_room(cache, step.sequence->meter_);
    for (std::optional<LayerCache>& shadow : step.sequence->shadows_) {
      if (shadow) make_room(*shadow, step.sequence->shadow_meter_);
    }
    batch.emplace_back(model, step);
  }

  const auto attend = [&](int l, bool shadow) {
    const auto units = static_cast<Index>(batch.size()) * c.heads;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (Index unit = 0; unit < units; ++unit) {
      DecodeState& state = batch[static_cast<std::size_t>(unit / c.heads)];
      const auto h = static_cast<std::size_t>(unit % c.heads);
      const auto layer = static_cast<std::size_t>(l);
      const std::optional<LayerCache>& copy = state.sequence->shadows_[layer];
      if (shadow && !copy) continue;
      const LayerCache& cache = shadow ? *copy : state.sequence->caches_[layer];
      Vector& out = shadow ? state.shadow_attention : state.attention;
      Vector& row = shadow ? state.shadow_rows[h] : state.rows[h];
      decode_attention(cache, static_cast<int>(h) / c.group(),
                       span_of(state.query).subspan(h * head_dim, head_dim), row,
                       span_of(out).subspan(h * head_dim, head_dim));
    }
  };

  for (int l = 0; l < c.layers; ++l) {
    const LayerWeights& weights = model.layers()[static_cast<std::size_t>(l)];
    norm_all(batch, weights.attention_norm, c.rms_epsilon);
    multiply(weights.query, batch, &DecodeState::normed, &DecodeState::query, threads);
    multiply(weights.key, batch, &DecodeState::normed, &DecodeState::key, threads);
    multiply(weights.value, batch, &DecodeState::normed, &DecodeState::value, threads);

    bool shadowed = false;
    for (DecodeState& state : batch) {
      std::optional<LayerCache>& shadow = state.sequence->shadows_[static_cast<std::size_t>(l)];
      for (int h = 0; h < c.heads; ++h) state.rotation.apply(&state.query[h * c.head_dim]);
      for (int h = 0; h < c.kv_heads; ++h) {
        state.rotation.apply(&state.key[h * c.head_dim]);
        const auto at = static_cast<std::size_t>(h) * head_dim;
        const std::span<const float> key = span_of(state.key).subspan(at, head_dim);
        const std::span<const float> value = span_of(state.value).subspan(at, head_dim);
        state.sequence->caches_[static_cast<std::size_t>(l)].append(h, key, value);
        if (shadow) shadow->append(h, key, value);
      }
      shadowed = shadowed || (shadow && state.sequence->hooks_.shadow);
    }

    attend(l, false);
    multiply(weights.output, batch, &DecodeState::attention, &DecodeState::block, threads);
    for (const DecodeState& state : batch) {
      if (!state.sequence->hooks_.attention) continue;
      for (int h = 0; h < c.heads; ++h) {
        const Vector& row = state.rows[static_cast<std::size_t>(h)];
        state.sequence->hooks_.attention(l, h, {row.data(), static_cast<std::size_t>(row.size())});
      }
    }

    if (shadowed) {
      for (DecodeState& state : batch) {
        state.shadow_attention.setZero(c.heads * c.head_dim);
        state.shadow_rows.resize(static_cast<std::size_t>(c.heads));
      }
      attend(l, true);
      multiply(weights.output, batch, &DecodeState::shadow_attention, &DecodeState::shadow_block, threads);
      for (DecodeState& state : batch) {
        if (!state.sequence->shadows_[static_cast<std::size_t>(l)] || !state.sequence->hooks_.shadow)
          continue;
        state.sequence->hooks_.shadow(l, span_of(state.block), span_of(state.shadow_block));
      }
    }

    for (DecodeState& state : batch) state.hidden += state.block;
    norm_all(batch, weights.feed_forward_norm, c.rms_epsilon);
    multiply(weights.gate, batch, &DecodeState::normed, &DecodeState::gate, threads);
    multiply(weights.up, batch, &DecodeState::normed, &DecodeState::up, threads);
    for (DecodeState& state : batch) swiglu(state.gate, state.up);
    multiply(weights.down, batch, &DecodeState::gate, &DecodeState::block, threads);
    for (DecodeState& state : batch) state.hidden += state.block;
  }

  norm_all(batch, model.output_norm(), c.rms_epsilon);
  multiply(model.output(), batch, &DecodeState::normed, &DecodeState::block, threads);
  for (std::size_t b = 0; b < batch.size(); ++b) {
    batch[b].sequence->logits_ = batch[b].block;
    batch[b].sequence->next_position_ = steps[b].position + 1;
  }
}

}  // namespace engine
