#include "chat_template.hpp"

#include <utility>

#include "error.hpp"
#include "tokenizer.hpp"

namespace engine {
namespace {

ChatFamily recognise(std::string_view jinja) {
  const auto contains = [&](std::string_view part) { return jinja.find(part) != std::string_view::npos; };
  // Phi-4 (<|im_sep|>) and Phi-3 (<|end|>) share markers with chatml and zephyr but lay messages out
  // otherwise.
  if (contains("<|im_start|>") && contains("<|im_end|>") && !contains("<|im_sep|>"))
    return ChatFamily::chatml;
  if (contains("<|start_header_id|>") && contains("<|eot_id|>")) return ChatFamily::llama3;
  if (contains("[INST]") && contains("[/INST]") && !contains("[SYSTEM_PROMPT]")) {
    return contains("<<SYS>>") ? ChatFamily::llama2 : ChatFamily::mistral;
  }
  if (contains("<|user|>") && contains("<|assistant|>") && contains("eos_token") && !contains("<|end|>")) {
    return ChatFamily::zephyr;
  }
  return ChatFamily::other;
}

JinjaTemplate read(std::string_view jinja) {
  if (jinja.empty()) {
    throw Error("the model has no chat template (tokenizer.chat_template); ask it with raw text");
  }
  return JinjaTemplate(jinja);
}

}  // namespace

std::string_view name(ChatFamily family) {
  switch (family) {
    case ChatFamily::chatml:
      return "chatml";
    case ChatFamily::llama2:
      return "llama2";
    case ChatFamily::llama3:
      return "llama3";
    case ChatFamily::zephyr:
      return "zephyr";
    case ChatFamily::mistral:
      return "mistral";
    case ChatFamily::other:
      return "other";
  }
  return "other";
}

ChatTemplate::ChatTemplate(std::string_view jinja, std::string bos, std::string eos)
    : jinja_(read(jinja)), family_(recognise(jinja)), bos_(std::move(bos)), eos_(std::move(eos)) {}

ChatTemplate::ChatTemplate(const Tokenizer& tokenizer)
    : ChatTemplate(tokenizer.chat_template(), tokenizer.bos() ? tokenizer.token_text(*tokenizer.bos()) : "",
                   tokenizer.eos() ? tokenizer.token_text(*tokenizer.eos()) : "") {}

PromptText ChatTemplate::lay_out(std::span<const ChatMessage> messages, bool add_generation_prompt) const {
  if (messages.empty()) throw Error("there are no messages to lay out; give at least one");
  for (std::size_t at = 0; at < messages.size(); ++at) {
    const std::string& role = messages[at].role;
    if (role != "system" && role != "user" && role != "assistant") {
      throw Error("message " + std::to_string(at) + " has the role '" + role +
                  "'; roles are system, user and assistant");
    }
  }
  return jinja_.render(
      {.messages = messages, .add_generation_prompt = add_generation_prompt, .bos = bos_, .eos = eos_});
}

std::string ChatTemplate::render(std::span<const ChatMessage> messages, bool add_generation_prompt) const {
  return lay_out(messages, add_generation_prompt).text();
}

}  // namespace engine
