// Needles in a haystack: a fact hidden in a long text, and the question that it answers.
#pragma once

#include <compresskv/calibrate/answer_span.hpp>
#include <cstddef>
#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "needle_table.hpp"
#include "run.hpp"

namespace ckv {

/// Whether an answer is right: it holds what is expected, however it is capitalised.
bool holds(std::string_view answer, std::string_view expect);

/// A long text as sentences.
class Haystack {
 public:
  /// Splits after each `.`, `?` or `!` that white space follows. White space becomes single spaces.
  explicit Haystack(std::string_view text);

  /// The King James text, from the program `bible` (Debian's bible-kjv). Throws engine::Error naming it where
  /// it is not installed.
  static Haystack from_bible();
  static Haystack from_file(const std::filesystem::path& path);
  /// The file where one is named, else the King James text.
  static Haystack from(const std::filesystem::path& path);

  std::span<const std::string> sentences() const { return sentences_; }

 private:
  std::vector<std::string> sentences_;
};

struct NeedlePlace {
  std::size_t tokens = 2048;  ///< of the whole prompt, template and question included; not exceeded
  double depth = 0.5;         ///< 0: the needle comes first, 1: last
  double start = 0.0;         ///< share of the haystack that is skipped before the text begins
};

struct NeedlePrompt {
  std::vector<TokenId> tokens;
  compresskv::calibrate::TokenSpan needle;  ///< where the fact's tokens stand
};

/// A prompt of at most `place.tokens` tokens: haystack with the needle between two sentences, then the
/// question, in the model's chat template. Throws engine::Error when the haystack or the prompt is too short.
NeedlePrompt needle_prompt(const ModelEngine& loaded, const Haystack& haystack, const Needle& needle,
                           const NeedlePlace& place);

/// A sentence to hide, and how deep.
struct Hidden {
  std::string_view fact;
  double depth = 0.5;  ///< 0: it comes first, 1: last
};

/// What is asked of the model.
struct Request {
  std::string_view question;     ///< behind the text
  std::string_view system = {};  ///< the system message, before the text; empty: what the template writes
};

/// The text of such a prompt with any number of facts: haystack from `start` on with each fact between two
/// sentences, at most `tokens` tokens with the request and the template. Throws as needle_prompt.
engine::PromptText hide(const ModelEngine& loaded, const Haystack& haystack, std::span<const Hidden> facts,
                        const Request& request, std::size_t tokens, double start);

/// Where `part` of `text` stands among the tokens of `text`; part must occur in it.
/// Throws engine::Error where it cannot be found.
compresskv::calibrate::TokenSpan token_span(const ModelEngine& loaded, std::string_view text,
                                            std::span<const TokenId> tokens, std::string_view part);

}  // namespace ckv
