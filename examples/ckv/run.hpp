// What every subcommand does: load a model, read a prompt, shrink each layer as it ends its prefill, decode.
#pragma once

#include <chrono>
#include <compresskv/compresskv.hpp>
#include <compresskv/view/any_kv.hpp>
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

#include "engine/chat_template.hpp"
#include "engine/gguf.hpp"
#include "engine/kv_cache.hpp"
#include "engine/model.hpp"
#include "engine/sequence.hpp"
#include "engine/thread_pool.hpp"
#include "engine/tokenizer.hpp"
#include "method.hpp"
#include "model_engine.hpp"

namespace ckv {

using Clock = std::chrono::steady_clock;
double milliseconds_since(Clock::time_point start);

/// A model file with all that is read from it: a model in the small engine.
class LoadedModel final : public ModelEngine {
 public:
  LoadedModel(std::filesystem::path model_path, engine::GgufFile model_file, int threads);

  std::string_view engine_name() const override { return small_engine; }
  std::size_t layers() const override { return static_cast<std::size_t>(model.config().layers); }
  std::size_t context() const override { return model.config().context; }
  int threads() const override { return model.threads(); }
  compresskv::ModelShape shape(engine::KvType type) const override;
  std::optional<compresskv::OutputWeights> output_weights() const override;
  engine::PromptText lay_out(std::span<const engine::ChatMessage> messages) const override;
  std::vector<TokenId> encode(const engine::PromptText& prompt) const override;
  std::vector<TokenId> encode(std::string_view text, bool parse_special) const override;
  std::optional<TokenId> bos() const override;
  std::string token_bytes(TokenId id) const override { return tokenizer.token_bytes(id); }
  RunResult run(std::span<const TokenId> prompt, const Compression& how,
                const RunOptions& options) const override;
  std::string answer(std::span<const TokenId> prompt, std::size_t max_new_tokens,
                     const AnswerSteps& steps) const override;
  std::unique_ptr<HeldPrompt> hold(const TaskPrompt& prompt, const HoldOptions& options) const override;

  std::filesystem::path path;
  engine::GgufFile file;
  engine::Model model;
  engine::Tokenizer tokenizer;

 private:
  /// [layer][embedding][head * head_dim], once asked for: the model has them in the order of its products.
  mutable std::vector<std::vector<float>> output_rows_;
};

/// Throws engine::Error. `threads` 0: as many as the machine has.
LoadedModel load_model(const std::filesystem::path& path, int threads);

/// The model's shape as the library wants it, with the bytes of a row of this element type.
compresskv::ModelShape shape_of(const engine::ModelConfig& config, engine::KvType type);

/// Throws compresskv::FileError, naming file, layer and head, where calibration files are not of a model of
/// this shape. `heads`: a ranking or raw scores; an empty path is no file.
void check_calibration(const std::filesystem::path& heads, const std::filesystem::path& errors,
                       const compresskv::ModelShape& shape);

/// Keys and values of a layer that has ended its prefill, as the library sees them.
template <typename T>
compresskv::StridedKv<T> view_of(const engine::LayerView& layer) {
  return {layer.keys<T>(), layer.values<T>(),
          compresskv::KvShape{.kv_heads = static_cast<std::size_t>(layer.kv_heads),
                              .rows = layer.rows,
                              .head_dim = static_cast<std::size_t>(layer.head_dim),
                              .allocated_rows = layer.allocated_rows,
                              .head_rows = layer.head_rows},
          compresskv::layout::head_token_dim};
}

/// The same whatever its element type.
compresskv::AnyKv any_view_of(const engine::LayerView& layer);

/// The last queries of the tokens just read, as the library sees them.
compresskv::QueryWindow<float> queries_of(const engine::LayerView& layer);

/// The same gathered from chunk to chunk: a chunk may be shorter than the window.
class RecentQueries {
 public:
  RecentQueries(const engine::ModelConfig& config, std::size_t window);

  /// Adds those of the chunk just read; the last `window` of the layer so far, valid until the next call.
  compresskv::QueryWindow<float> add(const engine::LayerView& layer);

  /// Adds those of a decoded token, [heads][head_dim].
  void add(int layer, std::span<const float> queries);

  /// The last `window` queries of the layer so far, valid until more are added.
  compresskv::QueryWindow<float> view(int layer) const;

 private:
  std::vector<compresskv::RecentQueries<float>> layers_;
};

/// What goes into each layer's attention, gathered from chunk to chunk.
class HeldStates {
 public:
  explicit HeldStates(const engine::ModelConfig& config);

  /// Adds those of the tokens just read; those of the layer that are held, valid until the next call.
  compresskv::HiddenStates<float> add(const engine::LayerView& layer);

  /// Those of a layer's last `tokens` tokens are held on to, others let go.
  void keep(int layer, std::size_t tokens);

  compresskv::HiddenStates<float> view(int layer) const;

 private:
  std::size_t hidden_size_;
  std::vector<std::vector<float>> layers_;  // [layer], [token][hidden_size]
};

/// Positions of a layer's rows: one list where all KV heads share it, else one a KV head.
std::vector<std::vector<std::uint32_t>> positions_of(const compresskv::Retained& kept);

/// The layer holds what the library has kept of it; the rest of its memory goes back.
void give_back(engine::LayerView& layer, const compresskv::Retained& kept);

/// Compresses one layer where it lies, by these queries, and gives its memory back.
template <class Compressor>
const compresskv::Retained& compress_layer(Compressor& compressor, engine::LayerView& layer,
                                           const compresskv::QueryWindow<float>& queries) {
  return engine::with_kv_type(layer.type, [&]<typename T>(T*) -> const compresskv::Retained& {
    const compresskv::Retained& kept =
        compressor.compress(static_cast<std::size_t>(layer.layer), view_of<T>(layer), queries);
    give_back(layer, kept);
    return kept;
  });
}

template <class Compressor>
const compresskv::Retained& compress_layer(Compressor& compressor, engine::LayerView& layer) {
  return compress_layer(compressor, layer, queries_of(layer));
}

/// `ModelEngine::chat_prompt`.
inline engine::PromptText chat_prompt(const ModelEngine& loaded, const std::string& message) {
  return loaded.chat_prompt(message);
}

/// A user's text without the byte-order mark that some editors put first. Throws engine::Error where it is no
/// UTF-8 but UTF-16, or holds NUL; `from` names it in the message: an option, a file.
std::string checked_text(std::string text, std::string_view from);

/// A text with a question under it, as one message; without a question the text alone.
std::string message_text(std::string_view text, std::string_view question);

/// Tokens of a laid out prompt: the template's markers become control tokens, a message's never.
inline std::vector<TokenId> encode_prompt(const ModelEngine& loaded, const engine::PromptText& prompt) {
  return loaded.encode(prompt);
}

/// Tokens of a text that holds its special tokens already.
inline std::vector<TokenId> encode_prompt(const ModelEngine& loaded, std::string_view text) {
  return loaded.encode(text, true);
}

/// What the template writes between an answer and the next one. Throws engine::Error where it writes a turn
/// otherwise once there is another one.
std::vector<TokenId> next_turn(const ModelEngine& loaded, const std::string& message);

/// Greedy decoding up to the end token; `picked` hears of each token before it is fed.
void decode_greedily(const LoadedModel& loaded, engine::Sequence& sequence, std::size_t max_new_tokens,
                     const std::function<void(TokenId)>& picked);

class PromptCompressor;

/// A text that was read and compressed before its question is known.
struct Context {
  engine::Sequence sequence;
  std::unique_ptr<PromptCompressor> compressor;  ///< none: the full cache
  std::vector<TokenId> tokens;
  RunResult result;  ///< what reading it took, and what it kept

  Context(engine::Sequence of, std::span<const TokenId> read);
  Context(Context&&) noexcept;
  ~Context();
};

/// Tokens of the template's head and a user's text: as many as are the same whatever question follows it.
/// Throws engine::Error where the text is blank.
std::vector<TokenId> context_tokens(const ModelEngine& loaded, const std::string& text);

/// What follows them: the question, the end of the user's turn and the assistant's head. Both together are
/// the tokens of the whole chat. Throws engine::Error where they are not, whatever follows.
std::vector<TokenId> rest_of_chat(const ModelEngine& loaded, const std::string& text,
                                  std::span<const TokenId> context, const std::string& question);

/// Reads a text and compresses each layer as soon as it is done. Throws as `run`.
Context read_context(const LoadedModel& loaded, std::span<const TokenId> tokens, const Compression& how,
                     const RunOptions& options);

/// Reads what follows the text at its true positions and decodes until the model ends its answer. The context
/// has then gone on, and is of no more use. Throws as `run`.
RunResult ask(const LoadedModel& loaded, Context& context, std::span<const TokenId> rest,
              const Compression& how, const RunOptions& options);

/// Reads the prompt, compresses each layer as soon as it is done, and decodes until the model ends its
/// answer. In chunks, that is with the last one; with `working_rows` also with each before. With
/// `decode_every` layers are compressed again while the answer grows.
/// Throws Interrupted after Ctrl-C, engine::Error and compresskv::Error as they do.
RunResult run(const LoadedModel& loaded, std::span<const TokenId> prompt, const Compression& how,
              const RunOptions& options);

}  // namespace ckv
