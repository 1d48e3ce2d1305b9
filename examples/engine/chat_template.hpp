#pragma once

#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "jinja.hpp"
#include "prompt_text.hpp"

namespace engine {

class Tokenizer;

/// What a template looks like by its markers, for people; nothing depends on it.
enum class ChatFamily { chatml, llama2, llama3, zephyr, mistral, other };

std::string_view name(ChatFamily family);

/// Lays out a conversation as the model was trained to read it: model files carry a Jinja template for it.
class ChatTemplate {
 public:
  /// `bos` and `eos` are the texts that the template's `bos_token` and `eos_token` stand for.
  /// Throws `Error` for no template, and for one that uses what `JinjaTemplate` does not have.
  ChatTemplate(std::string_view jinja, std::string bos, std::string eos);

  /// The template of a model's vocabulary.
  explicit ChatTemplate(const Tokenizer& tokenizer);

  ChatFamily family() const { return family_; }

  /// The conversation, and which of its bytes are the messages': give it to `Tokenizer::encode` as it is, BOS
  /// included where the template writes it.
  /// Throws `Error` for no messages, an unknown role, and where the template refuses the messages.
  PromptText lay_out(std::span<const ChatMessage> messages, bool add_generation_prompt = true) const;

  /// The text of `lay_out` alone. Encoding it as special tokens would let a message forge turns.
  std::string render(std::span<const ChatMessage> messages, bool add_generation_prompt = true) const;

 private:
  JinjaTemplate jinja_;
  ChatFamily family_;
  std::string bos_;
  std::string eos_;
};

}  // namespace engine
