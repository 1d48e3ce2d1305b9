// A model in llama.cpp: its vocabulary and chat template, contexts, prompts read and tokens decoded.
#pragma once

#include <llama.h>

#include <compresskv/adapt/llama_cpp.hpp>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "../model_engine.hpp"
#include "engine/chat_template.hpp"
#include "engine/thread_pool.hpp"

namespace ckv {

struct FreeLlama {
  void operator()(llama_model* model) const { llama_model_free(model); }
  void operator()(llama_context* context) const { llama_free(context); }
};
using LlamaContext = std::unique_ptr<llama_context, FreeLlama>;

class ShownAttention;  // attention.cpp

class LlamaModel final : public ModelEngine {
 public:
  /// Throws engine::Error where libllama cannot load it.
  LlamaModel(const std::filesystem::path& path, int threads);

  std::string_view engine_name() const override { return llama_cpp_engine; }
  std::size_t layers() const override;
  std::size_t context() const override;
  int threads() const override { return pool_->threads(); }
  compresskv::ModelShape shape(engine::KvType type) const override;
  std::vector<std::size_t> compressed_layers() const override;
  engine::PromptText lay_out(std::span<const engine::ChatMessage> messages) const override;
  std::vector<TokenId> encode(const engine::PromptText& prompt) const override;
  std::vector<TokenId> encode(std::string_view text, bool parse_special) const override;
  std::optional<TokenId> bos() const override;
  std::string token_bytes(TokenId id) const override { return piece(id, true); }
  RunResult run(std::span<const TokenId> prompt, const Compression& how,
                const RunOptions& options) const override;
  std::string answer(std::span<const TokenId> prompt, std::size_t max_new_tokens,
                     const AnswerSteps& steps) const override;
  std::unique_ptr<HeldPrompt> hold(const TaskPrompt& prompt, const HoldOptions& options) const override;

  llama_model* get() const { return model_.get(); }
  const llama_vocab* vocabulary() const { return llama_model_get_vocab(model_.get()); }
  /// The bytes of a token; none of a control token where `special` is false.
  std::string piece(TokenId id, bool special) const;
  engine::PoolExecutor executor() const { return {pool_.get()}; }
  /// Why the model's own template does not lay conversations out, and llama.cpp's list of templates does;
  /// empty where the own does.
  const std::string& why_not_own_template() const { return why_not_own_template_; }
  /// Tokens that a layer with a sliding window holds of so many.
  std::size_t sliding_rows(std::size_t tokens) const;
  /// Throws engine::Error where a prompt of so many tokens is none, or too long.
  void check_length(std::size_t tokens) const;

  struct ContextOptions {
    engine::KvType type = engine::KvType::f32;
    std::size_t cells = 0;
    std::uint32_t sequences = 1;
    std::uint32_t batch = 512;  ///< most tokens at a time
    compresskv::llama_cpp::Observer* observer = nullptr;
    ShownAttention* attention = nullptr;  ///< in place of an observer
  };
  /// Throws engine::Error.
  LlamaContext make_context(const ContextOptions& options) const;

  /// Reads a prompt behind what sequence 0 holds; `progress` hears of the tokens read. The last token has
  /// logits.
  void read(llama_context* context, compresskv::llama_cpp::Observer* observer,
            std::span<const TokenId> prompt, const std::function<void(std::size_t)>& progress) const;

  /// One token behind those of sequence 0; its logits.
  std::span<const float> decode(llama_context* context, TokenId token,
                                compresskv::llama_cpp::Observer* observer = nullptr) const;

  std::span<const float> logits(llama_context* context) const;

 private:
  engine::PromptText lay_out_by_list(std::span<const engine::ChatMessage> messages) const;

  std::unique_ptr<llama_model, FreeLlama> model_;
  std::unique_ptr<engine::ThreadPool> pool_;
  std::string path_;
  std::optional<engine::ChatTemplate> template_;  // the model's own
  std::string why_not_own_template_;
  mutable bool said_ = false;                    // that it is not the one
  mutable std::vector<std::size_t> compressed_;  // empty: not asked for yet
};

/// Positions that each layer keeps, as RunResult::kept has them.
std::vector<std::vector<std::vector<std::uint32_t>>> kept_by(const compresskv::llama_cpp::Sequence& sequence);

/// Text of tokens as they come, without parts of characters.
class LlamaText {
 public:
  explicit LlamaText(const LlamaModel& model) : model_(&model) {}
  std::string push(TokenId id);
  std::string finish();

 private:
  const LlamaModel* model_;
  std::string waiting_;
};

}  // namespace ckv
