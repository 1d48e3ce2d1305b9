#include "chat_template.hpp"

#include <algorithm>
#include <utility>
#include <vector>

#include "error.hpp"
#include "tokenizer.hpp"

namespace engine {
namespace {

bool contains(std::string_view text, std::string_view part) {
  return text.find(part) != std::string_view::npos;
}

// Python's str.strip and Jinja's trim, for ASCII white space.
std::string_view stripped(std::string_view text) {
  constexpr std::string_view white = " \t\n\v\f\r\x1c\x1d\x1e\x1f";
  const std::size_t begin = text.find_first_not_of(white);
  if (begin == std::string_view::npos) return {};
  return text.substr(begin, text.find_last_not_of(white) - begin + 1);
}

// As much of Jinja's grammar as it takes to read a template's literals and what stands beside them. A loop,
// no recursion and no std::regex: templates come from files, and a long one must not exhaust the stack.
struct JinjaToken {
  enum class Kind { text, open, close, literal, word, symbol };
  Kind kind;
  std::string text;  // a literal's with escapes resolved
};

using Kind = JinjaToken::Kind;

bool is_word_character(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_';
}

// The literal whose opening quote is at `at`; leaves `at` behind the closing quote.
std::string read_literal(std::string_view jinja, std::size_t& at) {
  const char quote = jinja[at++];
  std::string literal;
  for (; at < jinja.size() && jinja[at] != quote; ++at) {
    if (jinja[at] != '\\' || at + 1 == jinja.size()) {
      literal.push_back(jinja[at]);
      continue;
    }
    const char escaped = jinja[++at];
    literal.push_back(escaped == 'n' ? '\n' : escaped == 't' ? '\t' : escaped == 'r' ? '\r' : escaped);
  }
  at = std::min(at + 1, jinja.size());
  return literal;
}

// The tokens of one tag, `at` being behind its opening; leaves `at` behind its closing.
void read_tag(std::string_view jinja, std::size_t& at, std::string_view closing,
              std::vector<JinjaToken>& tokens) {
  while (at < jinja.size() && jinja.substr(at, 2) != closing) {
    const char c = jinja[at];
    if (c == '\'' || c == '"') {
      tokens.push_back({.kind = Kind::literal, .text = read_literal(jinja, at)});
    } else if (is_word_character(c)) {
      const std::size_t begin = at;
      while (at < jinja.size() && is_word_character(jinja[at])) ++at;
      tokens.push_back({.kind = Kind::word, .text = std::string(jinja.substr(begin, at - begin))});
    } else {
      if (c != ' ' && c != '\t' && c != '\r' && c != '\n') {
        tokens.push_back({.kind = Kind::symbol, .text = std::string(1, c)});
      }
      ++at;
    }
  }
  if (at < jinja.size()) {
    tokens.push_back({.kind = Kind::close, .text = std::string(closing)});
    at += 2;
  }
}

std::vector<JinjaToken> read_tokens(std::string_view jinja) {
  std::vector<JinjaToken> tokens;
  for (std::size_t at = 0; at < jinja.size();) {
    const std::size_t brace = std::min(jinja.find('{', at), jinja.size());
    const std::string_view opening = jinja.substr(brace, 2);
    const bool is_tag = opening == "{{" || opening == "{%" || opening == "{#";
    const std::size_t text_end = is_tag ? brace : std::min(brace + 1, jinja.size());
    if (text_end > at)
      tokens.push_back({.kind = Kind::text, .text = std::string(jinja.substr(at, text_end - at))});
    at = text_end;
    if (!is_tag) continue;
    at += 2;
    if (opening == "{#") {
      const std::size_t end = jinja.find("#}", at);
      at = end == std::string_view::npos ? jinja.size() : end + 2;
      continue;
    }
    tokens.push_back({.kind = Kind::open, .text = std::string(opening)});
    read_tag(jinja, at, opening == "{{" ? "}}" : "%}", tokens);
  }
  return tokens;
}

bool is(std::span<const JinjaToken> tokens, std::size_t at, Kind kind, std::string_view text) {
  return at < tokens.size() && tokens[at].kind == kind && tokens[at].text == text;
}

// Whether the `}}` at `at` is followed by a line end that is part of the output. One after `%}` is not, with
// the settings that chat templates are written for, nor is one beside a dash, as in `-}}` or `{%-`.
bool line_ends_after(std::span<const JinjaToken> tokens, std::size_t at) {
  if (!is(tokens, at, Kind::close, "}}") || at + 1 == tokens.size()) return false;
  const JinjaToken& next = tokens[at + 1];
  if (next.kind != Kind::text || !next.text.starts_with('\n')) return false;
  const bool taken_by_dash = stripped(next.text).empty() && is(tokens, at + 3, Kind::symbol, "-");
  return !taken_by_dash;
}

std::optional<std::string> first_literal(std::span<const JinjaToken> tokens, auto accepts) {
  for (const JinjaToken& token : tokens) {
    if (token.kind == Kind::literal && accepts(token.text)) return token.text;
  }
  return std::nullopt;
}

// What follows `eos_token` where a message is written: a literal added to it, or a line end after the tag.
std::string after_eos(std::span<const JinjaToken> tokens) {
  for (std::size_t at = 0; at < tokens.size(); ++at) {
    if (!is(tokens, at, Kind::word, "eos_token")) continue;
    if (line_ends_after(tokens, at + 1)) return "\n";
    if (is(tokens, at + 1, Kind::symbol, "+") && at + 2 < tokens.size() &&
        tokens[at + 2].kind == Kind::literal) {
      return tokens[at + 2].text;
    }
  }
  return {};
}

ChatFamily recognise(std::string_view jinja) {
  // Phi-4 (<|im_sep|>) and Phi-3 (<|end|>) share markers with chatml and zephyr but lay messages out
  // otherwise.
  if (contains(jinja, "<|im_start|>") && contains(jinja, "<|im_end|>") && !contains(jinja, "<|im_sep|>")) {
    return ChatFamily::chatml;
  }
  if (contains(jinja, "<|start_header_id|>") && contains(jinja, "<|eot_id|>")) return ChatFamily::llama3;
  if (contains(jinja, "[INST]") && contains(jinja, "[/INST]") && !contains(jinja, "[SYSTEM_PROMPT]")) {
    return contains(jinja, "<<SYS>>") ? ChatFamily::llama2 : ChatFamily::mistral;
  }
  if (contains(jinja, "<|user|>") && contains(jinja, "<|assistant|>") && contains(jinja, "eos_token") &&
      !contains(jinja, "<|end|>")) {
    return ChatFamily::zephyr;
  }
  throw Error(
      jinja.empty()
          ? std::string("the model has no chat template (tokenizer.chat_template); ask it with raw text")
          : "the model's chat template is of no known family; known are chatml, llama2, llama3, zephyr and "
            "mistral. Lay the prompt out by hand as raw text. The template begins: " +
                std::string(jinja.substr(0, 80)));
}

// What a chatml template puts before a conversation without a system message.
std::optional<std::string> chatml_default_system(std::span<const JinjaToken> tokens) {
  constexpr std::string_view begin = "<|im_start|>system\n";
  constexpr std::string_view end = "<|im_end|>\n";
  const auto literal = first_literal(tokens, [&](const std::string& text) {
    return text.size() > begin.size() + end.size() && text.starts_with(begin) && text.ends_with(end);
  });
  if (!literal) return std::nullopt;
  return literal->substr(begin.size(), literal->size() - begin.size() - end.size());
}

// Llama 3.1 and later tell the model two dates in every system message. A template that can ask for today's
// date has a fixed one beside it, which is used here: the same prompt every day.
std::optional<std::string> llama3_dates(std::string_view jinja) {
  if (!contains(jinja, "Cutting Knowledge Date")) return std::nullopt;
  const std::vector<JinjaToken> tokens = read_tokens(jinja);
  for (std::size_t at = 0; at + 2 < tokens.size(); ++at) {
    if (is(tokens, at, Kind::word, "date_string") && is(tokens, at + 1, Kind::symbol, "=") &&
        tokens[at + 2].kind == Kind::literal) {
      return "Cutting Knowledge Date: December 2023\nToday Date: " + tokens[at + 2].text + "\n\n";
    }
  }
  throw Error(
      "the llama3 chat template states dates but sets no date_string; lay the prompt out as raw text");
}

// Splits a leading system message off and checks that user and assistant take turns, the user first.
struct Turns {
  std::optional<std::string> system;
  std::span<const ChatMessage> rest;
};

Turns alternating_turns(std::span<const ChatMessage> messages, ChatFamily family) {
  Turns turns{.system = std::nullopt, .rest = messages};
  if (messages.front().role == "system") {
    turns.system = messages.front().content;
    turns.rest = messages.subspan(1);
  }
  for (std::size_t turn = 0; turn < turns.rest.size(); ++turn) {
    const std::string_view expected = turn % 2 == 0 ? "user" : "assistant";
    if (turns.rest[turn].role != expected) {
      throw Error("message " + std::to_string(turn + messages.size() - turns.rest.size()) + " is from '" +
                  turns.rest[turn].role + "'; the " + std::string(name(family)) + " template wants '" +
                  std::string(expected) +
                  "' there: an optional system message, then user and assistant in turn");
    }
  }
  if (turns.rest.empty()) {
    throw Error("the " + std::string(name(family)) +
                " template wants a user message after the system message");
  }
  return turns;
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
  }
  return "unknown";
}

ChatTemplate::ChatTemplate(std::string_view jinja, std::string bos, std::string eos)
    : family_(recognise(jinja)), template_(jinja), bos_(std::move(bos)), eos_(std::move(eos)) {
  if (family_ == ChatFamily::chatml) default_system_ = chatml_default_system(read_tokens(template_));
  if (family_ == ChatFamily::llama3) default_system_ = llama3_dates(template_);
}

ChatTemplate::ChatTemplate(const Tokenizer& tokenizer)
    : ChatTemplate(tokenizer.chat_template(), tokenizer.bos() ? tokenizer.token_text(*tokenizer.bos()) : "",
                   tokenizer.eos() ? tokenizer.token_text(*tokenizer.eos()) : "") {}

std::string ChatTemplate::render(std::span<const ChatMessage> messages, bool add_generation_prompt) const {
  if (messages.empty()) throw Error("there are no messages to lay out; give at least one");
  for (std::size_t at = 0; at < messages.size(); ++at) {
    const std::string& role = messages[at].role;
    if (role != "system" && role != "user" && role != "assistant") {
      throw Error("message " + std::to_string(at) + " has the role '" + role +
                  "'; roles are system, user and assistant");
    }
  }
  switch (family_) {
    case ChatFamily::chatml:
      return render_chatml(messages, add_generation_prompt);
    case ChatFamily::llama2:
      return render_llama2(messages);
    case ChatFamily::llama3:
      return render_llama3(messages, add_generation_prompt);
    case ChatFamily::zephyr:
      return render_zephyr(messages, add_generation_prompt);
    case ChatFamily::mistral:
      return render_mistral(messages);
  }
  return {};
}

std::string ChatTemplate::render_chatml(std::span<const ChatMessage> messages,
                                        bool add_generation_prompt) const {
  std::string text = contains(template_, "bos_token") ? bos_ : "";
  const auto add = [&](std::string_view role, std::string_view content) {
    text.append("<|im_start|>").append(role).append("\n").append(content).append("<|im_end|>\n");
  };
  if (default_system_ && messages.front().role != "system") add("system", *default_system_);
  for (const ChatMessage& message : messages) add(message.role, message.content);
  if (add_generation_prompt) text.append("<|im_start|>assistant\n");
  return text;
}

std::string ChatTemplate::render_llama2(std::span<const ChatMessage> messages) const {
  const Turns turns = alternating_turns(messages, family_);
  std::string text;
  for (std::size_t turn = 0; turn < turns.rest.size(); ++turn) {
    std::string content = turns.rest[turn].content;
    if (turn == 0 && turns.system) content = "<<SYS>>\n" + *turns.system + "\n<</SYS>>\n\n" + content;
    if (turn % 2 == 0) {
      text.append(bos_).append("[INST] ").append(stripped(content)).append(" [/INST]");
    } else {
      text.append(" ").append(stripped(content)).append(" ").append(eos_);
    }
  }
  return text;
}

std::string ChatTemplate::render_llama3(std::span<const ChatMessage> messages,
                                        bool add_generation_prompt) const {
  std::string text = bos_;
  const auto add = [&](std::string_view role, std::string_view content) {
    text.append("<|start_header_id|>").append(role).append("<|end_header_id|>\n\n").append(content);
  };
  if (default_system_) {
    const bool has_system = messages.front().role == "system";
    add("system", *default_system_);
    if (has_system) text.append(stripped(messages.front().content));
    text.append("<|eot_id|>");
    messages = messages.subspan(has_system ? 1 : 0);
  }
  for (const ChatMessage& message : messages) {
    add(message.role, stripped(message.content));
    text.append("<|eot_id|>");
  }
  if (add_generation_prompt) add("assistant", "");
  return text;
}

std::string ChatTemplate::render_zephyr(std::span<const ChatMessage> messages,
                                        bool add_generation_prompt) const {
  constexpr std::string_view marker = "<|assistant|>";
  const std::vector<JinjaToken> tokens = read_tokens(template_);
  const std::string turn_end = after_eos(tokens);
  std::string text = contains(template_, "bos_token") ? bos_ : "";
  for (const ChatMessage& message : messages) {
    text.append("<|")
        .append(message.role)
        .append("|>\n")
        .append(message.content)
        .append(eos_)
        .append(turn_end);
  }
  if (!add_generation_prompt) return text;
  text.append(marker);
  for (std::size_t at = 0; at + 1 < tokens.size(); ++at) {
    // The generation prompt's literal ends its tag; in a message, content follows.
    const bool ends_tag = is(tokens, at + 1, Kind::close, "}}") || is(tokens, at + 1, Kind::symbol, "-");
    if (tokens[at].kind != Kind::literal || !tokens[at].text.starts_with(marker) || !ends_tag) continue;
    text.append(tokens[at].text, marker.size());
    if (line_ends_after(tokens, at + 1)) text.append("\n");
    break;
  }
  return text;
}

std::string ChatTemplate::render_mistral(std::span<const ChatMessage> messages) const {
  const Turns turns = alternating_turns(messages, family_);
  if (turns.system && !contains(template_, "system_message")) {
    throw Error("this model's chat template takes no system message; put it into the first user message");
  }
  // Releases differ in the blanks around these markers, so the template's own literals are used.
  const std::vector<JinjaToken> tokens = read_tokens(template_);
  const auto literal_with = [&](std::string_view marker) {
    return first_literal(tokens, [&](const std::string& text) { return contains(text, marker); })
        .value_or(std::string(marker));
  };
  const std::string open = literal_with("[INST]");
  const std::string close = literal_with("[/INST]");
  const std::string answer_end = after_eos(tokens);
  bool blank_before_answer = false;
  for (std::size_t at = 0; at < tokens.size(); ++at) {
    if (!is(tokens, at, Kind::literal, " ") || !is(tokens, at + 2, Kind::word, "message")) continue;
    for (std::size_t next = at; next < tokens.size() && tokens[next].kind != Kind::close; ++next) {
      blank_before_answer = blank_before_answer || is(tokens, next, Kind::word, "eos_token");
    }
  }
  const bool system_goes_last = contains(template_, "loop.last and system_message");

  std::string text = bos_;
  for (std::size_t turn = 0; turn < turns.rest.size(); ++turn) {
    const std::string& content = turns.rest[turn].content;
    if (turn % 2 == 0) {
      const bool takes_system = system_goes_last ? turn + 1 == turns.rest.size() : turn == 0;
      text.append(open);
      if (turns.system && takes_system) text.append(*turns.system).append("\n\n");
      text.append(content).append(close);
    } else {
      text.append(blank_before_answer ? " " : "").append(content).append(eos_).append(answer_end);
    }
  }
  return text;
}

}  // namespace engine
