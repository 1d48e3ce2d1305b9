// End to end: the real model answers from what the methods keep of its cache.

#include "ckv/needle.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdio>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "ckv/evaluation.hpp"
#include "ckv/method.hpp"
#include "engine/error.hpp"
#include "evaluation_needles.hpp"
#include "model_fixture.hpp"
#include "runs.hpp"

namespace ckv_test {
namespace {

// Twelve needles that the full cache answers. It is asked again here, as another processor rounds otherwise;
// the list has ten to spare.
TEST_F(Needles, In12PerCentCompressKvFindsHalfOfThemAndStreamingLosesMost) {
  constexpr std::size_t wanted = 12;
  const ckv::Compression full{.method = ckv::Method::full};
  const ckv::Compression compressed = compresskv_at(0.12);
  const ckv::Compression streaming{.method = ckv::Method::streaming,
                                   .budget = compresskv::Budget::kept_ratio(0.12)};
  const std::array<const ckv::Compression*, 3> ways = {&full, &compressed, &streaming};
  std::array<std::size_t, 3> found{};
  for (const std::size_t needle : answered_by_full) {
    if (found[0] == wanted) {
      break;
    }
    const ckv::NeedlePrompt text = prompt(needle);
    const ckv::TaskPrompt asked{.tokens = text.tokens,
                                .expect = {std::string(evaluation_needles[needle].expect)}};
    const auto outcomes =
        model().hold(asked, {.max_new_tokens = 20})->outcomes(ways, [](double, std::string_view) {});
    std::array<bool, 3> right{};
    for (std::size_t i = 0; i < ways.size(); ++i) {
      right[i] = is_right(ckv::info(ways[i]->method).name, needle, text, outcomes[i].answers[0]);
    }
    for (std::size_t i = 0; right[0] && i < ways.size(); ++i) {
      found[i] += right[i] ? 1U : 0U;
    }
  }
  ASSERT_EQ(found[0], wanted) << "the full cache answers too few needles";
  EXPECT_GE(found[1], 6U);
  EXPECT_LE(found[2], 3U);
}

TEST_F(Needles, TokenSpanIsTheFactsOwn) {
  for (const std::size_t needle : {std::size_t{0}, std::size_t{7}, std::size_t{13}}) {
    const ckv::NeedlePrompt text = prompt(needle);
    ASSERT_LE(text.needle.last, text.tokens.size());
    const auto tokens = std::span(text.tokens).subspan(text.needle.first, text.needle.size());
    const std::string found = model().tokenizer.decode(tokens);
    EXPECT_EQ(found, std::string(" ").append(evaluation_needles[needle].fact));
  }
}

TEST_F(Needles, LieWhereAsked) {
  for (const double depth : {0.0, 0.25, 0.5, 1.0}) {
    const ckv::NeedlePrompt text = ckv::needle_prompt(model(), *haystack_, evaluation_needles[0],
                                                      {.tokens = 1500, .depth = depth, .start = 0.3});
    EXPECT_LE(text.tokens.size(), 1500U);
    EXPECT_GT(text.tokens.size(), 1350U);  // a sentence short of it at the most
    const double place = static_cast<double>(text.needle.first) / static_cast<double>(text.tokens.size());
    EXPECT_NEAR(place, depth, 0.06);
  }
}

// Where parts meet, tokens may be others than those of the parts: the line breaks around a text are one token
// where there is no text. Prompts without a fact were too long by it.
TEST_F(Needles, PromptsAreNeverLongerThanAskedForAndASentenceShorterAtTheMost) {
  const ckv::Haystack little{[] {
    std::string text;
    for (int i = 0; i < 200; ++i) {
      text += "It was so. ";
    }
    return text;
  }()};
  const ckv::Hidden fact{.fact = evaluation_needles[0].fact, .depth = 0.4};
  for (const std::span<const ckv::Hidden> facts : {std::span<const ckv::Hidden>(), {&fact, 1}}) {
    for (std::size_t tokens = 80; tokens < 100; ++tokens) {
      const std::size_t found =
          ckv::encode_prompt(
              model(), ckv::hide(model(), little, facts, {.question = "Who are you, robot?"}, tokens, 0.0))
              .size();
      EXPECT_LE(found, tokens) << facts.size();
      EXPECT_GE(found + 6, tokens) << facts.size();
    }
  }
}

TEST_F(Needles, PromptTooShortForTheQuestionSaysBothNumbers) {
  try {
    ckv::needle_prompt(model(), *haystack_, evaluation_needles[0], {.tokens = 20});
    FAIL() << "no error";
  } catch (const engine::Error& error) {
    EXPECT_NE(std::string(error.what()).find("a prompt of 20 tokens was asked for"), std::string::npos)
        << error.what();
  }
}

TEST_F(Needles, ShortHaystackIsAnError) {
  const ckv::Haystack little{"In the beginning. There was little!"};
  EXPECT_THROW(ckv::needle_prompt(model(), little, evaluation_needles[0], {.tokens = 500}), engine::Error);
}

// With nothing to evict the library must leave no trace: the same tokens, and the same logits to the last
// bit.
class Uncompressed : public RealModel {};

TEST_F(Uncompressed, DecodesBitForBitAsWithoutTheLibrary) {
  for (const engine::KvType type : {engine::KvType::f32, engine::KvType::bf16}) {
    const Trace full = trace({.method = ckv::Method::full}, {.kv_type = type});
    ASSERT_GT(full.tokens.size(), 3U);
    for (ckv::Method method : {ckv::Method::compresskv, ckv::Method::streaming}) {
      ckv::Compression how = compresskv_at(1.0);
      how.method = method;
      for (const compresskv::Budget budget :
           {compresskv::Budget::kept_ratio(1.0), compresskv::Budget::tokens_per_layer(100'000)}) {
        how.budget = budget;
        const Trace kept = trace(how, {.kv_type = type});
        EXPECT_EQ(kept.kept, full.kept);
        EXPECT_EQ(kept.tokens, full.tokens);
        EXPECT_TRUE(kept.logits == full.logits) << ckv::info(method).name;
      }
    }
  }
}

TEST_F(Uncompressed, AnEvictionDoesChangeTheLogits) {
  const Trace full = trace({.method = ckv::Method::full});
  const Trace kept = trace(compresskv_at(0.5));
  EXPECT_EQ(kept.logits.front(), full.logits.front());  // the prompt itself was read from the full cache
  EXPECT_FALSE(kept.logits == full.logits);
}

TEST_F(Uncompressed, BytesAreThoseOfTheRows) {
  const auto tokens = boxes_prompt();
  ckv::Compression how = compresskv_at(0.3);
  const ckv::RunResult result =
      ckv::run(model(), tokens, how, {.kv_type = engine::KvType::f16, .max_new_tokens = 2});
  const auto& config = model().model.config();
  const auto layers = static_cast<std::size_t>(config.layers);
  ASSERT_EQ(result.kept.size(), layers);
  std::size_t rows = 0;
  std::size_t most = 0;
  for (const auto& lists : result.kept) {
    ASSERT_EQ(lists.size(), 1U);
    rows += lists[0].size();
    most = std::max(most, lists[0].size());
    EXPECT_TRUE(std::is_sorted(lists[0].begin(), lists[0].end()));
    EXPECT_EQ(lists[0].back(), tokens.size() - 1);
  }
  const auto mean = static_cast<std::size_t>(0.3 * static_cast<double>(tokens.size()));
  EXPECT_EQ(rows, mean * layers);
  EXPECT_GT(most, mean);  // by layer error, so not all alike
  const auto row_bytes =
      2 * static_cast<std::size_t>(config.kv_heads) * static_cast<std::size_t>(config.head_dim) * 2;
  EXPECT_EQ(result.kv_bytes_kept, rows * row_bytes);
  EXPECT_EQ(result.kv_bytes_full, tokens.size() * layers * row_bytes);
  // At the most one layer is whole while the others are small.
  EXPECT_LE(result.kv_bytes_peak, result.kv_bytes_kept + tokens.size() * row_bytes);
  EXPECT_GT(result.kv_bytes_peak, result.kv_bytes_kept);
}

TEST(Haystack, SplitsAtSentences) {
  const ckv::Haystack haystack{"One  two.\nThree: four!  Five?\n\nSix. 1.5 seven"};
  const std::vector<std::string> expected = {"One two.", "Three: four!", "Five?", "Six.", "1.5 seven"};
  EXPECT_EQ(std::vector<std::string>(haystack.sentences().begin(), haystack.sentences().end()), expected);
}

TEST(Haystack, MissingFileIsNamed) {
  try {
    ckv::Haystack::from_file("/nowhere/book.txt");
    FAIL() << "no error";
  } catch (const compresskv::FileError& error) {
    EXPECT_NE(std::string(error.what()).find("/nowhere/book.txt"), std::string::npos) << error.what();
  }
}

TEST(NeedleTables, CalibrationDemoAndEvaluationAreDisjoint) {
  EXPECT_GE(ckv::calibration_needles().size(), 6U);
  for (const ckv::Needle& needle : evaluation_needles) {
    EXPECT_NE(needle.fact, ckv::demo_needle().fact);
    EXPECT_TRUE(ckv::holds(needle.fact, needle.expect)) << needle.fact;
    EXPECT_FALSE(ckv::holds(needle.question, needle.expect)) << needle.question;
    for (const ckv::Needle& other : ckv::calibration_needles()) {
      EXPECT_NE(needle.fact, other.fact);
    }
  }
}

}  // namespace
}  // namespace ckv_test
