// A little byte-level vocabulary for the tiny model: all bytes, then what a test adds.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "engine/gguf_writer.hpp"
#include "engine/tiny_model.hpp"

namespace engine::test {

// GPT-2's alphabet, written out apart from the engine's: the bytes that are printable in Latin-1 stand for
// themselves, the others take the code points from 256 on.
inline std::string alphabet_character(unsigned byte) {
  unsigned stand_in = 256;
  for (unsigned b = 0; b < 256; ++b) {
    const bool printable = (b > 0x20 && b < 0x7F) || (b > 0xA0 && b != 0xAD);
    const unsigned code_point = printable ? b : stand_in++;
    if (b != byte) continue;
    if (code_point < 0x80) return {static_cast<char>(code_point)};
    return {static_cast<char>(0xC0U + code_point / 64), static_cast<char>(0x80U + code_point % 64)};
  }
  return {};
}

struct TinyVocabulary {
  std::vector<std::string> tokens;
  std::vector<std::int32_t> types;

  /// The bytes have their own values as ids; `more` come after them: text and type.
  explicit TinyVocabulary(const std::vector<std::pair<std::string, std::int32_t>>& more) {
    for (unsigned byte = 0; byte < 256; ++byte) tokens.push_back(alphabet_character(byte));
    types.assign(256, 1);
    for (const auto& [text, type] : more) {
      tokens.push_back(text);
      types.push_back(type);
    }
  }

  void add_to(GgufWriter& writer) const {
    writer.set("tokenizer.ggml.model", std::string{"gpt2"})
        .set("tokenizer.ggml.pre", std::string{"gpt-2"})
        .set_array("tokenizer.ggml.tokens", tokens)
        .set_array("tokenizer.ggml.token_type", types)
        .set_array("tokenizer.ggml.merges", std::vector<std::string>{});
  }
};

}  // namespace engine::test
