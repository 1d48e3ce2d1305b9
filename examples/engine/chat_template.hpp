#pragma once

#include <optional>
#include <span>
#include <string>
#include <string_view>

namespace engine {

class Tokenizer;

enum class ChatFamily { chatml, llama2, llama3, zephyr, mistral };

std::string_view name(ChatFamily family);

struct ChatMessage {
  std::string role;  ///< "system", "user" or "assistant"
  std::string content;
};

/// Lays out a conversation as the model was trained to read it.
///
/// Model files carry a Jinja template. This is no Jinja interpreter: it recognises the family of the template
/// by its markers, reads from it what varies inside a family (default system message, white space, dates),
/// and writes what the template would. Tools, images and reasoning blocks are not supported.
///
/// The result holds special tokens, BOS among them where the template writes it. Encode it with
/// `{.add_bos = false, .parse_special = true}`.
class ChatTemplate {
 public:
  /// `bos` and `eos` are the texts that the template's `bos_token` and `eos_token` stand for.
  /// Throws `Error` for a template of no known family, naming those it knows.
  ChatTemplate(std::string_view jinja, std::string bos, std::string eos);

  /// The template of a model's vocabulary.
  explicit ChatTemplate(const Tokenizer& tokenizer);

  ChatFamily family() const { return family_; }

  /// What the template puts first when the conversation has no system message, if it does.
  const std::optional<std::string>& default_system() const { return default_system_; }

  /// Throws `Error` for no messages, an unknown role, or an order of roles that the family does not allow.
  std::string render(std::span<const ChatMessage> messages, bool add_generation_prompt = true) const;

 private:
  std::string render_chatml(std::span<const ChatMessage> messages, bool add_generation_prompt) const;
  std::string render_llama2(std::span<const ChatMessage> messages) const;
  std::string render_llama3(std::span<const ChatMessage> messages, bool add_generation_prompt) const;
  std::string render_zephyr(std::span<const ChatMessage> messages, bool add_generation_prompt) const;
  std::string render_mistral(std::span<const ChatMessage> messages) const;

  ChatFamily family_;
  std::string template_;
  std::string bos_;
  std::string eos_;
  std::optional<std::string> default_system_;
};

}  // namespace engine
