// Prompts that tell methods apart, made from a long text by seed; after RULER (arXiv 2404.06654).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "needle.hpp"
#include "rule.hpp"
#include "run.hpp"
#include "story.hpp"

namespace ckv {

/// Where a prompt stands in the grid. The same numbers give the same prompt.
struct PromptPlace {
  std::uint64_t seed = 0;
  std::size_t length = 1000;  ///< tokens, template and question included; not exceeded
  std::size_t index = 0;      ///< prompts of one length differ by it
  double depth = 0.5;
};

/// Where a task measures: what.
enum class Measure { none, perplexity, long_loss, attention_error, recalls };

/// Whether it decodes a long text on a budget: `long_loss` or `recalls`.
constexpr bool decodes_on_budget(Measure measure) {
  return measure == Measure::long_loss || measure == Measure::recalls;
}

/// Tokens of such a text after which the cache is cut to its budget again.
inline constexpr std::size_t decode_step = 128;

/// What follows a text that was compressed before anyone knew of it.
struct Later {
  std::vector<TokenId> tokens;  ///< the rest of the user's turn, and the assistant's head
  std::string expect;           ///< a right answer holds it
};

struct TaskPrompt {
  std::vector<TokenId> tokens;                 ///< what is compressed
  std::vector<std::string> expect;             ///< a right answer holds all of these
  compresskv::calibrate::TokenSpan fact = {};  ///< where a single needle stands
  /// A second question, after the answer to the first; `expect` is what it asks for. Empty: none.
  std::vector<TokenId> next_turn = {};
  /// Questions behind `tokens`, which then end with the text; each is answered from a copy of its own. Empty:
  /// `tokens` hold the question.
  std::vector<Later> later = {};
  /// What the text, or what is read later, goes on with, where a task measures instead of asking. Empty: it
  /// asks.
  std::vector<TokenId> continuation = {};
  Measure measure = Measure::none;
  std::vector<Recall> recalls = {};  ///< of `Measure::recalls`: in the continuation
  Rule rule = {};                    ///< what a right answer follows besides; it stands in the system message

  /// Copies of a compressed cache that answer.
  std::size_t copies() const { return later.empty() ? 1 : later.size(); }
};

/// Names of the tasks.
std::vector<std::string> task_names();

/// What each task asks, a line each.
std::string task_help();

/// `none` where it asks, or is no task.
Measure measure_of(std::string_view task);

/// Tokens that the sequence of such a text has, at the least, when its cache is cut to its budget for the
/// last time; 0 where the task is another.
std::size_t tokens_at_last_cut(std::string_view task, std::size_t length);

/// Throws engine::Error for a task of another name, and where the haystack or the length is too short.
TaskPrompt task_prompt(std::string_view task, const ModelEngine& loaded, const Haystack& haystack,
                       const PromptPlace& place);

}  // namespace ckv
