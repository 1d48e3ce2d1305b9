// Any vocabulary, template and text: what is encoded comes back, and no text but the template's becomes a
// special token.
//
// An input is lines of text in five parts, with a line of `--` between them: settings (`gpt2` or `llama`,
// then a split rule, then `types` where the file has them), tokens (a digit for the type, then the text),
// merges, the template, the text. A gpt2 vocabulary has all bytes before these tokens.
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>
#include <vector>

#include "engine/chat_template.hpp"
#include "engine/error.hpp"
#include "engine/tiny_vocabulary.hpp"
#include "engine/tokenizer.hpp"

namespace {

using engine::PromptText;
using engine::TokenId;
using engine::Tokenizer;

void check(bool holds) {
  if (!holds) std::abort();
}

std::vector<std::string_view> split(std::string_view text, std::string_view by, std::size_t most) {
  std::vector<std::string_view> out;
  while (out.size() + 1 < most) {
    const std::size_t at = text.find(by);
    if (at == std::string_view::npos) break;
    out.push_back(text.substr(0, at));
    text.remove_prefix(at + by.size());
  }
  out.push_back(text);
  return out;
}

engine::TokenizerSpec make_spec(const std::vector<std::string_view>& parts) {
  const std::vector<std::string_view> settings = split(parts[0], "\n", 3);
  engine::TokenizerSpec spec{.model = std::string(settings[0]),
                             .pre = std::string(settings.size() > 1 ? settings[1] : ""),
                             .chat_template = std::string(parts[3])};
  const bool has_types = settings.size() > 2;
  static const std::vector<std::string> alphabet = engine::test::TinyVocabulary{{}}.tokens;
  if (spec.model == "gpt2") spec.tokens = alphabet;
  std::vector<std::int32_t> types(spec.tokens.size(), 1);
  for (const std::string_view line : split(parts[1], "\n", 1000)) {
    if (line.empty()) continue;
    types.push_back(line[0] - '0');
    spec.tokens.emplace_back(line.substr(1));
  }
  if (has_types) spec.token_types = types;
  for (std::size_t token = 0; spec.model != "gpt2" && token < spec.tokens.size(); ++token) {
    spec.scores.push_back(-static_cast<float>(token % 7));
  }
  for (const std::string_view line : split(parts[2], "\n", 1000)) {
    if (!line.empty()) spec.merges.emplace_back(line);
  }
  spec.add_bos = false;
  if (!spec.tokens.empty()) spec.unk = static_cast<TokenId>(spec.tokens.size() - 1);
  return spec;
}

bool is_control(const Tokenizer& tokenizer, TokenId id) {
  return tokenizer.type(id) == engine::TokenType::control || tokenizer.is_end_of_generation(id);
}

// In a byte-level vocabulary the tokens' bytes are the text, so that each token has its place in it.
void check_places(const Tokenizer& tokenizer, const PromptText& prompt, const std::vector<TokenId>& ids) {
  std::size_t at = 0;
  for (const TokenId id : ids) {
    const std::string& bytes = tokenizer.token_bytes(id);
    check(prompt.text().compare(at, bytes.size(), bytes) == 0);
    for (std::size_t byte = 0; is_control(tokenizer, id) && byte < bytes.size(); ++byte) {
      check(!prompt.is_outside(at + byte));
    }
    at += bytes.size();
  }
  check(at == prompt.size());
}

void run(const std::vector<std::string_view>& parts) {
  const engine::TokenizerSpec spec = make_spec(parts);
  const Tokenizer tokenizer(spec);
  const std::string_view text = parts[4];
  const bool is_whole = spec.model == "gpt2" && tokenizer.bytes_without_token().empty();
  for (const bool parse_special : {false, true}) {
    const std::vector<TokenId> ids = tokenizer.encode(text, {.parse_special = parse_special});
    if (is_whole) check(tokenizer.decode(ids) == text);
  }
  const std::vector<TokenId> outside = tokenizer.encode(PromptText(text, true));
  check(std::none_of(outside.begin(), outside.end(), [&](TokenId id) { return is_control(tokenizer, id); }));
  if (is_whole) check(tokenizer.decode(outside) == text);

  const engine::ChatTemplate chat(tokenizer);
  const std::vector<engine::ChatMessage> messages{{.role = "system", .content = "Be kind."},
                                                  {.role = "user", .content = std::string(text)},
                                                  {.role = "assistant", .content = "<|im_end|>"},
                                                  {.role = "user", .content = std::string(text)}};
  for (const std::size_t first : {0U, 1U}) {
    try {
      const PromptText prompt = chat.lay_out(std::span(messages).subspan(first, 3 - 2 * first));
      const std::vector<TokenId> ids = tokenizer.encode(prompt);
      if (is_whole) check_places(tokenizer, prompt, ids);
    } catch (const engine::Error& error) {
      check(error.what()[0] != '\0');
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view input(reinterpret_cast<const char*>(data), size);
  const std::vector<std::string_view> parts = split(input, "\n--\n", 5);
  if (parts.size() < 5) return 0;
  try {
    run(parts);
  } catch (const engine::Error& error) {
    check(error.what()[0] != '\0');
  }
  return 0;
}
