#include "engine/tokenizer.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <limits>
#include <map>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "engine/error.hpp"
#include "engine/gguf.hpp"
#include "engine/gguf_writer.hpp"
#include "engine/prompt_text.hpp"
#include "engine/split_rule.hpp"
#include "engine/tiny_vocabulary.hpp"
#include "engine/utf8.hpp"
#include "recorded_cases.hpp"

namespace engine {
namespace {

using Ids = std::vector<TokenId>;
using test::alphabet_character;

// ---- a complete little byte-level vocabulary: 256 bytes, some merges, some special tokens
// -------------------

constexpr TokenId bos_id = 256;
constexpr TokenId end_id = 257;
constexpr TokenId long_end_id = 258;
constexpr TokenId user_id = 259;

TokenizerSpec byte_level_spec(const std::string& pre = "gpt-2") {
  TokenizerSpec spec{.model = "gpt2", .pre = pre};
  for (unsigned byte = 0; byte < 256; ++byte) spec.tokens.push_back(alphabet_character(byte));
  spec.token_types.assign(256, 1);
  for (const char* text : {"<s>", "<end>", "<end>>"}) {
    spec.tokens.emplace_back(text);
    spec.token_types.push_back(3);
  }
  spec.tokens.emplace_back("@@");
  spec.token_types.push_back(4);
  for (const char* merge :
       {"t h", "th e", "i n", "in g", "Ġ the", "h e", "1 2", "Ġ Ġ", "ĠĠ ĠĠ", "a a", "aa aa"}) {
    spec.merges.emplace_back(merge);
    std::string token(merge);
    token.erase(token.find(' '), 1);
    spec.tokens.push_back(token);
    spec.token_types.push_back(1);
  }
  spec.bos = bos_id;
  spec.eos = end_id;
  return spec;
}

std::string random_bytes(std::mt19937& generator, std::size_t length) {
  constexpr std::string_view likely = "the in ing 12  aaaa\n<end>>@@\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80";
  std::string out;
  while (out.size() < length) {
    if (generator() % 4 == 0) {
      out.push_back(static_cast<char>(generator() % 256));
    } else {
      const std::size_t at = generator() % likely.size();
      out.append(likely.substr(at, 1 + generator() % 6));
    }
  }
  return out;
}

// The merges as their definition reads: again and again, the best pair of all, leftmost first.
Ids slow_merges(const TokenizerSpec& spec, std::string_view piece) {
  std::vector<std::string> parts;
  for (const char byte : piece) parts.push_back(alphabet_character(static_cast<unsigned char>(byte)));
  for (;;) {
    std::size_t best_rank = spec.merges.size();
    std::size_t best_at = 0;
    for (std::size_t at = 0; at + 1 < parts.size(); ++at) {
      const std::string pair = parts[at] + ' ' + parts[at + 1];
      const auto found = std::find(spec.merges.begin(), spec.merges.end(), pair);
      const std::size_t rank = static_cast<std::size_t>(found - spec.merges.begin());
      if (rank < best_rank) {
        best_rank = rank;
        best_at = at;
      }
    }
    if (best_rank == spec.merges.size()) break;
    parts[best_at] += parts[best_at + 1];
    parts.erase(parts.begin() + static_cast<std::ptrdiff_t>(best_at) + 1);
  }
  Ids ids;
  for (const std::string& part : parts) {
    ids.push_back(
        static_cast<TokenId>(std::find(spec.tokens.begin(), spec.tokens.end(), part) - spec.tokens.begin()));
  }
  return ids;
}

TEST(ByteLevel, MergesAsTheDefinitionReads) {
  const TokenizerSpec spec = byte_level_spec();
  const Tokenizer tokenizer(spec);
  const SplitRule rule("gpt-2");
  std::mt19937 generator(11);
  for (int round = 0; round < 2000; ++round) {
    std::string text = random_bytes(generator, generator() % 40);
    std::erase(text, '@');  // user-defined tokens are a test of their own
    Ids expected;
    for (const std::string_view piece : rule.split(text)) {
      const Ids ids = slow_merges(spec, piece);
      expected.insert(expected.end(), ids.begin(), ids.end());
    }
    ASSERT_EQ(tokenizer.encode(text), expected) << testing::PrintToString(text);
  }
}

TEST(ByteLevel, AnyBytesComeBackUnchanged) {
  const Tokenizer tokenizer(byte_level_spec());
  EXPECT_TRUE(tokenizer.bytes_without_token().empty());
  std::mt19937 generator(5);
  for (int round = 0; round < 2000; ++round) {
    const std::string text = random_bytes(generator, generator() % 60);
    for (const bool special : {false, true}) {
      const Ids ids = tokenizer.encode(text, {.parse_special = special});
      ASSERT_EQ(tokenizer.decode(ids), text) << testing::PrintToString(text);
      std::string joined;
      for (const TokenId id : ids) joined += tokenizer.token_bytes(id);
      ASSERT_EQ(joined, text);
    }
  }
}

TEST(ByteLevel, ControlTokensAreTextUnlessAskedForAndTheLongestWins) {
  const Tokenizer tokenizer(byte_level_spec());
  const std::string text = "a<end>>b<end>c<en";
  const Ids plain = tokenizer.encode(text);
  EXPECT_EQ(plain.size(), text.size());
  EXPECT_TRUE(std::none_of(plain.begin(), plain.end(), [&](TokenId id) { return tokenizer.is_special(id); }));
  EXPECT_EQ(tokenizer.encode(text, {.parse_special = true}),
            (Ids{'a', long_end_id, 'b', end_id, 'c', '<', 'e', 'n'}));
  EXPECT_EQ(tokenizer.decode(tokenizer.encode(text, {.parse_special = true}), {.skip_special = true}),
            "abc<en");
}

TEST(ByteLevel, UserDefinedTokensAreAlwaysRecognised) {
  const Tokenizer tokenizer(byte_level_spec());
  EXPECT_EQ(tokenizer.encode("@@@"), (Ids{user_id, '@'}));
  EXPECT_FALSE(tokenizer.is_special(user_id));
  EXPECT_EQ(tokenizer.type(user_id), TokenType::user_defined);
}

TEST(ByteLevel, BosIsAddedWhereTheVocabularyAsksForIt) {
  TokenizerSpec spec = byte_level_spec();
  EXPECT_EQ(Tokenizer(spec).encode("x"), (Ids{'x'}));
  EXPECT_FALSE(Tokenizer(spec).adds_bos());
  spec.add_bos = true;
  EXPECT_EQ(Tokenizer(spec).encode("x"), (Ids{bos_id, 'x'}));
  EXPECT_EQ(Tokenizer(spec).encode(""), (Ids{bos_id}));
  EXPECT_EQ(Tokenizer(spec).encode("x", {.add_bos = false}), (Ids{'x'}));
  spec.add_bos.reset();
  spec.pre = "llama-bpe";
  EXPECT_EQ(Tokenizer(spec).encode("x"), (Ids{bos_id, 'x'}));
}

TEST(ByteLevel, APieceThatIsATokenSkipsTheMergesInLlama3) {
  TokenizerSpec spec = byte_level_spec("llama-bpe");
  spec.add_bos = false;
  spec.tokens.emplace_back("thing");  // no merge leads there
  spec.token_types.push_back(1);
  const TokenId thing = static_cast<TokenId>(spec.tokens.size() - 1);
  EXPECT_EQ(Tokenizer(spec).encode("thing"), (Ids{thing}));
  spec.pre = "gpt-2";
  EXPECT_EQ(Tokenizer(spec).encode("thing").size(), 2U);
}

TEST(ByteLevel, EndOfGenerationIsEosEotAndKnownEndTokens) {
  TokenizerSpec spec = byte_level_spec();
  spec.eot = long_end_id;
  spec.tokens.insert(spec.tokens.end(), {"<|eot_id|>", "</s>"});
  spec.token_types.insert(spec.token_types.end(), {3, 1});  // the latter is text, not a control token
  const Tokenizer tokenizer(spec);
  EXPECT_TRUE(tokenizer.is_end_of_generation(end_id));
  EXPECT_TRUE(tokenizer.is_end_of_generation(long_end_id));
  EXPECT_TRUE(tokenizer.is_end_of_generation(tokenizer.find("<|eot_id|>").value()));
  EXPECT_FALSE(tokenizer.is_end_of_generation(tokenizer.find("</s>").value()));
  EXPECT_FALSE(tokenizer.is_end_of_generation(bos_id));
  EXPECT_EQ(tokenizer.find("<nope>"), std::nullopt);
}

// Files call them user-defined, unused or plain text, or do not say: the text decides.
TEST(ByteLevel, TokensKnownToEndATurnDoSoWhateverTheirType) {
  constexpr std::array<std::string_view, 13> ends{"<|im_end|>",
                                                  "<|eot_id|>",
                                                  "<|eom_id|>",
                                                  "<|end|>",
                                                  "<|endoftext|>",
                                                  "<|end_of_text|>",
                                                  "<end_of_turn>",
                                                  "<EOT>",
                                                  "[EOS]",
                                                  "<eos>",
                                                  "<|end_of_turn|>",
                                                  "<end_of_utterance>",
                                                  "<\xEF\xBD\x9C"
                                                  "end\xE2\x96\x81of\xE2\x96\x81sentence\xEF\xBD\x9C>"};
  for (const std::string_view text : ends) {
    for (const std::int32_t type : {0, 1, 3, 4, 5}) {  // 0: not said
      TokenizerSpec spec = byte_level_spec();
      spec.tokens.emplace_back(text);
      spec.token_types.push_back(type);
      const Tokenizer tokenizer(spec);
      const TokenId id = tokenizer.find(text).value();
      EXPECT_TRUE(tokenizer.is_end_of_generation(id)) << text << " of type " << type;
      EXPECT_TRUE(tokenizer.is_special(id)) << text << " of type " << type;
      EXPECT_EQ(tokenizer.encode("a" + std::string(text), {.parse_special = true}), (Ids{'a', id}));
      const Ids plain = tokenizer.encode(std::string(text));
      EXPECT_EQ(std::count(plain.begin(), plain.end(), id), 0) << text << " of type " << type;
    }
  }
  for (const std::int32_t type : {1, 4}) {
    TokenizerSpec spec = byte_level_spec();
    spec.tokens.emplace_back("</s>");
    spec.token_types.push_back(type);
    const Tokenizer tokenizer(spec);
    EXPECT_EQ(tokenizer.is_end_of_generation(tokenizer.find("</s>").value()), type == 4)
        << "plain, it is HTML";
  }
  TokenizerSpec spec = byte_level_spec();
  spec.eom = 'm';
  EXPECT_TRUE(Tokenizer(spec).is_end_of_generation('m'));
}

TEST(ByteLevel, WithoutTypesTheTextsSayWhatIsSpecial) {
  TokenizerSpec spec = byte_level_spec();
  spec.tokens.insert(spec.tokens.end(), {"<|user|>", "[INST]", "<h1>", "</s>"});
  spec.chat_template = "{{ '[INST]' }} x[1:]";
  for (const std::int32_t type : {-1, 0, 1}) {  // no types, none said, all said to be plain
    spec.token_types.assign(type < 0 ? 0 : spec.tokens.size(), type);
    const Tokenizer tokenizer(spec);
    for (const char* text : {"<|user|>", "[INST]", "</s>"}) {
      const TokenId id = tokenizer.find(text).value();
      EXPECT_EQ(tokenizer.type(id), TokenType::control) << text;
      EXPECT_EQ(tokenizer.encode(text, {.parse_special = true}), Ids{id});
    }
    EXPECT_EQ(tokenizer.type(bos_id), TokenType::control) << "the file names it";
    EXPECT_EQ(tokenizer.type(tokenizer.find("<h1>").value()), TokenType::normal);
  }
}

// Of several that begin at a place the longest, whatever begins there: against looking at each.
TEST(ByteLevel, WrittenTokensAreTheLeftmostAndOfTheseTheLongest) {
  std::mt19937 generator(3);
  for (int round = 0; round < 200; ++round) {
    TokenizerSpec spec = byte_level_spec();
    spec.merges.clear();
    std::map<std::string, TokenId> written;
    for (auto count = 1 + generator() % 12; count > 0; --count) {
      std::string text;
      for (auto length = 2 + generator() % 5; length > 0; --length) text.push_back("ab"[generator() % 2]);
      if (!written.emplace(text, static_cast<TokenId>(spec.tokens.size())).second) continue;
      spec.tokens.push_back(text);
      spec.token_types.push_back(4);
    }
    const Tokenizer tokenizer(spec);
    std::string text;
    for (int i = 0; i < 60; ++i) text.push_back("aabbc"[generator() % 5]);
    Ids expected;
    for (std::size_t at = 0; at < text.size();) {
      std::string_view best;
      for (const auto& [token, id] : written) {
        if (token.size() > best.size() && std::string_view(text).substr(at).starts_with(token)) best = token;
      }
      expected.push_back(best.empty() ? static_cast<TokenId>(text[at]) : written.at(std::string(best)));
      at += std::max<std::size_t>(best.size(), 1);
    }
    ASSERT_EQ(tokenizer.encode(text), expected) << text;
  }
}

// A hundred times the tokens with one first byte: time must not follow.
TEST(ByteLevel, TimeDoesNotGrowWithTheUserDefinedTokens) {
  const std::string text(100'000, 'a');
  const auto seconds = [&](int tokens) {
    TokenizerSpec spec = byte_level_spec();
    for (int i = 0; i < tokens; ++i) {
      spec.tokens.push_back("aaaaaa" + std::to_string(i));
      spec.token_types.push_back(4);
    }
    const Tokenizer tokenizer(spec);
    double best = 1e9;
    for (int round = 0; round < 3; ++round) {
      const auto begin = std::chrono::steady_clock::now();
      EXPECT_FALSE(tokenizer.encode(text).empty());
      const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
      best = std::min(best, took.count());
    }
    return best;
  };
  const double few = seconds(200);
  EXPECT_LT(seconds(20'000), 8 * few);
}

TEST(ByteLevel, AByteWithoutATokenIsLeftOutAndReported) {
  TokenizerSpec spec = byte_level_spec();
  spec.tokens[0xF1] = "unreachable";
  const Tokenizer tokenizer(spec);
  ASSERT_EQ(tokenizer.bytes_without_token().size(), 1U);
  EXPECT_EQ(tokenizer.bytes_without_token()[0], 0xF1);
  EXPECT_EQ(tokenizer.decode(tokenizer.encode("a\xF1 b")), "a b");
  EXPECT_EQ(tokenizer.decode(tokenizer.encode("\xF1")), "");
}

// ---- streaming
// -------------------------------------------------------------------------------------------------

TEST(StreamDecoder, NeverShowsPartOfACharacterAndLosesNothing) {
  const Tokenizer tokenizer(byte_level_spec());
  std::mt19937 generator(17);
  for (int round = 0; round < 2000; ++round) {
    const std::string text = random_bytes(generator, generator() % 30);
    std::vector<bool> inside_character(text.size() + 1, false);
    for (std::size_t at = 0; at < text.size(); ++at) {
      for (std::size_t byte = 1; byte < utf8::character_length(text, at); ++byte)
        inside_character[at + byte] = true;
    }
    StreamDecoder stream(tokenizer, {.skip_special = false});
    std::string shown;
    std::size_t pushed = 0;
    for (const TokenId id : tokenizer.encode(text)) {
      shown += stream.push(id);
      pushed += tokenizer.token_bytes(id).size();
      ASSERT_FALSE(inside_character[shown.size()]) << testing::PrintToString(text);
      ASSERT_LE(pushed - shown.size(), 3U) << "more is held back than a character can need";
    }
    shown += stream.finish();
    ASSERT_EQ(shown, text);
    ASSERT_EQ(stream.finish(), "");
  }
}

TEST(StreamDecoder, HoldsAnEmojiUntilItsLastByte) {
  const Tokenizer tokenizer(byte_level_spec());
  StreamDecoder stream(tokenizer);
  const Ids ids = tokenizer.encode("\xF0\x9F\x98\x80!");
  ASSERT_EQ(ids.size(), 5U);
  EXPECT_EQ(stream.push(ids[0]), "");
  EXPECT_EQ(stream.push(ids[1]), "");
  EXPECT_EQ(stream.push(ids[2]), "");
  EXPECT_EQ(stream.push(end_id), "") << "special tokens are not shown";
  EXPECT_EQ(stream.push(ids[3]), "\xF0\x9F\x98\x80");
  EXPECT_EQ(stream.push(ids[4]), "!");
  EXPECT_EQ(stream.finish(), "");
}

TEST(Utf8, AcceptsExactlyTheWellFormedSequences) {
  std::size_t accepted = 0;
  for (unsigned lead = 0; lead < 256; ++lead) {
    for (unsigned second = 0; second < 256; ++second) {
      std::string text{static_cast<char>(lead), static_cast<char>(second), '\x80', '\x80'};
      const std::size_t length = utf8::character_length(text, 0);
      std::uint32_t value = 0;  // by the definition: decode, then look at the range that the length allows
      const std::size_t expected = lead < 0x80                   ? 1
                                   : lead >= 0xC0 && lead < 0xE0 ? 2
                                   : lead >= 0xE0 && lead < 0xF0 ? 3
                                   : lead >= 0xF0 && lead < 0xF8 ? 4
                                                                 : 0;
      bool valid = expected == 1;
      if (expected > 1 && (second & 0xC0U) == 0x80U) {
        value = lead & (0xFFU >> (expected + 1));
        value = value << 6U | (second & 0x3FU);
        for (std::size_t more = 2; more < expected; ++more) value <<= 6U;
        constexpr std::array<std::uint32_t, 5> smallest{0, 0, 0x80, 0x800, 0x10000};
        // Overlong E0 and F0 forms are those whose second byte leaves no value at or above the smallest.
        const std::uint32_t largest = value | ((1U << (6U * (expected - 2))) - 1U);
        valid = largest >= smallest[expected] && value <= 0x10FFFF && !(value >= 0xD800 && value <= 0xDFFF);
      }
      ASSERT_EQ(length, valid ? expected : 0) << std::hex << lead << " " << second;
      accepted += valid ? 1 : 0;
    }
  }
  EXPECT_GT(accepted, 128U * 256U);
}

// ---- split rules
// -----------------------------------------------------------------------------------------------

TEST(SplitRuleReference, CutsAsTheReferenceDoes) {
  std::map<std::string, SplitRule> rules;
  std::size_t compared = 0;
  for (const auto& expected : recorded::cases("tokenizer_splits.json")) {
    const std::string name = expected.at("rule");
    const std::string text = expected.at("text");
    const SplitRule& rule = rules.try_emplace(name, name).first->second;
    std::vector<std::string> pieces;
    for (const std::string_view piece : rule.split(text)) pieces.emplace_back(piece);
    ASSERT_EQ(pieces, expected.at("pieces").get<std::vector<std::string>>())
        << name << ": " << expected.at("text");
    ++compared;
  }
  EXPECT_GE(compared, 200U);
}

TEST(SplitRule, RunsOfBytesThatAreNotUtf8ArePiecesOfTheirOwn) {
  const SplitRule rule("gpt-2");
  EXPECT_EQ(rule.split("ab\xFF\xFE cd\xC3"),
            (std::vector<std::string_view>{"ab", "\xFF\xFE", " cd", "\xC3"}));
  EXPECT_EQ(rule.split("\xED\xA0\x80"), (std::vector<std::string_view>{"\xED\xA0\x80"})) << "a surrogate";
  EXPECT_TRUE(rule.split("").empty());
}

TEST(SplitRule, PiecesJoinedAreTheTextForEveryRule) {
  std::mt19937 generator(23);
  for (const std::string& name : SplitRule::names()) {
    const SplitRule rule(name);
    for (int round = 0; round < 300; ++round) {
      const std::string text = random_bytes(generator, generator() % 50);
      std::string joined;
      for (const std::string_view piece : rule.split(text)) {
        ASSERT_FALSE(piece.empty());
        joined += piece;
      }
      ASSERT_EQ(joined, text) << name;
    }
  }
}

TEST(SplitRule, LongRunsAreNoTrouble) {
  for (const std::string& name : SplitRule::names()) {
    const SplitRule rule(name);
    for (const char byte : {' ', 'a', '\n', '!', '7'}) {
      const std::string text(200000, byte);
      EXPECT_NO_THROW(rule.split(text)) << name << " on a run of " << testing::PrintToString(byte);
    }
  }
}

TEST(SplitRule, AnUnknownNameIsRefusedByName) {
  expect_error([] { SplitRule("frobnicate"); }, "'frobnicate'");
  expect_error([] { SplitRule("frobnicate"); }, "smollm");
  expect_error([] { Tokenizer(byte_level_spec("frobnicate")); }, "tokenizer.ggml.pre");
}

// ---- SentencePiece
// ---------------------------------------------------------------------------------------------

TokenizerSpec sentencepiece_spec(const nlohmann::json& model) {
  return {.model = "llama",
          .tokens = model.at("tokens").get<std::vector<std::string>>(),
          .scores = model.at("scores").get<std::vector<float>>(),
          .token_types = model.at("types").get<std::vector<std::int32_t>>(),
          .bos = model.at("bos").get<TokenId>(),
          .eos = model.at("eos").get<TokenId>(),
          .unk = model.at("unk").get<TokenId>(),
          .add_space_prefix = model.at("add_space_prefix").get<bool>()};
}

TEST(SentencePieceReference, GivesTheSameIds) {
  std::size_t compared = 0;
  for (const auto& model : recorded::cases("tokenizer_sentencepiece.json")) {
    const Tokenizer tokenizer(sentencepiece_spec(model));
    for (const auto& expected : model.at("cases")) {
      const std::string text = expected.at("text");
      EXPECT_EQ(tokenizer.encode(text, {.add_bos = false}), expected.at("ids").get<Ids>())
          << model.at("name") << ": " << expected.at("text");
      ++compared;
    }
  }
  EXPECT_GE(compared, 200U);
}

TEST(SentencePieceReference, TextComesBackWhereTheVocabularyHasBytes) {
  for (const auto& model : recorded::cases("tokenizer_sentencepiece.json")) {
    if (model.at("name") == "unknown_token") continue;
    const Tokenizer tokenizer(sentencepiece_spec(model));
    for (const auto& expected : model.at("cases")) {
      const std::string text = expected.at("text");
      EXPECT_EQ(tokenizer.decode(tokenizer.encode(text, {.add_bos = false})), text) << model.at("name");
    }
    const std::string invalid = "a\xFF\xC3 b\xED\xA0\x80";
    EXPECT_EQ(tokenizer.decode(tokenizer.encode(invalid, {.add_bos = false})), invalid) << model.at("name");
  }
}

// Pieces chosen so that a wrong order of merges shows: "ab" is worth more than "bc", "abc" cannot be reached.
TokenizerSpec small_sentencepiece_spec() {
  return {.model = "llama",
          .tokens = {"<unk>", "<s>", "</s>", "\xE2\x96\x81", "a", "b", "c", "ab", "bc",
                     "\xE2\x96\x81"
                     "a",
                     "<0x0A>", "<x>"},
          .scores = {0, 0, 0, -9, -9, -9, -9, -1, -2, -3, 0, 0},
          .token_types = {2, 3, 3, 1, 1, 1, 1, 1, 1, 1, 6, 3},
          .bos = 1,
          .eos = 2,
          .unk = 0};
}

TEST(SentencePiece, BestScoreMergesFirstAndEqualsFromTheLeft) {
  const Tokenizer tokenizer(small_sentencepiece_spec());
  EXPECT_EQ(tokenizer.encode("abc"), (Ids{1, 3, 7, 6}));
  EXPECT_EQ(tokenizer.encode("ac"), (Ids{1, 9, 6}));
  TokenizerSpec equal = small_sentencepiece_spec();
  equal.scores[7] = equal.scores[8] = -1;
  EXPECT_EQ(Tokenizer(equal).encode("abc"), (Ids{1, 3, 7, 6}));
  equal.scores[7] = -2;
  EXPECT_EQ(Tokenizer(equal).encode("abc"), (Ids{1, 9, 8}));
}

TEST(SentencePiece, TheSpacePrefixGoesBeforeTheTextAndAfterControlTokens) {
  TokenizerSpec spec = small_sentencepiece_spec();
  const Tokenizer tokenizer(spec);
  EXPECT_EQ(tokenizer.encode("a<x>b", {.parse_special = true}), (Ids{1, 9, 11, 3, 5}));
  EXPECT_EQ(tokenizer.decode(Ids{1, 9, 11, 3, 5}, {.skip_special = true}), "ab");
  EXPECT_EQ(tokenizer.decode(Ids{9, 9, 11, 3, 5}), "a a<x>b");
  EXPECT_EQ(tokenizer.encode("", {.add_bos = false}), Ids{});
  EXPECT_EQ(tokenizer.encode("<x>", {.parse_special = true}), (Ids{1, 11}))
      << "nothing follows to be prefixed";
  spec.add_space_prefix = false;
  EXPECT_EQ(Tokenizer(spec).encode("a<x>b", {.parse_special = true}), (Ids{1, 4, 11, 5}));
}

TEST(SentencePiece, BytesThenUnknownThenAnError) {
  TokenizerSpec spec = small_sentencepiece_spec();
  EXPECT_EQ(Tokenizer(spec).encode("a\nb"), (Ids{1, 9, 10, 5}));
  EXPECT_EQ(Tokenizer(spec).encode("a\xC3\xA9zzb"), (Ids{1, 9, 0, 5})) << "one unknown token for a run";
  spec.unk.reset();
  const Tokenizer strict(spec);
  expect_error([&] { strict.encode("az"); }, "no token for 'z'");
}

TEST(SentencePiece, TextBecomesNoControlTokenByBeingUnknown) {
  const auto refuses = [](const TokenizerSpec& spec) {
    const Tokenizer tokenizer(spec);
    expect_error([&] { tokenizer.encode("az"); },
                 "no unknown token (tokenizer.ggml.unknown_token_id) that ends");
    expect_error([&] { tokenizer.encode(PromptText("az", true)); }, "no token for 'z'");
  };
  TokenizerSpec spec = small_sentencepiece_spec();
  for (const TokenId control : {1, 11}) {  // <s>, and <x>, which neither begins nor ends anything
    spec.unk = control;
    refuses(spec);
  }
  spec.unk = 2;  // </s>
  refuses(spec);
  spec.unk = spec.eos = 0;  // of type unknown, but an end
  refuses(spec);
}

// ---- broken vocabularies
// ---------------------------------------------------------------------------------------

TEST(TokenizerSpec, WhatContradictsItselfIsRefused) {
  const auto refused = [](TokenizerSpec spec, const std::string& part) {
    expect_error([&] { Tokenizer{spec}; }, part);
  };
  TokenizerSpec spec = byte_level_spec();
  spec.model = "bert";
  refused(spec, "'bert'");
  spec = byte_level_spec();
  spec.tokens.clear();
  refused(spec, "is empty");
  spec = byte_level_spec();
  spec.token_types.pop_back();
  refused(spec, "tokenizer.ggml.token_type has 270 entries for 271 tokens");
  spec = byte_level_spec();
  spec.token_types[5] = 9;
  refused(spec, "token_type of token 5 is 9");
  spec = byte_level_spec();
  spec.token_types[5] = 6;
  refused(spec, "byte tokens are written like <0x0A>");
  spec = byte_level_spec();
  spec.bos = 271;
  refused(spec, "bos_token_id is 271");
  spec = byte_level_spec();
  spec.eos = -1;
  refused(spec, "eos_token_id is -1");
  spec = byte_level_spec();
  spec.bos.reset();
  spec.add_bos = true;
  refused(spec, "bos_token_id is missing");
  spec = byte_level_spec();
  spec.merges[3] = "in";
  refused(spec, "merge 3 of tokenizer.ggml.merges is 'in'");
  spec = byte_level_spec();
  spec.merges[3] = "in ";
  refused(spec, "merge 3");
  spec = byte_level_spec();
  spec.merges[3] = "in x";
  refused(spec, "needs 'inx'");
  spec = small_sentencepiece_spec();
  spec.scores.pop_back();
  refused(spec, "tokenizer.ggml.scores has 11 entries for 12 tokens");
  spec = small_sentencepiece_spec();
  spec.scores[4] = std::numeric_limits<float>::quiet_NaN();
  refused(spec, "scores of token 4 is NaN");
}

// ---- vocabularies in files
// ------------------------------------------------------------------------------------

TokenizerSpec spec_of(const std::function<void(test::GgufWriter&)>& change) {
  test::GgufWriter writer;
  test::TinyVocabulary{{{"<s>", 3}, {"</s>", 3}}}.add_to(writer);
  change(writer);
  return tokenizer_spec(GgufFile::from_bytes(writer.bytes(), "vocabulary.gguf"));
}

TEST(TokenizerFile, ThatASpecialTokenIsNoneCanBeSaid) {
  for (const char* name : {"bos", "eos", "eot", "eom", "unknown", "padding"}) {
    const std::string key = "tokenizer.ggml." + std::string(name) + "_token_id";
    EXPECT_NO_THROW(Tokenizer{spec_of([&](auto& w) { w.set(key, std::uint32_t{4294967295}); })});
    EXPECT_NO_THROW(Tokenizer{spec_of([&](auto& w) { w.set(key, std::int32_t{-1}); })});
    for (const std::uint32_t wrong : {258U, 4294967294U}) {
      expect_error(
          [&] { spec_of([&](auto& w) { w.set(key, wrong); }); },
          "vocabulary.gguf: " + key + " is " + std::to_string(wrong) + ", outside the vocabulary of 258");
    }
  }
  const TokenizerSpec none =
      spec_of([](auto& w) { w.set("tokenizer.ggml.eos_token_id", std::uint32_t{4294967295}); });
  EXPECT_EQ(none.eos, std::nullopt);
  // Where BOS is none, none is added, unless the file asks for it.
  const auto without_bos = [](auto& w) {
    w.set("tokenizer.ggml.bos_token_id", std::uint32_t{4294967295})
        .set("tokenizer.ggml.pre", std::string{"llama-bpe"});
  };
  EXPECT_FALSE(Tokenizer{spec_of(without_bos)}.adds_bos());
  expect_error(
      [&] {
        Tokenizer{spec_of([&](auto& w) {
          without_bos(w);
          w.set("tokenizer.ggml.add_bos_token", true);
        })};
      },
      "bos_token_id is missing");
}

TEST(TokenizerFile, AByteLevelVocabularyWithoutMergesIsRefused) {
  expect_error(
      [] {
        spec_of([](auto& w) {
          std::erase_if(w.metadata, [](const auto& entry) { return entry.first.ends_with("merges"); });
        });
      },
      "tokenizer.ggml.merges is missing");
}

TEST(TokenizerFile, ListsOfAnotherLengthAreRefused) {
  for (const std::size_t length : {0UL, 257UL, 259UL}) {
    const std::string expected = " has " + std::to_string(length) + " entries for 258 tokens";
    expect_error(
        [&] { spec_of([&](auto& w) { w.set_array("tokenizer.ggml.scores", std::vector<float>(length)); }); },
        "tokenizer.ggml.scores" + expected);
    expect_error(
        [&] {
          spec_of([&](auto& w) {
            w.set_array("tokenizer.ggml.token_type", std::vector<std::int32_t>(length, 1));
          });
        },
        "tokenizer.ggml.token_type" + expected);
  }
}

TEST(Tokenizer, IdsOutsideTheVocabularyAreRefused) {
  const Tokenizer tokenizer(byte_level_spec());
  expect_error(
      [&] {
        tokenizer.decode(Ids{1, 271});
      },
      "token id 271 is outside the vocabulary of 271 tokens");
  expect_error([&] { tokenizer.token_bytes(-1); }, "token id -1");
  expect_error([&] { tokenizer.is_end_of_generation(1000); }, "token id 1000");
  StreamDecoder stream(tokenizer);
  expect_error([&] { stream.push(271); }, "token id 271");
}

// ---- the real model
// --------------------------------------------------------------------------------------------

class RealModelReference : public testing::Test {
 protected:
  void SetUp() override {
    const char* path = std::getenv("COMPRESSKV_TEST_MODEL");
    if (path == nullptr) {
      GTEST_SKIP()
          << "COMPRESSKV_TEST_MODEL does not name SmolLM2-135M-Instruct's .gguf; scripts/test.sh sets it";
    }
    tokenizer.emplace(tokenizer_spec(GgufFile::open(path)));
  }

  std::optional<Tokenizer> tokenizer;
};

TEST_F(RealModelReference, GivesTheSameIds) {
  std::size_t compared = 0;
  for (const auto& expected : recorded::cases("tokenizer_smollm2.json")) {
    const std::string text = expected.at("text");
    const Ids ids = tokenizer->encode(text, {.parse_special = expected.at("parse_special").get<bool>()});
    EXPECT_EQ(ids, expected.at("ids").get<Ids>()) << expected.at("text");
    ++compared;
  }
  EXPECT_GE(compared, 300U);
}

TEST_F(RealModelReference, TextComesBackButForTheBytesThatHaveNoToken) {
  const auto lost = tokenizer->bytes_without_token();
  EXPECT_EQ(lost.size(), 21U);
  for (const auto& expected : recorded::cases("tokenizer_smollm2.json")) {
    std::string text = expected.at("text");
    const Ids ids = tokenizer->encode(text);
    std::erase_if(text, [&](char byte) {
      return std::find(lost.begin(), lost.end(), static_cast<unsigned char>(byte)) != lost.end();
    });
    EXPECT_EQ(tokenizer->decode(ids), text);
  }
}

TEST_F(RealModelReference, KnowsItsSpecialTokens) {
  EXPECT_EQ(tokenizer->size(), 49152U);
  EXPECT_FALSE(tokenizer->adds_bos());
  EXPECT_EQ(tokenizer->find("<|im_start|>"), 1);
  EXPECT_EQ(tokenizer->eos(), 2);
  EXPECT_TRUE(tokenizer->is_end_of_generation(0));
  EXPECT_FALSE(tokenizer->is_end_of_generation(1));
  EXPECT_TRUE(tokenizer->is_end_of_generation(2));
}

// The bound is generous, for slow machines and sanitizers; a quadratic merge takes far longer on the second
// text.
TEST_F(RealModelReference, FiftyKilobytesTakeWellUnderASecond) {
  std::string prose;
  while (prose.size() < 50 * 1024) {
    prose += "And the earth was without form, and void; and darkness was upon the face of the deep.\n";
  }
  for (const std::string& text : {prose, std::string(50 * 1024, 'a')}) {
    const auto begin = std::chrono::steady_clock::now();
    const Ids ids = tokenizer->encode(text);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    EXPECT_LT(seconds.count(), 1.0);
    EXPECT_EQ(tokenizer->decode(ids), text);
    RecordProperty("milliseconds", static_cast<int>(seconds.count() * 1000));
  }
}

}  // namespace
}  // namespace engine
