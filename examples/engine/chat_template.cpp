#include "chat_template.hpp"

#include <algorithm>
#include <regex>
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

// The string literals in the tags of a Jinja text, in order and with escapes resolved. Quotes in the text
// around the tags and in comments are not literals.
std::vector<std::string> string_literals(std::string_view jinja) {
  std::vector<std::string> literals;
  std::size_t at = 0;
  while (at + 1 < jinja.size()) {
    const std::string_view opening = jinja.substr(at, 2);
    if (opening == "{#") {
      at = std::min(jinja.find("#}", at), jinja.size() - 1) + 1;
      continue;
    }
    if (opening != "{{" && opening != "{%") {
      ++at;
      continue;
    }
    const std::string_view closing = opening == "{{" ? "}}" : "%}";
    for (at += 2; at < jinja.size() && jinja.substr(at, 2) != closing; ++at) {
      const char quote = jinja[at];
      if (quote != '\'' && quote != '"') continue;
      std::string literal;
      for (++at; at < jinja.size() && jinja[at] != quote; ++at) {
        if (jinja[at] != '\\' || at + 1 == jinja.size()) {
          literal.push_back(jinja[at]);
          continue;
        }
        const char escaped = jinja[++at];
        literal.push_back(escaped == 'n' ? '\n' : escaped == 't' ? '\t' : escaped == 'r' ? '\r' : escaped);
      }
      literals.push_back(std::move(literal));
    }
  }
  return literals;
}

std::optional<std::string> first_literal(std::string_view jinja, auto accepts) {
  const std::vector<std::string> literals = string_literals(jinja);
  const auto found = std::find_if(literals.begin(), literals.end(), accepts);
  return found == literals.end() ? std::nullopt : std::optional(*found);
}

bool matches(const std::string& text, const char* pattern) {
  return std::regex_search(text, std::regex(pattern));
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
std::optional<std::string> chatml_default_system(std::string_view jinja) {
  constexpr std::string_view begin = "<|im_start|>system\n";
  constexpr std::string_view end = "<|im_end|>\n";
  const auto literal = first_literal(jinja, [&](const std::string& text) {
    return text.size() > begin.size() + end.size() && text.starts_with(begin) && text.ends_with(end);
  });
  if (!literal) return std::nullopt;
  return literal->substr(begin.size(), literal->size() - begin.size() - end.size());
}

// Llama 3.1 and later tell the model two dates in every system message. A template that can ask for today's
// date has a fixed one beside it, which is used here: the same prompt every day.
std::optional<std::string> llama3_dates(std::string_view jinja) {
  if (!contains(jinja, "Cutting Knowledge Date")) return std::nullopt;
  const std::string text(jinja);
  std::smatch date;
  if (!std::regex_search(text, date, std::regex(R"re(date_string\s*=\s*["']([^"']*)["'])re"))) {
    throw Error(
        "the llama3 chat template states dates but sets no date_string; lay the prompt out as raw text");
  }
  return "Cutting Knowledge Date: December 2023\nToday Date: " + date[1].str() + "\n\n";
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
  if (family_ == ChatFamily::chatml) default_system_ = chatml_default_system(template_);
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
  // A line end after a {{ }} tag is part of the output; some templates write it inside the tag instead.
  const bool line_after_turn = matches(template_, R"(eos_token\s*\}\}\n|eos_token\s*\+\s*['"](\\n|\n)['"])");
  std::string text = contains(template_, "bos_token") ? bos_ : "";
  for (const ChatMessage& message : messages) {
    text.append("<|").append(message.role).append("|>\n").append(message.content).append(eos_);
    if (line_after_turn) text.append("\n");
  }
  if (add_generation_prompt) {
    text.append("<|assistant|>");
    if (matches(template_, R"(<\|assistant\|>(\\n|\n)?['"]\s*\}\}\n|<\|assistant\|>(\\n|\n)['"]\s*-?\}\})")) {
      text.append("\n");
    }
  }
  return text;
}

std::string ChatTemplate::render_mistral(std::span<const ChatMessage> messages) const {
  const Turns turns = alternating_turns(messages, family_);
  if (turns.system && !contains(template_, "system_message")) {
    throw Error("this model's chat template takes no system message; put it into the first user message");
  }
  // Releases differ in the blanks around these markers, so the template's own literals are used.
  const std::string open = first_literal(template_, [](const std::string& text) {
                             return contains(text, "[INST]");
                           }).value_or("[INST] ");
  const std::string close = first_literal(template_, [](const std::string& text) {
                              return contains(text, "[/INST]");
                            }).value_or(" [/INST]");
  const bool blank_before_answer = matches(
      template_, R"re((' '|" ")\s*\+\s*message\[['"]content['"]\](\s*\|\s*trim)?\s*\+\s*eos_token)re");
  const bool blank_after_answer = matches(template_, R"re(eos_token\s*\+\s*(' '|" "))re");
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
      text.append(blank_before_answer ? " " : "").append(content).append(eos_);
      if (blank_after_answer) text.append(" ");
    }
  }
  return text;
}

}  // namespace engine
