#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "token.hpp"

namespace engine {

class GgufFile;
class PromptText;

/// What an entry of the vocabulary is, numbered as in GGUF (`tokenizer.ggml.token_type`).
enum class TokenType : std::int32_t {
  normal = 1,
  unknown = 2,
  control = 3,
  user_defined = 4,
  unused = 5,
  byte = 6
};

/// A vocabulary as the file states it. Plain data, so that tests and other file formats can make one.
struct TokenizerSpec {
  std::string model{};                      ///< "gpt2": byte-level BPE; "llama": SentencePiece BPE
  std::string pre{};                        ///< split rule of "gpt2" vocabularies; "llama" ones have none
  std::vector<std::string> tokens{};        ///< [token]
  std::vector<float> scores{};              ///< [token], "llama" only: higher merges first
  std::vector<std::int32_t> token_types{};  ///< [token], as TokenType; 0 or empty: what the texts look like
  std::vector<std::string> merges{};        ///< "gpt2" only: "left right", best first
  std::optional<TokenId> bos{};
  std::optional<TokenId> eos{};
  std::optional<TokenId> eot{};  ///< end of a chat turn, where it is not `eos`
  std::optional<TokenId> eom{};  ///< end of a message within a turn
  std::optional<TokenId> unk{};
  std::optional<bool> add_bos{};           ///< absent: what the model and split rule usually do
  std::optional<bool> add_space_prefix{};  ///< "llama" only; absent: true
  std::string chat_template{};             ///< Jinja text, or empty
};

/// Reads the vocabulary of a model file. Throws `Error` where a key is missing or has the wrong type, a list
/// has another length than the vocabulary, or a special token's id is neither in it nor 4294967295, which
/// means none.
TokenizerSpec tokenizer_spec(const GgufFile& file);

struct EncodeOptions {
  bool add_bos = true;         ///< begin with BOS where the vocabulary asks for it; false: never
  bool parse_special = false;  ///< control tokens written in the text become those tokens; false: plain text
};

struct DecodeOptions {
  bool skip_special = false;  ///< leave control and unknown tokens out
};

/// Text to token ids and back.
///
/// Byte-level BPE ("gpt2") takes any bytes, valid UTF-8 or not, and gives them back unchanged, but for bytes
/// that have no token in the vocabulary (`bytes_without_token`): those are left out, as the reference
/// implementations do. No Unicode normalisation is applied: a vocabulary made for NFC text wants NFC text.
///
/// SentencePiece ("llama") writes U+2581 for a space and puts one before the text, and before what follows a
/// control token, where the vocabulary asks for a space prefix. A character without a token becomes its
/// bytes' tokens, or the unknown token where the vocabulary has none; bytes that are not UTF-8 are treated
/// alike.
///
/// User-defined tokens are recognised wherever they are written, control tokens when asked; where several
/// fit, the leftmost, and of these the longest, is taken.
///
/// What a token is, its text decides where the file does not say or says otherwise: a token that is known to
/// end a turn is a control token, and so is one written <|like this|> that is said to be plain text.
///
/// Immutable; may be shared by threads. Encoding n bytes costs O(n log n), whatever the vocabulary.
class Tokenizer {
 public:
  /// Throws `Error` for an unknown model or split rule and for a vocabulary that contradicts itself.
  explicit Tokenizer(TokenizerSpec spec);
  ~Tokenizer();
  Tokenizer(Tokenizer&&) noexcept;
  Tokenizer& operator=(Tokenizer&&) noexcept;

  std::vector<TokenId> encode(std::string_view text, EncodeOptions options = {}) const;

  /// A prompt as its template laid it out: what the template wrote may be control tokens, what comes from
  /// outside never is, nor a token of both, nor a user-defined token that looks like a marker of turns or
  /// stands in the template. Never adds BOS.
  std::vector<TokenId> encode(const PromptText& prompt) const;

  /// The text of `ids`; the space prefix that `encode` puts in is taken out again. The bytes need not be
  /// UTF-8 when the ids were not made from it. Throws `Error` for an id outside the vocabulary.
  std::string decode(std::span<const TokenId> ids, DecodeOptions options = {}) const;

  /// The bytes that one token stands for. In a "gpt2" vocabulary those of a sequence, joined, are its text.
  const std::string& token_bytes(TokenId id) const;

  /// The token as the vocabulary writes it.
  const std::string& token_text(TokenId id) const;

  /// The token that the vocabulary writes as `token_text`.
  std::optional<TokenId> find(std::string_view token_text) const;

  std::size_t size() const;
  std::optional<TokenId> bos() const;
  std::optional<TokenId> eos() const;
  bool adds_bos() const;  ///< whether `encode` begins with BOS
  TokenType type(TokenId id) const;
  bool is_special(TokenId id) const;  ///< control or unknown

  /// Whether the model stops with this token: EOS, EOT, EOM, and tokens known to end a turn or a text.
  bool is_end_of_generation(TokenId id) const;

  /// The byte values that text loses on the way; empty for a complete vocabulary.
  std::span<const unsigned char> bytes_without_token() const;

  const std::string& chat_template() const;

 private:
  class Impl;
  std::unique_ptr<const Impl> impl_;
};

/// Decodes token by token, as they are generated, and never hands out part of a character: bytes that begin
/// one wait for the rest. All results joined are what `Tokenizer::decode` gives for a text that goes on (no
/// space prefix is taken out). Keeps a reference to the tokenizer.
class StreamDecoder {
 public:
  explicit StreamDecoder(const Tokenizer& tokenizer, DecodeOptions options = {.skip_special = true})
      : tokenizer_(tokenizer), options_(options) {}

  /// What can be shown now; may be empty.
  std::string push(TokenId id);

  /// The bytes still waiting, which then belong to no whole character. Leaves the decoder as new.
  std::string finish();

 private:
  const Tokenizer& tokenizer_;
  DecodeOptions options_;
  std::string waiting_;
};

}  // namespace engine
