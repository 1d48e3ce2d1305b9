// Any bytes as a GGUF file: refused with an Error, or a file whose tensors can be read, and where they make a
// model, one that computes and whose vocabulary encodes.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <span>
#include <string>
#include <vector>

#include "engine/chat_template.hpp"
#include "engine/error.hpp"
#include "engine/gguf.hpp"
#include "engine/model.hpp"
#include "engine/sequence.hpp"
#include "engine/tokenizer.hpp"

namespace {

void check(bool holds) {
  if (!holds) std::abort();
}

template <class Step>
void may_refuse(const Step& step) {
  try {
    step();
  } catch (const engine::Error& error) {
    check(error.what()[0] != '\0');
  }
}

void run_model(const engine::GgufFile& file) {
  const engine::Model model{file, {.threads = 1}};
  const engine::ModelConfig& config = model.config();
  engine::Sequence sequence{model};
  const std::vector<engine::TokenId> prompt{0, config.vocabulary - 1, 0};
  const auto logits = sequence.prefill(prompt, {});
  check(logits.size() == static_cast<std::size_t>(config.vocabulary));
  check(sequence.decode(0, prompt.size()).size() == logits.size());
}

void use_vocabulary(const engine::GgufFile& file) {
  const engine::Tokenizer tokenizer(engine::tokenizer_spec(file));
  for (std::size_t token = 0; token < tokenizer.size(); ++token) {
    tokenizer.is_end_of_generation(static_cast<engine::TokenId>(token));
  }
  may_refuse([&] { tokenizer.encode("Hi, \xE2\x82\xAC <|im_end|>", {.parse_special = true}); });
  may_refuse([&] {
    const std::vector<engine::ChatMessage> messages{{.role = "user", .content = "Hi "}};
    tokenizer.encode(engine::ChatTemplate(tokenizer).lay_out(messages));
  });
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  may_refuse([&] {
    const auto file = engine::GgufFile::from_bytes(std::as_bytes(std::span{data, size}), "fuzz.gguf");
    std::size_t bytes = 0;
    for (const engine::Tensor& tensor : file.tensors()) bytes += file.read(tensor).size();
    check(bytes <= size);
    for (const engine::MetadataEntry& entry : file.metadata())
      check(!engine::value_text(entry.value).empty());
    may_refuse([&] { run_model(file); });
    may_refuse([&] { use_vocabulary(file); });
  });
  return 0;
}
