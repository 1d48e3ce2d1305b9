#include "split_rule.hpp"

// PCRE2 wants its character width chosen before its header is read.
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <new>
#include <span>

#include "error.hpp"
#include "utf8.hpp"

namespace engine {
namespace {

// The patterns as their models publish them.

constexpr std::string_view every_numeral = R"(\p{N})";

constexpr std::string_view gpt2_words =
    R"('(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

constexpr std::string_view llama3_words =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*)"
    R"(|\s*[\r\n]+|\s+(?!\S)|\s+)";

constexpr std::string_view qwen2_words =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*)"
    R"(|\s*[\r\n]+|\s+(?!\S)|\s+)";

constexpr std::string_view tekken_words =
    R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+)"
    R"(|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*)"
    R"(|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

struct NamedRule {
  std::string_view name;
  std::array<std::string_view, 2> patterns;  // unused ones are empty
  bool whole_piece_first = false;
  bool adds_bos_by_default = false;
};

constexpr auto rules = std::to_array<NamedRule>({
    {.name = "gpt-2", .patterns = {gpt2_words}},
    {.name = "default", .patterns = {gpt2_words}},
    {.name = "smollm", .patterns = {every_numeral, gpt2_words}},
    {.name = "starcoder", .patterns = {every_numeral, gpt2_words}},
    {.name = "refact", .patterns = {every_numeral, gpt2_words}},
    {.name = "llama-bpe", .patterns = {llama3_words}, .whole_piece_first = true, .adds_bos_by_default = true},
    {.name = "llama3", .patterns = {llama3_words}, .whole_piece_first = true, .adds_bos_by_default = true},
    {.name = "llama-v3", .patterns = {llama3_words}, .whole_piece_first = true, .adds_bos_by_default = true},
    {.name = "qwen2", .patterns = {qwen2_words}},
    {.name = "deepseek-r1-qwen", .patterns = {qwen2_words}},
    {.name = "tekken", .patterns = {tekken_words}, .whole_piece_first = true, .adds_bos_by_default = true},
});

// Unicode's White_Space, which is what \s means to the implementations the patterns come from. PCRE2's own \s
// has U+180E besides.
constexpr std::string_view white_space =
    R"(\t-\r \x{85}\x{A0}\x{1680}\x{2000}-\x{200A}\x{2028}\x{2029}\x{202F}\x{205F}\x{3000})";

// Writes white_space for \s and \S; \S occurs outside brackets only.
std::string with_explicit_space(std::string_view pattern) {
  std::string out;
  bool in_brackets = false;
  for (std::size_t at = 0; at < pattern.size(); ++at) {
    const std::string_view rest = pattern.substr(at);
    if (rest.starts_with(R"(\s)")) {
      out.append(in_brackets ? "" : "[").append(white_space).append(in_brackets ? "" : "]");
      ++at;
    } else if (rest.starts_with(R"(\S)")) {
      out.append("[^").append(white_space).append("]");
      ++at;
    } else {
      if (rest.front() == '[') in_brackets = true;
      if (rest.front() == ']') in_brackets = false;
      out.push_back(rest.front());
    }
  }
  return out;
}

struct Pcre2Free {
  void operator()(pcre2_code* code) const { pcre2_code_free(code); }
  void operator()(pcre2_match_data* data) const { pcre2_match_data_free(data); }
  void operator()(pcre2_match_context* context) const { pcre2_match_context_free(context); }
};

std::string pcre2_message(int code) {
  std::array<PCRE2_UCHAR, 256> text{};
  pcre2_get_error_message(code, text.data(), text.size());
  return {text.begin(), std::find(text.begin(), text.end(), PCRE2_UCHAR{0})};
}

const NamedRule& find_rule(std::string_view name) {
  for (const NamedRule& rule : rules) {
    if (rule.name == name) return rule;
  }
  std::string known;
  for (const NamedRule& rule : rules) known.append(known.empty() ? "" : ", ").append(rule.name);
  throw Error("the vocabulary's split rule (tokenizer.ggml.pre) is '" + std::string(name) +
              "', which is not known here; known are: " + known);
}

}  // namespace

struct SplitRule::Pattern {
  std::unique_ptr<pcre2_code, Pcre2Free> code;

  explicit Pattern(std::string_view published) {
    const std::string pattern = with_explicit_space(published);
    int error = 0;
    std::size_t offset = 0;
    code.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(),
                             PCRE2_UTF | PCRE2_UCP, &error, &offset, nullptr));
    if (!code) {
      throw Error("PCRE2 refuses a split pattern at byte " + std::to_string(offset) + ": " +
                  pcre2_message(error) + "; it must be built with Unicode support");
    }
  }

  // Appends the matches in `text`, which is UTF-8, and what lies between them.
  void cut(std::string_view text, std::vector<std::string_view>& pieces) const {
    const std::unique_ptr<pcre2_match_data, Pcre2Free> match(
        pcre2_match_data_create_from_pattern(code.get(), nullptr));
    const std::unique_ptr<pcre2_match_context, Pcre2Free> context(pcre2_match_context_create(nullptr));
    if (!match || !context) throw std::bad_alloc();
    // Backtracking grows with the longest run of white space, not exponentially, so that long runs may take
    // it.
    pcre2_set_match_limit(context.get(), std::numeric_limits<std::uint32_t>::max());
    pcre2_set_heap_limit(context.get(), std::numeric_limits<std::uint32_t>::max());

    std::size_t done = 0;
    while (done < text.size()) {
      const int found = pcre2_match(code.get(), reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), done,
                                    PCRE2_NO_UTF_CHECK, match.get(), context.get());
      if (found == PCRE2_ERROR_NOMATCH) break;
      if (found < 0) throw Error("PCRE2 gives up on a text: " + pcre2_message(found));
      const std::span<const std::size_t> bounds(pcre2_get_ovector_pointer(match.get()), 2);
      if (bounds[0] > done) pieces.push_back(text.substr(done, bounds[0] - done));
      pieces.push_back(text.substr(bounds[0], bounds[1] - bounds[0]));
      done = bounds[1];
    }
    if (done < text.size()) pieces.push_back(text.substr(done));
  }
};

SplitRule::SplitRule(std::string_view name) {
  const NamedRule& rule = find_rule(name);
  for (const std::string_view pattern : rule.patterns) {
    if (!pattern.empty()) patterns_.push_back(std::make_unique<Pattern>(pattern));
  }
  whole_piece_first_ = rule.whole_piece_first;
  adds_bos_by_default_ = rule.adds_bos_by_default;
}

SplitRule::~SplitRule() = default;
SplitRule::SplitRule(SplitRule&&) noexcept = default;
SplitRule& SplitRule::operator=(SplitRule&&) noexcept = default;

std::vector<std::string_view> SplitRule::split(std::string_view text) const {
  std::vector<std::string_view> pieces;
  std::vector<std::string_view> before;
  std::vector<std::string_view> after;
  std::size_t at = 0;
  while (at < text.size()) {
    const std::size_t begin = at;
    const bool is_utf8 = utf8::character_length(text, at) != 0;
    while (at < text.size()) {
      const std::size_t length = utf8::character_length(text, at);
      if ((length != 0) != is_utf8) break;
      at += is_utf8 ? length : 1;
    }
    const std::string_view run = text.substr(begin, at - begin);
    if (!is_utf8) {
      pieces.push_back(run);
      continue;
    }
    before.assign(1, run);
    for (const auto& pattern : patterns_) {
      after.clear();
      for (const std::string_view piece : before) pattern->cut(piece, after);
      before.swap(after);
    }
    pieces.insert(pieces.end(), before.begin(), before.end());
  }
  return pieces;
}

std::vector<std::string> SplitRule::names() {
  std::vector<std::string> out(rules.size());
  std::transform(rules.begin(), rules.end(), out.begin(),
                 [](const NamedRule& rule) { return std::string(rule.name); });
  return out;
}

}  // namespace engine
