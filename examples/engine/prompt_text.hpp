// A prompt as text that knows who wrote it, so that only the template's own markers become control tokens.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <utility>

namespace engine {

struct ChatMessage {
  std::string role;  ///< "system", "user" or "assistant"
  std::string content;
};

/// Text, and for each byte whether it comes from outside: from a message, not from the template.
class PromptText {
 public:
  PromptText() = default;
  PromptText(std::string_view text, bool is_outside)
      : text_{text}, outside_(text.size(), is_outside ? '\1' : '\0') {}

  const std::string& text() const { return text_; }
  std::size_t size() const { return text_.size(); }
  bool empty() const { return text_.empty(); }
  bool is_outside(std::size_t at) const { return outside_[at] != '\0'; }

  PromptText& append(const PromptText& more) {
    text_.append(more.text_);
    outside_.append(more.outside_);
    return *this;
  }

  PromptText substr(std::size_t at, std::size_t count = std::string::npos) const {
    PromptText out;
    out.text_ = text_.substr(at, count);
    out.outside_ = outside_.substr(at, count);
    return out;
  }

  /// The same text with other bytes in the same places, by whoever wrote those.
  PromptText with_text(std::string text) const {
    PromptText out = *this;
    out.text_ = std::move(text);
    return out;
  }

 private:
  std::string text_;
  std::string outside_;  // a byte a byte: 0 or 1
};

}  // namespace engine
