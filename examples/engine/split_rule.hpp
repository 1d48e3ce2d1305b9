#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace engine {

/// Cuts text into the pieces that byte-pair merges must not cross, as a vocabulary file's
/// `tokenizer.ggml.pre` names it. A rule is one or more patterns; each cuts every piece that the patterns
/// before it left, into its matches and what lies between them.
///
/// Bytes that are not UTF-8 are never shown to a pattern: each run of them is a piece of its own.
class SplitRule {
 public:
  /// `name` as in the file: gpt-2, smollm, llama-bpe, qwen2, ... (see `names`).
  /// Throws `Error` for a name that is not known.
  explicit SplitRule(std::string_view name);
  ~SplitRule();
  SplitRule(SplitRule&&) noexcept;
  SplitRule& operator=(SplitRule&&) noexcept;

  /// The pieces in order, nothing left out. They point into `text`. May be called from several threads.
  std::vector<std::string_view> split(std::string_view text) const;

  /// Whether a piece that is a token as it stands skips the merges (the vocabularies of Llama 3 and tekken).
  bool whole_piece_first() const { return whole_piece_first_; }

  /// Whether files of this rule begin a text with BOS unless they say otherwise.
  bool adds_bos_by_default() const { return adds_bos_by_default_; }

  /// Every name the constructor takes, for messages and help.
  static std::vector<std::string> names();

 private:
  struct Pattern;

  std::vector<std::unique_ptr<const Pattern>> patterns_;
  bool whole_piece_first_ = false;
  bool adds_bos_by_default_ = false;
};

}  // namespace engine
