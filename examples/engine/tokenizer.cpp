#include "tokenizer.hpp"

#include <algorithm>
#include <array>
#include <cstddef>
#include <limits>
#include <queue>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "error.hpp"
#include "gguf.hpp"
#include "prompt_text.hpp"
#include "split_rule.hpp"
#include "utf8.hpp"

namespace engine {
namespace {

constexpr TokenId no_token = -1;
constexpr std::string_view space_mark = "\xE2\x96\x81";  // U+2581, SentencePiece's visible space

std::size_t index(TokenId id) { return static_cast<std::size_t>(id); }

// ---- GPT-2's byte alphabet: each byte is written as a printable character
// ------------------------------------

struct ByteAlphabet {
  std::array<std::string, 256> character_of_byte;
  std::unordered_map<std::string_view, unsigned char> byte_of_character;

  ByteAlphabet() {
    unsigned next_stand_in = 256;
    for (unsigned byte = 0; byte < 256; ++byte) {
      const bool stands_for_itself =
          (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
      const unsigned code_point = stands_for_itself ? byte : next_stand_in++;
      std::string& character = character_of_byte[byte];
      if (code_point < 0x80) {
        character.push_back(static_cast<char>(code_point));
      } else {  // the highest stand-in is U+0143: two bytes are enough
        character.push_back(static_cast<char>(0xC0U | (code_point >> 6U)));
        character.push_back(static_cast<char>(0x80U | (code_point & 0x3FU)));
      }
    }
    for (unsigned byte = 0; byte < 256; ++byte) {
      byte_of_character.emplace(character_of_byte[byte], static_cast<unsigned char>(byte));
    }
  }

  // The bytes that `text` stands for; nothing where it is not written in the alphabet.
  std::optional<std::string> bytes_of(std::string_view text) const {
    std::string out;
    for (std::size_t at = 0; at < text.size();) {
      const std::size_t length = std::max<std::size_t>(utf8::character_length(text, at), 1);
      const auto found = byte_of_character.find(text.substr(at, length));
      if (found == byte_of_character.end()) return std::nullopt;
      out.push_back(static_cast<char>(found->second));
      at += length;
    }
    return out;
  }
};

const ByteAlphabet& byte_alphabet() {
  static const ByteAlphabet alphabet;
  return alphabet;
}

// "<0x0A>" as 0x0A.
std::optional<unsigned char> byte_of_fallback_token(std::string_view text) {
  if (text.size() != 6 || !text.starts_with("<0x") || text.back() != '>') return std::nullopt;
  unsigned value = 0;
  for (const char digit : text.substr(3, 2)) {
    constexpr std::string_view digits = "0123456789ABCDEF";
    const std::size_t at = digits.find(digit);
    if (at == std::string_view::npos) return std::nullopt;
    value = value * 16 + static_cast<unsigned>(at);
  }
  return static_cast<unsigned char>(value);
}

std::string replace_all(std::string_view text, std::string_view what, std::string_view with) {
  std::string out;
  std::size_t done = 0;
  for (std::size_t at = text.find(what); at != std::string_view::npos; at = text.find(what, done)) {
    out.append(text, done, at - done).append(with);
    done = at + what.size();
  }
  return out.append(text.substr(done));
}

// ---- what both kinds of vocabulary share: symbols in a row, merged best pair first
// ---------------------------

struct Symbol {
  std::size_t begin = 0;   // in the text
  std::size_t length = 0;  // 0: merged into its left neighbour
  TokenId id = no_token;
  std::size_t previous = none;
  std::size_t next = none;

  static constexpr std::size_t none = std::numeric_limits<std::size_t>::max();
};

template <class Priority>
struct Merge {
  Priority priority;  // the smallest first
  std::size_t left = 0;
  std::size_t right = 0;
  std::size_t length = 0;  // of both together, to tell a merge that other merges have overtaken
  TokenId id = no_token;

  bool operator<(const Merge& other) const {  // std::priority_queue takes the greatest
    return priority != other.priority ? priority > other.priority : left > other.left;
  }
};

// Merges neighbours, best pair first and leftmost among equals, until no pair can merge.
// `propose(left, right)` gives the merge of two neighbouring symbols, if there is one.
template <class Priority, class Propose>
void merge_symbols(std::vector<Symbol>& symbols, const Propose& propose) {
  std::priority_queue<Merge<Priority>> queue;
  const auto consider = [&](std::size_t left, std::size_t right) {
    if (left == Symbol::none || right == Symbol::none) return;
    const std::optional<std::pair<Priority, TokenId>> merge = propose(symbols[left], symbols[right]);
    if (!merge) return;
    queue.push({.priority = merge->first,
                .left = left,
                .right = right,
                .length = symbols[left].length + symbols[right].length,
                .id = merge->second});
  };
  for (std::size_t right = 1; right < symbols.size(); ++right) consider(right - 1, right);
  while (!queue.empty()) {
    const Merge<Priority> merge = queue.top();
    queue.pop();
    Symbol& left = symbols[merge.left];
    Symbol& right = symbols[merge.right];
    if (left.length == 0 || right.length == 0 || left.length + right.length != merge.length) continue;
    left.length = merge.length;
    left.id = merge.id;
    left.next = right.next;
    right.length = 0;
    if (left.next != Symbol::none) symbols[left.next].previous = merge.left;
    consider(left.previous, merge.left);
    consider(merge.left, left.next);
  }
}

void chain(std::vector<Symbol>& symbols) {
  for (std::size_t at = 0; at < symbols.size(); ++at) {
    symbols[at].previous = at == 0 ? Symbol::none : at - 1;
    symbols[at].next = at + 1 == symbols.size() ? Symbol::none : at + 1;
  }
}

// ---- which tokens are special, by their texts
// -------------------------------------------------------------------

// Tokens that end a turn, a message or a text in the model families we know, whatever the file calls its EOS.
constexpr auto known_end_tokens = std::to_array<std::string_view>({
    "</s>",
    "<EOT>",
    "< EOT >",
    "<end_of_turn>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|call|>",
    "<|calls|>",
    "<|end|>",
    "<|end_of_text|>",
    "<|end_of_turn|>",
    "<|endofturn|>",
    "<|endoftext|>",
    "<|eom|>",
    "<|eom_id|>",
    "<|eot|>",
    "<|eot_id|>",
    "<|flush|>",
    "<|im_end|>",
    "<|return|>",
    "<\xEF\xBD\x9C"
    "end\xE2\x96\x81of\xE2\x96\x81sentence\xEF\xBD\x9C>",
    "[EOS]",
    "[EOT]",
    "_<EOT>",
    "_< EOT >",
});

bool is_known_end(std::string_view text) {
  return std::find(known_end_tokens.begin(), known_end_tokens.end(), text) != known_end_tokens.end();
}

// <|like this|>, with narrow or wide bars.
bool is_barred(std::string_view text) {
  constexpr std::string_view wide_bar = "\xEF\xBD\x9C";
  if (text.starts_with("<|") && text.ends_with("|>")) return text.size() > 4;
  return text.size() > 2 + 2 * wide_bar.size() && text.substr(1).starts_with(wide_bar) &&
         text.front() == '<' && text.back() == '>' && text.substr(0, text.size() - 1).ends_with(wide_bar);
}

// <like this> or [like this]: as markers are written, and much else.
bool is_bracketed(std::string_view text) {
  return text.size() > 2 &&
         ((text.front() == '<' && text.back() == '>') || (text.front() == '[' && text.back() == ']'));
}

bool is_role(std::string_view text) {
  constexpr auto roles = std::to_array<std::string_view>(
      {"system", "user", "assistant", "human", "bot", "model", "gpt", "tool"});
  return std::find(roles.begin(), roles.end(), text) != roles.end();
}

// What stands in brackets in a template, brackets included: <s>, [INST], <<SYS>>.
std::unordered_set<std::string_view> bracketed_in(std::string_view chat_template) {
  constexpr std::size_t longest = 128;
  std::unordered_set<std::string_view> out;
  for (std::size_t at = 0; at < chat_template.size(); ++at) {
    if (chat_template[at] != '<' && chat_template[at] != '[') continue;
    const char closing = chat_template[at] == '<' ? '>' : ']';
    const std::string_view rest = chat_template.substr(at, longest);
    const std::size_t end = rest.find(closing);
    if (end == std::string_view::npos) continue;
    out.insert(rest.substr(0, end + 1));
    if (rest.substr(end + 1).starts_with(closing)) out.insert(rest.substr(0, end + 2));
  }
  return out;
}

// Whether a token looks like a marker of turns, so that nobody but the template may write it.
bool is_marker(std::string_view text, const std::unordered_set<std::string_view>& in_template) {
  if (is_known_end(text) || is_barred(text)) return true;
  if (!is_bracketed(text)) return false;
  const std::string_view inside = text.substr(1, text.size() - 2);
  return is_role(inside.starts_with('/') ? inside.substr(1) : inside) || in_template.contains(text);
}

// ---- finding tokens that are written out: for each place the longest that begins there, in one pass
// ------------

class WrittenTokens {
 public:
  // Texts are added backwards, so that a pass from the end of a text to its beginning knows at each place
  // what begins there (Aho and Corasick, 1975). Of equal texts the first stays.
  void add(std::string_view text, TokenId id) {
    std::size_t node = 0;
    for (auto at = text.rbegin(); at != text.rend(); ++at) {
      const auto byte = static_cast<unsigned char>(*at);
      const auto [edge, is_new] = edges_.try_emplace(key(node, byte), nodes_.size());
      if (is_new) {
        nodes_.push_back({.sibling = nodes_[node].child, .byte = byte});
        nodes_[node].child = edge->second;
      }
      node = edge->second;
    }
    if (nodes_[node].longest == no_token) nodes_[node].longest = id;
  }

  // After the last `add`: where to go on when a byte does not fit.
  void finish() {
    std::vector<std::size_t> row{0};  // breadth first
    for (std::size_t at = 0; at < row.size(); ++at) {
      const std::size_t node = row[at];
      for (std::size_t child = nodes_[node].child; child != 0; child = nodes_[child].sibling) {
        nodes_[child].back = node == 0 ? 0 : follow(nodes_[node].back, nodes_[child].byte);
        if (nodes_[child].longest == no_token) nodes_[child].longest = nodes_[nodes_[child].back].longest;
        row.push_back(child);
      }
    }
  }

  bool empty() const { return nodes_.size() == 1; }

  // Sets `longest[i]` where a token begins at byte i of `text`; leaves the others.
  void find(std::string_view text, std::span<TokenId> longest) const {
    if (empty()) return;
    std::size_t node = 0;
    for (std::size_t at = text.size(); at-- > 0;) {
      node = follow(node, static_cast<unsigned char>(text[at]));
      if (nodes_[node].longest != no_token) longest[at] = nodes_[node].longest;
    }
  }

 private:
  struct Node {
    TokenId longest = no_token;
    std::size_t back = 0;
    std::size_t child = 0;    // 0: none
    std::size_t sibling = 0;  // 0: none
    unsigned char byte = 0;
  };

  static std::uint64_t key(std::size_t node, unsigned char byte) { return std::uint64_t{node} << 8U | byte; }

  std::size_t follow(std::size_t node, unsigned char byte) const {
    while (true) {
      const auto edge = edges_.find(key(node, byte));
      if (edge != edges_.end()) return edge->second;
      if (node == 0) return 0;
      node = nodes_[node].back;
    }
  }

  std::vector<Node> nodes_{1};
  std::unordered_map<std::uint64_t, std::size_t> edges_;
};

}  // namespace

class Tokenizer::Impl {
 public:
  explicit Impl(TokenizerSpec spec);

  std::vector<TokenId> encode(std::string_view text, EncodeOptions options) const;
  std::vector<TokenId> encode(const PromptText& prompt) const;
  std::string decode(std::span<const TokenId> ids, DecodeOptions options) const;

  std::size_t checked(TokenId id) const {
    if (id < 0 || index(id) >= spec.tokens.size()) {
      throw Error("token id " + std::to_string(id) + " is outside the vocabulary of " +
                  std::to_string(spec.tokens.size()) + " tokens");
    }
    return index(id);
  }
  TokenType type(std::size_t token) const { return types[token]; }
  bool is_special(std::size_t token) const {
    return type(token) == TokenType::control || type(token) == TokenType::unknown;
  }

  TokenizerSpec spec;
  bool add_bos = false;
  std::vector<TokenType> types;    // [token]
  std::vector<std::string> bytes;  // [token]
  std::unordered_map<std::string_view, TokenId> by_text;
  std::vector<bool> ends_generation;  // [token]
  std::vector<unsigned char> bytes_without_token;

 private:
  struct RankedMerge {
    std::size_t rank = 0;
    TokenId id = no_token;
  };

  void check_spec() const;
  void settle_types();
  void index_tokens();
  void index_merges();
  void encode_with(std::span<const TokenId> written, std::string_view text, std::vector<TokenId>& ids) const;
  void encode_plain(std::string_view text, bool after_control, std::vector<TokenId>& ids) const;
  void encode_piece(std::string_view piece, std::vector<TokenId>& ids) const;
  void encode_sentencepiece(std::string_view text, std::vector<TokenId>& ids) const;

  static std::uint64_t pair_key(TokenId left, TokenId right) {
    return static_cast<std::uint64_t>(static_cast<std::uint32_t>(left)) << 32U |
           static_cast<std::uint32_t>(right);
  }

  bool byte_level_ = false;
  bool space_prefix_ = false;
  std::optional<SplitRule> split_rule_;
  std::array<TokenId, 256> byte_token_{};                    // no_token where there is none
  std::unordered_map<std::uint64_t, RankedMerge> merges_;    // byte level, by pair_key
  std::unordered_map<std::string_view, TokenId> mergeable_;  // tokens that text can merge into
  std::unordered_set<std::string_view> markers_in_template_;
  std::size_t longest_mergeable_ = 0;
  WrittenTokens written_;       // all that are recognised in a text as one
  WrittenTokens user_defined_;  // of these the user-defined ones
  WrittenTokens harmless_;      // of these the ones that anybody may write
};

Tokenizer::Impl::Impl(TokenizerSpec given) : spec(std::move(given)) {
  check_spec();
  byte_level_ = spec.model == "gpt2";
  if (byte_level_) {
    split_rule_.emplace(spec.pre.empty() ? "default" : spec.pre);
    add_bos = spec.add_bos.value_or(split_rule_->adds_bos_by_default());
  } else {
    space_prefix_ = spec.add_space_prefix.value_or(true);
    add_bos = spec.add_bos.value_or(true);
  }
  if (add_bos && !spec.bos) {
    throw Error(
        "the vocabulary wants BOS before a text but names none (tokenizer.ggml.bos_token_id is missing)");
  }
  settle_types();
  index_tokens();
  if (byte_level_) index_merges();
}

void Tokenizer::Impl::check_spec() const {
  const std::size_t count = spec.tokens.size();
  if (spec.model != "gpt2" && spec.model != "llama") {
    throw Error("the vocabulary's model (tokenizer.ggml.model) is '" + spec.model +
                "'; known are gpt2 (byte-level BPE) and llama (SentencePiece BPE)");
  }
  if (count == 0) throw Error("the vocabulary (tokenizer.ggml.tokens) is empty");
  if (count > index(std::numeric_limits<TokenId>::max())) {
    throw Error("the vocabulary has " + std::to_string(count) + " tokens; at most " +
                std::to_string(std::numeric_limits<TokenId>::max()) + " can be numbered");
  }
  const auto check_length = [&](std::string_view what, std::size_t length) {
    if (length != count) {
      throw Error(std::string(what) + " has " + std::to_string(length) + " entries for " +
                  std::to_string(count) + " tokens; there must be one a token");
    }
  };
  if (!spec.token_types.empty()) check_length("tokenizer.ggml.token_type", spec.token_types.size());
  for (std::size_t token = 0; token < spec.token_types.size(); ++token) {
    const std::int32_t type = spec.token_types[token];
    if (type < 0 || type > 6) {
      throw Error("tokenizer.ggml.token_type of token " + std::to_string(token) + " is " +
                  std::to_string(type) + "; it must be from 0 (not said) to 6 (byte)");
    }
  }
  if (spec.model == "llama") {
    check_length("tokenizer.ggml.scores", spec.scores.size());
    const auto nan = std::find_if(spec.scores.begin(), spec.scores.end(), [](float s) { return s != s; });
    if (nan != spec.scores.end()) {
      throw Error("tokenizer.ggml.scores of token " + std::to_string(nan - spec.scores.begin()) +
                  " is NaN; merges have no order");
    }
  }
  const auto check_id = [&](std::string_view what, std::optional<TokenId> id) {
    if (id && (*id < 0 || index(*id) >= count)) {
      throw Error("tokenizer.ggml." + std::string(what) + "_token_id is " + std::to_string(*id) +
                  ", outside the vocabulary of " + std::to_string(count) + " tokens");
    }
  };
  check_id("bos", spec.bos);
  check_id("eos", spec.eos);
  check_id("eot", spec.eot);
  check_id("eom", spec.eom);
  check_id("unknown", spec.unk);
}

// The types as the file has them, but where a token's text says that they are wrong or missing: a template's
// marker that is taken for plain text gives another prompt, an end of a turn that is none an endless answer.
void Tokenizer::Impl::settle_types() {
  types.resize(spec.tokens.size());
  markers_in_template_ = bracketed_in(spec.chat_template);
  // Nothing but plain text says as little as no types at all.
  const bool has_types = std::any_of(spec.token_types.begin(), spec.token_types.end(),
                                     [](std::int32_t type) { return type > 1; });
  for (std::size_t token = 0; token < types.size(); ++token) {
    const std::string& text = spec.tokens[token];
    const bool is_untyped = !has_types || spec.token_types[token] == 0;
    types[token] = is_untyped ? TokenType::normal : static_cast<TokenType>(spec.token_types[token]);
    const bool is_plain = types[token] == TokenType::normal;
    if (is_untyped && spec.unk == static_cast<TokenId>(token)) {
      types[token] = TokenType::unknown;
    } else if (is_untyped && !byte_level_ && byte_of_fallback_token(text)) {
      types[token] = TokenType::byte;
    } else if (is_untyped && is_marker(text, markers_in_template_)) {
      types[token] = TokenType::control;
    } else if (is_plain && is_barred(text)) {
      types[token] = TokenType::control;
    } else if (is_known_end(text) && types[token] != TokenType::unknown && !(is_plain && text == "</s>")) {
      types[token] = TokenType::control;  // but a plain </s> is HTML
    }
  }
  for (const std::optional<TokenId> id : {spec.bos, spec.eos, spec.eot, spec.eom}) {
    if (!id || types[index(*id)] != TokenType::normal) continue;
    if (is_bracketed(spec.tokens[index(*id)])) types[index(*id)] = TokenType::control;
  }
}

void Tokenizer::Impl::index_tokens() {
  const std::size_t count = spec.tokens.size();
  bytes.resize(count);
  ends_generation.assign(count, false);
  byte_token_.fill(no_token);
  for (std::size_t token = 0; token < count; ++token) {
    const std::string& text = spec.tokens[token];
    const TokenId id = static_cast<TokenId>(token);
    by_text.emplace(text, id);  // of equal texts, the lowest id stays
    switch (type(token)) {
      case TokenType::normal:
        bytes[token] =
            byte_level_ ? byte_alphabet().bytes_of(text).value_or(text) : replace_all(text, space_mark, " ");
        if (byte_level_) {
          mergeable_.emplace(bytes[token], id);
        } else {
          mergeable_.emplace(text, id);
        }
        break;
      case TokenType::byte: {
        const std::optional<unsigned char> byte = byte_of_fallback_token(text);
        if (!byte) {
          throw Error("token " + std::to_string(token) + " is a byte token but is written '" + text +
                      "'; byte tokens are written like <0x0A>");
        }
        bytes[token] = std::string(1, static_cast<char>(*byte));
        if (byte_token_[*byte] == no_token) byte_token_[*byte] = id;
        break;
      }
      case TokenType::unknown:
      case TokenType::control:
        bytes[token] = text;
        ends_generation[token] = is_known_end(text);
        break;
      case TokenType::user_defined:
        bytes[token] = byte_level_ ? text : replace_all(text, space_mark, " ");
        break;
      case TokenType::unused:
        bytes[token] = text;
        break;
    }
    const bool is_user_defined = type(token) == TokenType::user_defined;
    if (bytes[token].empty() || !(is_special(token) || is_user_defined)) continue;
    written_.add(bytes[token], id);
    if (is_user_defined) user_defined_.add(bytes[token], id);
    if (is_user_defined && !is_marker(text, markers_in_template_)) harmless_.add(bytes[token], id);
  }
  written_.finish();
  user_defined_.finish();
  harmless_.finish();
  for (const auto& [text, id] : mergeable_) longest_mergeable_ = std::max(longest_mergeable_, text.size());
  if (spec.eos) ends_generation[index(*spec.eos)] = true;
  if (spec.eot) ends_generation[index(*spec.eot)] = true;
  if (spec.eom) ends_generation[index(*spec.eom)] = true;
  if (byte_level_) {
    for (unsigned byte = 0; byte < 256; ++byte) {
      const auto found = mergeable_.find(std::string(1, static_cast<char>(byte)));
      if (found != mergeable_.end()) {
        byte_token_[byte] = found->second;
      } else {
        bytes_without_token.push_back(static_cast<unsigned char>(byte));
      }
    }
  }
}

void Tokenizer::Impl::index_merges() {
  merges_.reserve(spec.merges.size());
  for (std::size_t rank = 0; rank < spec.merges.size(); ++rank) {
    const std::string& text = spec.merges[rank];
    const auto token = [&](std::string_view part) {
      const auto found = by_text.find(part);
      if (found == by_text.end()) {
        throw Error("merge " + std::to_string(rank) + " of tokenizer.ggml.merges, '" + text + "', needs '" +
                    std::string(part) + "', which is not in the vocabulary");
      }
      return found->second;
    };
    const std::size_t space = text.find(' ', 1);
    if (space == std::string::npos || space + 1 == text.size()) {
      throw Error("merge " + std::to_string(rank) + " of tokenizer.ggml.merges is '" + text +
                  "'; it must be two tokens with a space between them");
    }
    const std::string_view left = std::string_view(text).substr(0, space);
    const std::string_view right = std::string_view(text).substr(space + 1);
    const TokenId merged = token(std::string(left).append(right));
    // Text does not become a marker by merges either: anybody can write text.
    const bool is_marked =
        is_special(index(merged)) || (type(index(merged)) == TokenType::user_defined &&
                                      is_marker(spec.tokens[index(merged)], markers_in_template_));
    if (!is_marked)
      merges_.emplace(pair_key(token(left), token(right)), RankedMerge{.rank = rank, .id = merged});
  }
  spec.merges = {};  // indexed, and by far the largest part of the spec
}

std::vector<TokenId> Tokenizer::Impl::encode(std::string_view text, EncodeOptions options) const {
  std::vector<TokenId> ids;
  if (options.add_bos && add_bos) ids.push_back(*spec.bos);
  std::vector<TokenId> written(text.size(), no_token);
  (options.parse_special ? written_ : user_defined_).find(text, written);
  encode_with(written, text, ids);
  return ids;
}

std::vector<TokenId> Tokenizer::Impl::encode(const PromptText& prompt) const {
  const std::string_view text = prompt.text();
  std::vector<TokenId> written(text.size(), no_token);
  harmless_.find(text, written);
  std::vector<TokenId> own(text.size(), no_token);
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t begin = at;
    const bool is_outside = prompt.is_outside(begin);
    while (at < text.size() && prompt.is_outside(at) == is_outside) ++at;
    if (!is_outside) written_.find(text.substr(begin, at - begin), std::span(own).subspan(begin, at - begin));
  }
  for (std::size_t at = 0; at < text.size(); ++at) {
    if (own[at] == no_token) continue;
    const bool is_longer =
        written[at] == no_token || bytes[index(own[at])].size() > bytes[index(written[at])].size();
    if (is_longer) written[at] = own[at];
  }
  std::vector<TokenId> ids;
  encode_with(written, text, ids);
  return ids;
}

// `written[i]`: the token that is written out at byte i, if there is one.
void Tokenizer::Impl::encode_with(std::span<const TokenId> written, std::string_view text,
                                  std::vector<TokenId>& ids) const {
  bool after_control = true;  // the beginning counts as such: a space prefix goes there
  std::size_t done = 0;
  for (std::size_t at = 0; at < text.size();) {
    const TokenId id = written[at];
    if (id == no_token) {
      ++at;
      continue;
    }
    // SentencePiece puts the space prefix before a user-defined token too, so that one may stand alone.
    if (at > done || type(index(id)) == TokenType::user_defined) {
      encode_plain(text.substr(done, at - done), after_control, ids);
    }
    ids.push_back(id);
    after_control = type(index(id)) == TokenType::control;
    at += bytes[index(id)].size();
    done = at;
  }
  if (done < text.size()) encode_plain(text.substr(done), after_control, ids);
}

void Tokenizer::Impl::encode_plain(std::string_view text, bool after_control,
                                   std::vector<TokenId>& ids) const {
  if (byte_level_) {
    for (const std::string_view piece : split_rule_->split(text)) encode_piece(piece, ids);
    return;
  }
  std::string marked = after_control && space_prefix_ ? std::string(space_mark) : std::string();
  marked.append(replace_all(text, " ", space_mark));
  encode_sentencepiece(marked, ids);
}

void Tokenizer::Impl::encode_piece(std::string_view piece, std::vector<TokenId>& ids) const {
  if (split_rule_->whole_piece_first()) {
    const auto found = mergeable_.find(piece);
    if (found != mergeable_.end()) {
      ids.push_back(found->second);
      return;
    }
  }
  std::vector<Symbol> symbols;
  symbols.reserve(piece.size());
  for (std::size_t at = 0; at < piece.size(); ++at) {
    const TokenId id = byte_token_[utf8::byte_at(piece, at)];
    // Left out before merging, so that its neighbours meet: what the reference implementation does.
    if (id != no_token) symbols.push_back({.begin = at, .length = 1, .id = id});
  }
  chain(symbols);
  merge_symbols<std::size_t>(symbols, [&](const Symbol& left, const Symbol& right) {
    const auto found = merges_.find(pair_key(left.id, right.id));
    return found == merges_.end() ? std::optional<std::pair<std::size_t, TokenId>>()
                                  : std::optional(std::pair(found->second.rank, found->second.id));
  });
  for (const Symbol& symbol : symbols) {
    if (symbol.length != 0) ids.push_back(symbol.id);
  }
}

void Tokenizer::Impl::encode_sentencepiece(std::string_view text, std::vector<TokenId>& ids) const {
  std::vector<Symbol> symbols;
  symbols.reserve(text.size());
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t length = std::max<std::size_t>(utf8::character_length(text, at), 1);
    const auto found = mergeable_.find(text.substr(at, length));
    symbols.push_back(
        {.begin = at, .length = length, .id = found == mergeable_.end() ? no_token : found->second});
    at += length;
  }
  chain(symbols);
  merge_symbols<float>(symbols, [&](const Symbol& left, const Symbol& right) {
    const std::size_t length = left.length + right.length;
    const auto found =
        length > longest_mergeable_ ? mergeable_.end() : mergeable_.find(text.substr(left.begin, length));
    return found == mergeable_.end()
               ? std::optional<std::pair<float, TokenId>>()
               : std::optional(std::pair(-spec.scores[index(found->second)], found->second));
  });
  bool after_unknown = false;
  for (const Symbol& symbol : symbols) {
    if (symbol.length == 0) continue;
    if (symbol.id != no_token) {
      ids.push_back(symbol.id);
      after_unknown = false;
      continue;
    }
    const std::string_view character = text.substr(symbol.begin, symbol.length);
    const bool has_bytes = std::all_of(character.begin(), character.end(), [&](char byte) {
      return byte_token_[static_cast<unsigned char>(byte)] != no_token;
    });
    if (has_bytes) {
      for (const char byte : character) ids.push_back(byte_token_[static_cast<unsigned char>(byte)]);
      after_unknown = false;
    } else if (spec.unk && !ends_generation[index(*spec.unk)] &&
               type(index(*spec.unk)) != TokenType::control) {
      if (!after_unknown) ids.push_back(*spec.unk);  // one stands for a whole run, as in SentencePiece
      after_unknown = true;
    } else {
      throw Error("the vocabulary has no token for '" + std::string(character) +
                  "', no byte tokens for it and no unknown token (tokenizer.ggml.unknown_token_id) that ends "
                  "nothing");
    }
  }
}

std::string Tokenizer::Impl::decode(std::span<const TokenId> ids, DecodeOptions options) const {
  std::string text;
  bool after_control = true;
  for (const TokenId id : ids) {
    const std::size_t token = checked(id);
    if (is_special(token)) {
      if (!options.skip_special) text.append(bytes[token]);
      after_control = type(token) == TokenType::control;
      continue;
    }
    const bool has_prefix = after_control && space_prefix_ && bytes[token].starts_with(' ');
    text.append(bytes[token], has_prefix ? 1 : 0);
    after_control = false;
  }
  return text;
}

Tokenizer::Tokenizer(TokenizerSpec spec) : impl_(std::make_unique<const Impl>(std::move(spec))) {}
Tokenizer::~Tokenizer() = default;
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;

std::vector<TokenId> Tokenizer::encode(std::string_view text, EncodeOptions options) const {
  return impl_->encode(text, options);
}

std::vector<TokenId> Tokenizer::encode(const PromptText& prompt) const { return impl_->encode(prompt); }

std::string Tokenizer::decode(std::span<const TokenId> ids, DecodeOptions options) const {
  return impl_->decode(ids, options);
}

const std::string& Tokenizer::token_bytes(TokenId id) const { return impl_->bytes[impl_->checked(id)]; }
const std::string& Tokenizer::token_text(TokenId id) const { return impl_->spec.tokens[impl_->checked(id)]; }

std::optional<TokenId> Tokenizer::find(std::string_view token_text) const {
  const auto found = impl_->by_text.find(token_text);
  return found == impl_->by_text.end() ? std::nullopt : std::optional(found->second);
}

std::size_t Tokenizer::size() const { return impl_->spec.tokens.size(); }
std::optional<TokenId> Tokenizer::bos() const { return impl_->spec.bos; }
std::optional<TokenId> Tokenizer::eos() const { return impl_->spec.eos; }
bool Tokenizer::adds_bos() const { return impl_->add_bos; }
TokenType Tokenizer::type(TokenId id) const { return impl_->type(impl_->checked(id)); }
bool Tokenizer::is_special(TokenId id) const { return impl_->is_special(impl_->checked(id)); }
bool Tokenizer::is_end_of_generation(TokenId id) const { return impl_->ends_generation[impl_->checked(id)]; }
std::span<const unsigned char> Tokenizer::bytes_without_token() const { return impl_->bytes_without_token; }
const std::string& Tokenizer::chat_template() const { return impl_->spec.chat_template; }

std::string StreamDecoder::push(TokenId id) {
  if (tokenizer_.is_special(id) && options_.skip_special) return {};
  waiting_.append(tokenizer_.token_bytes(id));
  const std::size_t ready = waiting_.size() - utf8::unfinished_suffix(waiting_);
  std::string out = waiting_.substr(0, ready);
  waiting_.erase(0, ready);
  return out;
}

std::string StreamDecoder::finish() { return std::exchange(waiting_, {}); }

namespace {

// 4294967295 is how writers say that there is no such token, -1 how signed ones do.
bool is_none(std::int64_t id) {
  return id == -1 || id == std::int64_t{std::numeric_limits<std::uint32_t>::max()};
}

std::optional<TokenId> special_id(const GgufFile& file, const std::string& key, std::size_t tokens) {
  const auto id = file.find<std::int64_t>(key);
  if (!id || is_none(*id)) return std::nullopt;
  if (*id < 0 || static_cast<std::uint64_t>(*id) >= tokens) {
    throw Error(file.name() + ": " + key + " is " + std::to_string(*id) + ", outside the vocabulary of " +
                std::to_string(tokens) + " tokens; 4294967295 would mean none");
  }
  return static_cast<TokenId>(*id);
}

// One entry a token, where the key is there at all.
void check_entries(const GgufFile& file, const std::string& key, std::size_t tokens) {
  const auto entries = file.array_size(key);
  if (entries && *entries != tokens) {
    throw Error(file.name() + ": " + key + " has " + std::to_string(*entries) + " entries for " +
                std::to_string(tokens) + " tokens; there must be one a token");
  }
}

}  // namespace

TokenizerSpec tokenizer_spec(const GgufFile& file) {
  TokenizerSpec spec{
      .model = file.get<std::string>("tokenizer.ggml.model"),
      .pre = file.find<std::string>("tokenizer.ggml.pre").value_or(""),
      .tokens = file.get<std::vector<std::string>>("tokenizer.ggml.tokens"),
      .scores = file.find<std::vector<float>>("tokenizer.ggml.scores").value_or(std::vector<float>()),
      .token_types = file.find<std::vector<std::int32_t>>("tokenizer.ggml.token_type")
                         .value_or(std::vector<std::int32_t>()),
      .merges =
          file.find<std::vector<std::string>>("tokenizer.ggml.merges").value_or(std::vector<std::string>()),
      .add_bos = file.find<bool>("tokenizer.ggml.add_bos_token"),
      .add_space_prefix = file.find<bool>("tokenizer.ggml.add_space_prefix"),
      .chat_template = file.find<std::string>("tokenizer.chat_template").value_or("")};
  if (spec.model == "gpt2" && !file.has("tokenizer.ggml.merges")) {
    throw Error(file.name() +
                ": tokenizer.ggml.merges is missing; without it every text falls into single bytes");
  }
  const std::size_t tokens = spec.tokens.size();
  check_entries(file, "tokenizer.ggml.scores", tokens);
  check_entries(file, "tokenizer.ggml.token_type", tokens);
  for (const MetadataEntry& entry : file.metadata()) {
    const std::string_view key = entry.key;
    if (key.starts_with("tokenizer.ggml.") && key.ends_with("_token_id")) special_id(file, entry.key, tokens);
  }
  const auto id = [&](const char* name) {
    return special_id(file, "tokenizer.ggml." + std::string(name) + "_token_id", tokens);
  };
  spec.bos = id("bos");
  spec.eos = id("eos");
  spec.eot = id("eot");
  spec.eom = id("eom");
  spec.unk = id("unknown");
  // A file that says that it has no BOS wants none, where it does not say so of adding one.
  if (!spec.bos && !spec.add_bos && file.has("tokenizer.ggml.bos_token_id")) spec.add_bos = false;
  if (file.find<bool>("tokenizer.ggml.remove_extra_whitespaces").value_or(false) && spec.model == "llama") {
    throw Error(file.name() + ": tokenizer.ggml.remove_extra_whitespaces is true, which is not supported");
  }
  return spec;
}

}  // namespace engine
