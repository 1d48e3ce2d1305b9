// A LLaMA model of a few thousand random weights, and what it must compute: a plain forward pass in double
// that keeps no cache and attends to an explicit set of positions.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "engine/gguf.hpp"
#include "engine/gguf_writer.hpp"
#include "engine/model.hpp"

namespace engine::test {

struct TinyShape {
  int layers = 2;
  int embedding = 20;
  int feed_forward = 28;
  int heads = 6;
  int kv_heads = 2;
  int head_dim = 8;
  int rope_dimensions = 8;
  int vocabulary = 41;
  int context = 400;
  double rope_base = 5000.0;
  bool tied = false;
};

/// Numbers that differ in sign and size but are the same on every platform.
inline std::vector<float> random_floats(std::size_t count, std::uint64_t seed, float scale) {
  std::mt19937_64 bits{seed};
  std::vector<float> out(count);
  for (float& x : out) x = scale * (static_cast<float>(bits() >> 40U) / static_cast<float>(1U << 23U) - 1.0F);
  return out;
}

struct TinyModel {
  TinyShape shape;
  GgufWriter writer;
  std::map<std::string, std::vector<float>> weights;  // row-major [outputs][inputs]

  explicit TinyModel(const TinyShape& s = {}) : shape{s} {
    writer.set("general.architecture", std::string{"llama"})
        .set("llama.block_count", static_cast<std::uint32_t>(s.layers))
        .set("llama.context_length", static_cast<std::uint32_t>(s.context))
        .set("llama.embedding_length", static_cast<std::uint32_t>(s.embedding))
        .set("llama.feed_forward_length", static_cast<std::uint32_t>(s.feed_forward))
        .set("llama.attention.head_count", static_cast<std::uint32_t>(s.heads))
        .set("llama.attention.head_count_kv", static_cast<std::uint32_t>(s.kv_heads))
        .set("llama.attention.key_length", static_cast<std::uint32_t>(s.head_dim))
        .set("llama.attention.layer_norm_rms_epsilon", 1e-5F)
        .set("llama.rope.dimension_count", static_cast<std::uint32_t>(s.rope_dimensions))
        .set("llama.rope.freq_base", static_cast<float>(s.rope_base));
    const int query_width = s.heads * s.head_dim;
    const int kv_width = s.kv_heads * s.head_dim;
    add("token_embd.weight", s.vocabulary, s.embedding, 1.0F);
    for (int l = 0; l < s.layers; ++l) {
      const std::string block = "blk." + std::to_string(l) + ".";
      add(block + "attn_norm.weight", 0, s.embedding, 1.5F);
      add(block + "attn_q.weight", query_width, s.embedding, 0.9F);
      add(block + "attn_k.weight", kv_width, s.embedding, 0.9F);
      add(block + "attn_v.weight", kv_width, s.embedding, 0.7F);
      add(block + "attn_output.weight", s.embedding, query_width, 0.3F);
      add(block + "ffn_norm.weight", 0, s.embedding, 1.2F);
      add(block + "ffn_gate.weight", s.feed_forward, s.embedding, 0.5F);
      add(block + "ffn_up.weight", s.feed_forward, s.embedding, 0.5F);
      add(block + "ffn_down.weight", s.embedding, s.feed_forward, 0.4F);
    }
    add("output_norm.weight", 0, s.embedding, 1.3F);
    if (!s.tied) add("output.weight", s.vocabulary, s.embedding, 0.8F);
  }

  /// A weight matrix, or with `outputs` 0 a vector.
  void add(const std::string& name, int outputs, int inputs, float scale) {
    const auto count = static_cast<std::size_t>(std::max(outputs, 1)) * static_cast<std::size_t>(inputs);
    weights[name] = random_floats(count, 1000 + weights.size(), scale);
    std::vector<std::uint64_t> extents{static_cast<std::uint64_t>(inputs)};
    if (outputs > 0) extents.push_back(static_cast<std::uint64_t>(outputs));
    writer.tensor(name, extents, weights[name]);
  }

  GgufFile file() const { return GgufFile::from_bytes(writer.bytes(), "tiny.gguf"); }
  Model model(int threads = 1) const { return Model{file(), {.threads = threads}}; }
};

/// What the reference computes for a text.
struct Reference {
  using Row = std::vector<double>;

  /// Whether the query at `position` sees the key at `key` in this layer and KV head. Causality is applied
  /// besides.
  using Visible = std::function<bool(int layer, int kv_head, std::size_t position, std::size_t key)>;

  std::vector<Row> logits;                             // [position][vocabulary]
  std::vector<std::vector<std::vector<Row>>> softmax;  // [layer][head][position][key <= position]
  std::vector<std::vector<Row>> queries;               // [layer][position][heads * head_dim], post-RoPE
  std::vector<std::vector<Row>> keys;                  // [layer][position][kv_heads * head_dim], post-RoPE
  std::vector<std::vector<Row>> values;                // [layer][position][kv_heads * head_dim]
  std::vector<std::vector<Row>>
      attention_blocks;  // [layer][position][embedding], after the output projection

  /// `frequencies`: radians a position for each pair. `magnitude` multiplies the rotation.
  Reference(const TinyModel& tiny, std::span<const TokenId> tokens, std::span<const double> frequencies,
            double magnitude = 1.0, const Visible& visible = {}) {
    const TinyShape& s = tiny.shape;
    const auto d = static_cast<std::size_t>(s.head_dim);
    const auto weight = [&](int l, const char* part) -> const std::vector<float>& {
      return tiny.weights.at("blk." + std::to_string(l) + "." + part + ".weight");
    };
    const auto apply = [](const std::vector<float>& w, const Row& x) {
      Row out(w.size() / x.size(), 0.0);
      for (std::size_t o = 0; o < out.size(); ++o) {
        for (std::size_t i = 0; i < x.size(); ++i) out[o] += double{w[o * x.size() + i]} * x[i];
      }
      return out;
    };
    const auto norm = [](const std::vector<float>& w, const Row& x) {
      double squares = 0;
      for (const double value : x) squares += value * value;
      const double scale = 1.0 / std::sqrt(squares / static_cast<double>(x.size()) + double{1e-5F});
      Row out(x.size());
      for (std::size_t i = 0; i < x.size(); ++i) out[i] = x[i] * scale * double{w[i]};
      return out;
    };
    const auto rotate = [&](Row& row, std::size_t position) {
      for (std::size_t first = 0; first < row.size(); first += d) {
        for (std::size_t i = 0; i < frequencies.size(); ++i) {
          const double angle = static_cast<double>(position) * frequencies[i];
          const double a = row[first + 2 * i];
          const double b = row[first + 2 * i + 1];
          row[first + 2 * i] = magnitude * (a * std::cos(angle) - b * std::sin(angle));
          row[first + 2 * i + 1] = magnitude * (a * std::sin(angle) + b * std::cos(angle));
        }
      }
    };
    const auto add = [](Row& to, const Row& what) {
      for (std::size_t i = 0; i < to.size(); ++i) to[i] += what[i];
    };

    const std::vector<float>& embedding = tiny.weights.at("token_embd.weight");
    std::vector<Row> hidden;
    for (const TokenId token : tokens) {
      const auto first = embedding.begin() + std::ptrdiff_t{token} * s.embedding;
      hidden.emplace_back(first, first + s.embedding);
    }
    for (int l = 0; l < s.layers; ++l) {
      auto& layer_queries = queries.emplace_back();
      auto& layer_keys = keys.emplace_back();
      auto& layer_values = values.emplace_back();
      auto& layer_blocks = attention_blocks.emplace_back();
      softmax.emplace_back(static_cast<std::size_t>(s.heads), std::vector<Row>{});
      for (std::size_t t = 0; t < hidden.size(); ++t) {
        const Row normed = norm(weight(l, "attn_norm"), hidden[t]);
        layer_queries.push_back(apply(weight(l, "attn_q"), normed));
        layer_keys.push_back(apply(weight(l, "attn_k"), normed));
        layer_values.push_back(apply(weight(l, "attn_v"), normed));
        rotate(layer_queries.back(), t);
        rotate(layer_keys.back(), t);
      }
      for (std::size_t t = 0; t < hidden.size(); ++t) {
        Row gathered(static_cast<std::size_t>(s.heads) * d, 0.0);
        for (int h = 0; h < s.heads; ++h) {
          const int kv_head = h / (s.heads / s.kv_heads);
          const std::size_t at = static_cast<std::size_t>(h) * d;
          const std::size_t kv_at = static_cast<std::size_t>(kv_head) * d;
          Row row(t + 1, 0.0);
          double sum = 0;
          for (std::size_t k = 0; k <= t; ++k) {
            if (visible && !visible(l, kv_head, t, k)) continue;
            double dot = 0;
            for (std::size_t e = 0; e < d; ++e) dot += layer_queries[t][at + e] * layer_keys[k][kv_at + e];
            sum += row[k] = std::exp(dot / std::sqrt(static_cast<double>(d)));
          }
          for (std::size_t k = 0; k <= t; ++k) {
            row[k] /= sum;
            for (std::size_t e = 0; e < d; ++e) gathered[at + e] += row[k] * layer_values[k][kv_at + e];
          }
          softmax.back()[static_cast<std::size_t>(h)].push_back(std::move(row));
        }
        layer_blocks.push_back(apply(weight(l, "attn_output"), gathered));
      }
      for (std::size_t t = 0; t < hidden.size(); ++t) {
        add(hidden[t], layer_blocks[t]);
        const Row normed = norm(weight(l, "ffn_norm"), hidden[t]);
        Row gate = apply(weight(l, "ffn_gate"), normed);
        const Row up = apply(weight(l, "ffn_up"), normed);
        for (std::size_t i = 0; i < gate.size(); ++i) gate[i] = gate[i] / (1.0 + std::exp(-gate[i])) * up[i];
        add(hidden[t], apply(weight(l, "ffn_down"), gate));
      }
    }
    const std::vector<float>& output = tiny.weights.at(s.tied ? "token_embd.weight" : "output.weight");
    for (const Row& row : hidden)
      logits.push_back(apply(output, norm(tiny.weights.at("output_norm.weight"), row)));
  }
};

/// The plain rotation's radians a position.
inline std::vector<double> plain_frequencies(const TinyShape& shape) {
  std::vector<double> out;
  for (int i = 0; i < shape.rope_dimensions / 2; ++i) {
    out.push_back(std::pow(double{static_cast<float>(shape.rope_base)}, -2.0 * i / shape.rope_dimensions));
  }
  return out;
}

inline std::vector<TokenId> random_tokens(std::size_t count, int vocabulary, std::uint64_t seed) {
  std::mt19937_64 bits{seed};
  std::vector<TokenId> out(count);
  for (TokenId& token : out) token = static_cast<TokenId>(bits() % static_cast<std::uint64_t>(vocabulary));
  return out;
}

}  // namespace engine::test
