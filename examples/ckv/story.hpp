// A long text as a model would generate it, with words in it that only what came long before tells.
#pragma once

#include <cstddef>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "model_engine.hpp"

namespace ckv {

/// Where a text says again what it has told before. Tokens are counted from the text's begin.
struct Recall {
  std::string expect;
  std::size_t first = 0;
  std::size_t last = 0;  ///< one after
  std::size_t told = 0;  ///< one after the token that told it last
};

struct StorySentence {
  std::string text;           ///< up to the recalled words, where there are any, else whole
  double place = 0.0;         ///< share of the story that lies before it
  std::size_t subject = 0;    ///< a recall is of what the last sentence of its subject told
  std::string recalled = {};  ///< ends the sentence; empty: it tells
};

struct Story {
  std::vector<TokenId> tokens;
  std::vector<Recall> recalls;
};

/// The longest story of at most `tokens` tokens: the sentences in order of their places, and what `filler`
/// says, one sentence a call, evenly between them. Throws engine::Error where the sentences alone are longer.
Story tell(const ModelEngine& loaded, std::span<const StorySentence> sentences,
           const std::function<std::string()>& filler, std::size_t tokens);

}  // namespace ckv
