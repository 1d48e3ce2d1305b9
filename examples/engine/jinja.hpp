// Jinja, as far as chat templates use it: model files say with it how a conversation is laid out.
//
// What is here gives what Jinja2 gives with trim_blocks and lstrip_blocks, which chat templates are written
// for; what is not here is refused by name and line, when the template is read or when it gets there, never
// guessed. Here: output, comments, white space control; for (filter, else, break, continue), if, set (of
// names, of namespaces, as a block), macro; every operator on texts, whole numbers, lists and mappings;
// slices, conditional expressions; the filters, tests and methods that prompts are made with. Not here:
// tojson, floating-point numbers, and whatever reads another file.
//
// Templates come from files, so that steps, bytes and depth are bounded.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "prompt_text.hpp"

namespace engine {

class JinjaTemplate {
 public:
  /// Throws Error naming what is not understood, and the line.
  explicit JinjaTemplate(std::string_view source);
  ~JinjaTemplate();
  JinjaTemplate(JinjaTemplate&&) noexcept;
  JinjaTemplate& operator=(JinjaTemplate&&) noexcept;

  struct Input {
    std::span<const ChatMessage> messages;
    bool add_generation_prompt = true;
    std::string_view bos;  ///< bos_token
    std::string_view eos;  ///< eos_token
  };

  /// The template's text for these messages. `tools` and `documents` are none, as where other programs have
  /// nothing to give; there is no `strftime_now`, so that a prompt is the same every day.
  /// Throws Error where the template does, where it needs what is not here, and where it goes on too long.
  PromptText render(const Input& input) const;

 private:
  struct Program;
  std::unique_ptr<const Program> program_;
};

}  // namespace engine
