#include "attention.hpp"

#include <fmt/core.h>

#include <algorithm>
#include <charconv>
#include <exception>
#include <string_view>
#include <system_error>
#include <utility>

#include "engine/error.hpp"
#include "engine/sampler.hpp"
#include "model.hpp"

namespace ckv {
namespace {

constexpr std::string_view name_of_rows = "kq_soft_max-";  // then the layer

}  // namespace

void ShownAttention::attach(llama_context_params& params) {
  params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
  params.cb_eval = &ShownAttention::call;
  params.cb_eval_user_data = this;
}

void ShownAttention::begin(std::size_t before) {
  tokens_ = before + 1;
  failure_.clear();
}

void ShownAttention::end() {
  tokens_ = 0;
  if (!failure_.empty()) {
    throw engine::Error(failure_);
  }
}

/// No exception may pass through libllama: what went wrong is thrown by `end`.
bool ShownAttention::call(ggml_tensor* node, bool ask, void* object) {
  auto& self = *static_cast<ShownAttention*>(object);
  if (self.tokens_ == 0 || !self.failure_.empty()) {
    return !ask;
  }
  if (ask) {
    return node->op == GGML_OP_SOFT_MAX && std::string_view(node->name).starts_with(name_of_rows);
  }
  try {
    self.take(*node);
  } catch (const std::exception& error) {
    self.failure_ = error.what();
  }
  return true;
}

void ShownAttention::take(const ggml_tensor& node) {
  const std::string_view number = std::string_view(node.name).substr(name_of_rows.size());
  std::size_t layer = 0;
  const auto [rest, error] = std::from_chars(number.data(), number.data() + number.size(), layer);
  const auto cells = static_cast<std::size_t>(node.ne[0]);
  if (error != std::errc{} || node.type != GGML_TYPE_F32 || !ggml_is_contiguous(&node) || node.ne[1] != 1 ||
      static_cast<std::size_t>(node.ne[2]) != heads_ || node.ne[3] != 1 || cells < tokens_) {
    throw engine::Error(fmt::format(
        "llama.cpp's {} is {} of {} cells, {} tokens, {} heads, {} streams: f32 of one token's {} heads over "
        "{} cells or more was expected",
        node.name, ggml_type_name(node.type), node.ne[0], node.ne[1], node.ne[2], node.ne[3], heads_,
        tokens_));
  }
  rows_.resize(heads_ * cells);
  ggml_backend_tensor_get(&node, rows_.data(), 0, rows_.size() * sizeof(float));
  for (std::size_t head = 0; head < heads_; ++head) {
    const std::span<const float> row = std::span(rows_).subspan(head * cells, cells);
    // A fresh context fills its cells in order, and masks the rest.
    if (std::ranges::any_of(row.subspan(tokens_), [](float weight) { return weight != 0.0F; })) {
      throw engine::Error(
          fmt::format("llama.cpp's {} looks beyond the {} cells of the sequence: it orders cells otherwise",
                      node.name, tokens_));
    }
    show_(layer, head, row.first(tokens_));
  }
}

std::string LlamaModel::answer(std::span<const TokenId> prompt, std::size_t max_new_tokens,
                               const AnswerSteps& steps) const {
  check_length(prompt.size());
  ShownAttention shown{static_cast<std::size_t>(llama_model_n_head(get())), steps.on_attention};
  const LlamaContext own = make_context({.cells = prompt.size() + max_new_tokens, .attention = &shown});
  // The last token is read alone: of a batch the rows of all its tokens would be computed and shown.
  if (prompt.size() > 1) {
    read(own.get(), nullptr, prompt.first(prompt.size() - 1), [](std::size_t) {});
  }
  std::size_t tokens = prompt.size() - 1;
  const auto show_and_decode = [&](TokenId token) {
    shown.begin(tokens++);
    const std::span<const float> logits = decode(own.get(), token);
    shown.end();
    return logits;
  };
  std::span<const float> logits = show_and_decode(prompt.back());
  LlamaText text{*this};
  std::string answer;
  for (std::size_t step = 0; step < max_new_tokens && tokens < context(); ++step) {
    const TokenId token = engine::greedy(logits);
    if (llama_vocab_is_eog(vocabulary(), token)) {
      break;
    }
    steps.on_token(token);
    answer += text.push(token);
    if (step + 1 < max_new_tokens) {
      logits = show_and_decode(token);
    }
  }
  return answer + text.finish();
}

}  // namespace ckv
