// What the subcommands ask of a model, whichever engine runs it.
#pragma once

#include <compresskv/core/output_weights.hpp>
#include <compresskv/core/shape.hpp>
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

#include "engine/kv_cache.hpp"
#include "engine/prompt_text.hpp"
#include "engine/sampler.hpp"
#include "engine/token.hpp"
#include "method.hpp"

namespace ckv {

using engine::TokenId;

/// How to run one prompt.
struct RunOptions {
  engine::KvType kv_type = engine::KvType::f32;
  /// Tokens of the prompt that are read at a time; 0: all. What an answer is does not depend on it, unless
  /// Compression::working_rows is given.
  std::size_t prefill_chunk = 0;
  /// Generated tokens after which the cache is compressed to its budget again; 0: never. Not for methods that
  /// reach over layers or want all queries.
  std::size_t decode_every = 0;
  std::size_t max_new_tokens = 128;
  engine::SamplerOptions sampling = {};
  /// Parts of the answer as they come.
  std::function<void(std::string_view)> on_text = {};
  /// Logits of each step, before a token is picked.
  std::function<void(std::span<const float>)> on_logits = {};
  /// After each layer of prefill, chunk after chunk: how many are done.
  std::function<void(std::size_t)> on_layer = {};
};

struct RunResult {
  std::vector<TokenId> tokens;  ///< generated, without the end token
  std::string answer;           ///< their text
  /// Positions kept at the end of prefill: [layer][list][row], one list where all KV heads share it, else one
  /// a KV head. Layers are those of `ModelEngine::compressed_layers`.
  std::vector<std::vector<std::vector<std::uint32_t>>> kept;
  std::uint64_t kv_bytes_full = 0;  ///< prompt tokens x bytes a token
  std::uint64_t kv_bytes_kept = 0;  ///< bytes of the rows kept
  std::uint64_t kv_bytes_peak = 0;  ///< most cache bytes alive at any time of prefill, all layers together
  std::size_t rows_peak = 0;        ///< most rows that a KV head held in decoding
  double prefill_ms = 0.0;          ///< compression included
  double compress_ms = 0.0;         ///< the library's calls, and giving the memory back
  double decode_ms = 0.0;
  std::size_t decode_steps = 0;

  double decode_tokens_per_second() const {
    return decode_steps == 0 ? 0.0 : 1000.0 * static_cast<double>(decode_steps) / decode_ms;
  }
};

/// What hears how an answer comes about, step by step.
struct AnswerSteps {
  /// Attention of the query whose logits give the step's token: probabilities over all tokens so far, of
  /// every head of every layer.
  std::function<void(std::size_t layer, std::size_t head, std::span<const float> row)> on_attention;
  /// Then the token.
  std::function<void(TokenId)> on_token;
};

struct TaskPrompt;   // tasks.hpp
struct HoldOptions;  // evaluation.hpp
class HeldPrompt;

/// A loaded model in the engine that `--engine` names: the small one of `examples/engine/`, or llama.cpp.
class ModelEngine {
 public:
  ModelEngine() = default;
  virtual ~ModelEngine() = default;

  /// As `--engine` takes it.
  virtual std::string_view engine_name() const = 0;
  virtual std::size_t layers() const = 0;
  virtual std::size_t context() const = 0;  ///< tokens that the model was trained for
  virtual int threads() const = 0;

  /// The model's shape as the library wants it, with the bytes of a row of this element type. Throws
  /// compresskv::ArgumentError where the model's cache cannot be compressed, and says why.
  virtual compresskv::ModelShape shape(engine::KvType type) const = 0;

  /// Layers whose cache methods make smaller, ascending: all but those with a sliding window. Throws as
  /// `shape`.
  virtual std::vector<std::size_t> compressed_layers() const;

  /// The model's output weights, which live as long as it does. Made by the first call, so that no other
  /// thread may call then; none where the engine does not show them.
  virtual std::optional<compresskv::OutputWeights> output_weights() const { return std::nullopt; }

  /// Gives a method of this model the output weights, where it needs them.
  void show_outputs(Compression& how) const;

  /// A conversation as the model's chat template lays it out, BOS included where it has one, ready for the
  /// answer. Throws engine::Error where the model has no template, or none that is understood.
  virtual engine::PromptText lay_out(std::span<const engine::ChatMessage> messages) const = 0;
  /// The same for a user's one message.
  engine::PromptText chat_prompt(const std::string& message) const;
  /// Tokens of a laid out prompt: the template's markers become control tokens, a message's never.
  virtual std::vector<TokenId> encode(const engine::PromptText& prompt) const = 0;
  /// Tokens of a text without BOS; special tokens in it are recognised where `parse_special`.
  virtual std::vector<TokenId> encode(std::string_view text, bool parse_special) const = 0;
  /// With which a text begins; none where the vocabulary asks for none.
  virtual std::optional<TokenId> bos() const = 0;
  /// The bytes that a token stands for, as `engine::Tokenizer::token_bytes` has them.
  virtual std::string token_bytes(TokenId id) const = 0;

  /// Reads the prompt, compresses its cache, and decodes until the model ends its answer.
  /// Throws Interrupted after Ctrl-C, engine::Error and compresskv::Error as they do.
  virtual RunResult run(std::span<const TokenId> prompt, const Compression& how,
                        const RunOptions& options) const = 0;

  /// Reads the prompt and answers it greedily from its whole cache; the answer's text. Throws as `run`, and
  /// where `steps` throws: that, or engine::Error with its message.
  virtual std::string answer(std::span<const TokenId> prompt, std::size_t max_new_tokens,
                             const AnswerSteps& steps) const = 0;

  /// Reads a task's prompt, which is to outlive the result. Throws as `run`.
  virtual std::unique_ptr<HeldPrompt> hold(const TaskPrompt& prompt, const HoldOptions& options) const = 0;

 protected:
  ModelEngine(const ModelEngine&) = default;
  ModelEngine(ModelEngine&&) = default;
  ModelEngine& operator=(const ModelEngine&) = default;
  ModelEngine& operator=(ModelEngine&&) = default;
};

inline constexpr std::string_view small_engine = "small";
inline constexpr std::string_view llama_cpp_engine = "llama.cpp";

/// Throws UsageError where this tool was built without the engine.
void check_engine(std::string_view engine);

/// Whether `check_method_of_llama_cpp` lets it pass.
bool goes_with_llama_cpp(Method method);

/// Throws UsageError where it does not go with `--engine llama.cpp`: every layer and KV head has equally many
/// rows there, and attention of all queries is not shown.
void check_method_of_llama_cpp(Method method);

/// Throws engine::Error. `threads` 0: as many as the machine has.
std::unique_ptr<ModelEngine> load_engine(std::string_view engine, const std::filesystem::path& path,
                                         int threads);

}  // namespace ckv
