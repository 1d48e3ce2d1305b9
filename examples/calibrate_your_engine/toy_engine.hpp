// An engine whose right calibration is known: it stands for yours, and nothing in it is to be copied.
//
// In each layer one head looks at the whole answer while the model writes it (a semantic retrieval head), one
// at the very token that comes next (a classic retrieval head). The others look at the question, but in the
// last layer at the beginning of the text, which a compressed cache has lost: evicting costs most there.

#pragma once

#include <compresskv/calibrate/answer_span.hpp>
#include <compresskv/compresskv.hpp>
#include <numeric>
#include <random>
#include <string>
#include <vector>

using compresskv::calibrate::TokenId;
using Row = std::vector<float>;

constexpr compresskv::ModelShape model{.layers = 3, .query_heads = 6, .kv_heads = 1, .head_dim = 64};
constexpr TokenId first_word = 1, question = 900, topic = 901, first_answer = 1000;

inline std::size_t whole_answer_head(std::size_t layer) { return (2 * layer + 1) % model.query_heads; }
inline std::size_t next_token_head(std::size_t layer) { return (2 * layer + 4) % model.query_heads; }

inline Row code_of(TokenId token) {  // a direction of its own, nearly orthogonal to all others
  const auto bits = std::mt19937_64{static_cast<std::uint64_t>(token)}();
  Row code(model.head_dim);
  for (std::size_t i = 0; i < code.size(); ++i) code[i] = (bits >> i & 1U) != 0 ? 1.0F : -1.0F;
  return code;
}

struct Prompt {
  std::vector<TokenId> tokens = std::vector<TokenId>(300), needle = std::vector<TokenId>(8);
  std::vector<TokenId> reply = {};               // what the model will write
  compresskv::calibrate::TokenSpan answer = {};  // the needle's place
};

inline Prompt prompt_of(std::size_t number) {
  Prompt prompt;
  std::iota(prompt.tokens.begin(), prompt.tokens.end(), first_word);
  std::iota(prompt.needle.begin(), prompt.needle.end(), first_answer);
  prompt.answer = {.first = 20 + 30 * number, .last = 28 + 30 * number};
  prompt.tokens.insert(prompt.tokens.begin() + static_cast<std::ptrdiff_t>(prompt.answer.first),
                       prompt.needle.begin(), prompt.needle.end());
  prompt.tokens.push_back(question);
  prompt.reply = number == 5 ? std::vector{first_word} : prompt.needle;  // one answer is wrong
  return prompt;
}

inline std::string text_of(const std::vector<TokenId>& tokens) {
  std::string text;
  for (const TokenId token : tokens) text += std::to_string(token) + " ";
  return text;
}

struct Cache {  // of one layer, [token][dim]
  Row keys, values;

  compresskv::StridedKv<float> view() {
    const std::size_t rows = keys.size() / model.head_dim;
    const compresskv::KvShape shape{.kv_heads = 1, .rows = rows, .head_dim = model.head_dim};
    return {keys.data(), values.data(), shape, compresskv::layout::head_token_dim};
  }
  void append(TokenId token) {
    const Row key = code_of(token), about = code_of(topic), value = code_of(-token);
    for (std::size_t i = 0; i < model.head_dim; ++i)
      keys.push_back(key[i] + (token >= first_answer ? about[i] : 0.0F));
    values.insert(values.end(), value.begin(), value.end());
  }
  void shorten(std::size_t rows) {
    keys.resize(rows * model.head_dim);
    values.resize(rows * model.head_dim);
  }
};

inline std::vector<Cache> prefill(const Prompt& prompt) {
  Cache cache;
  for (const TokenId token : prompt.tokens) cache.append(token);
  return std::vector(model.layers, cache);
}

/// Queries [head][dim] of the last token, whose logits give `next`.
inline Row queries_of(std::size_t layer, TokenId next) {
  Row queries;
  for (std::size_t head = 0; head < model.query_heads; ++head) {
    Row query = code_of(layer + 1 == model.layers ? first_word : question);
    if (head == whole_answer_head(layer)) query = code_of(topic);
    if (head == next_token_head(layer)) query = code_of(next);
    // The one that copies is not as sure as the others: half of its weight is elsewhere.
    for (const float x : query) queries.push_back(head == next_token_head(layer) ? 0.75F * x : x);
  }
  return queries;
}

/// What the layer's attention block gives; a real one ends with the output projection.
inline Row attend(Cache& cache, const Row& queries) {
  const auto kv = cache.view();
  Row out(queries.size()), scratch(2 * model.head_dim), attention(kv.rows(0));
  for (std::size_t at = 0; at < out.size(); at += model.head_dim)
    compresskv::kernel::decode_attention(kv, 0, &queries[at], 0.125F, scratch, attention, &out[at]);
  return out;
}
