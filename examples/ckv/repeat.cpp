#include "repeat.hpp"

#include <fmt/core.h>

#include <algorithm>

#include "engine/error.hpp"
#include "terminal.hpp"

namespace ckv {

std::vector<TokenId> repeat_request(const ModelEngine& loaded, std::span<const TokenId> context,
                                    std::size_t first) {
  std::string message = "Repeat the previous context exactly.";
  if (first > 0) {
    constexpr std::size_t tokens_named = 8;
    const std::size_t named = std::min(first, tokens_named);
    std::string before;
    for (const TokenId token : context.subspan(first - named, named)) {
      before += loaded.token_bytes(token);
    }
    message = fmt::format("Repeat the part of the previous context exactly, starting with {}", before);
  }
  try {
    return next_turn(loaded, message);
  } catch (const engine::Error&) {  // a model without a chat template that goes on
    return loaded.encode(fmt::format("\n\n{}\n\n", message), false);
  }
}

void repeat_context(const LoadedModel& loaded, engine::Sequence& sequence, std::span<const TokenId> context,
                    const ShowRepeats& show, std::size_t at_once) {
  for (std::size_t first = 0; first < context.size(); first += at_once) {
    const std::size_t count = std::min(at_once, context.size() - first);
    std::vector<TokenId> tokens = repeat_request(loaded, context, first);
    tokens.insert(tokens.end(), context.begin() + static_cast<std::ptrdiff_t>(first),
                  context.begin() + static_cast<std::ptrdiff_t>(first + count));
    if (context.size() + tokens.size() > loaded.model.config().context) {
      throw engine::Error(fmt::format(
          "the context of {} tokens and {} that repeat part of it are more than the model's {}: give "
          "a shorter one, or a method that repeats nothing",
          context.size(), tokens.size(), loaded.model.config().context));
    }
    const auto on_layer = [&](engine::LayerView& layer) {
      show(layer, {.first = first, .last = first + count});
      check_interrupt();
    };
    sequence.prefill(tokens, {.window = count, .on_layer = on_layer, .on_logits = {}});
    sequence.truncate(context.size());
  }
  // The logits are again those of the context's last token.
  sequence.truncate(context.size() - 1);
  sequence.prefill(context.last(1));
}

void repeat_context(const LoadedModel& loaded, engine::Sequence& sequence, std::span<const TokenId> context,
                    std::span<PromptCompressor* const> compressors, std::size_t at_once) {
  const auto show = [&](engine::LayerView& layer, const compresskv::Stretch& stretch) {
    for (PromptCompressor* compressor : compressors) {
      compressor->observe(layer, stretch);
    }
  };
  repeat_context(loaded, sequence, context, ShowRepeats(show), at_once);
}

}  // namespace ckv
