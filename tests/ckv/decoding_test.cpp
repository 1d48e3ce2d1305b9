// A budget while the real model decodes: the cache is compressed again and again as the answer grows.

#include <gtest/gtest.h>

#include <compresskv/io/calibration_files.hpp>
#include <cstddef>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "runs.hpp"
#include "tool.hpp"

namespace ckv_test {
namespace {

constexpr std::size_t rows = 64;
constexpr std::size_t every = 32;

class DecodingOnABudget : public RealModel {
 protected:
  static ckv::Compression on_budget(ckv::Method method) {
    ckv::Compression how{.method = method, .budget = compresskv::Budget::tokens_per_layer(rows)};
    if (ckv::info(method).needs_heads) {
      how.heads = compresskv::io::load_head_ranking(calibration("_head_idx.json"));
    }
    if (ckv::info(method).needs_scores) {
      how.scores = compresskv::io::load_head_scores(calibration("_head_scores.json"));
    }
    return how;
  }

  /// Sampled, so that the text does not end up in a loop.
  static ckv::RunResult write(ckv::Method method, std::size_t tokens, std::size_t step = every) {
    return ckv::run(model(), boxes_prompt(), on_budget(method),
                    {.decode_every = step,
                     .max_new_tokens = tokens,
                     .sampling = {.temperature = 1.0F, .top_p = 0.9F, .seed = 3}});
  }
};

TEST_F(DecodingOnABudget, HoldsHundredsOfTokensInItsRowsAndNMore) {
  // A text without an end, so that no end token stops it.
  std::string raw;
  for (int i = 0; i < 12; ++i) {
    raw += "In the beginning there was a small town by the sea. ";
  }
  const ckv::RunResult result =
      ckv::run(model(), model().tokenizer.encode(raw, {.add_bos = false, .parse_special = false}),
               on_budget(ckv::Method::compresskv), {.decode_every = every, .max_new_tokens = 401});
  EXPECT_EQ(result.decode_steps, 400U);
  EXPECT_EQ(result.rows_peak, rows + every);
}

TEST_F(DecodingOnABudget, EveryDecoderKeepsIt) {
  for (const ckv::Method method :
       {ckv::Method::snapkv, ckv::Method::streaming, ckv::Method::compresskv, ckv::Method::tova,
        ckv::Method::rkv, ckv::Method::carried, ckv::Method::model_wide, ckv::Method::blend}) {
    const ckv::RunResult result = write(method, 80);
    EXPECT_LE(result.rows_peak, rows + every) << ckv::info(method).name;
    EXPECT_EQ(result.kept[0][0].size(), rows);
  }
}

TEST_F(DecodingOnABudget, ChangesNothingBeforeTheFirstTime) {
  const ckv::RunResult never = write(ckv::Method::compresskv, 40, 0);
  const ckv::RunResult late = write(ckv::Method::compresskv, 40, 40);
  EXPECT_EQ(late.tokens, never.tokens);
  EXPECT_EQ(late.kept, never.kept);
  EXPECT_EQ(never.rows_peak, rows + never.decode_steps);
}

TEST_F(DecodingOnABudget, IsAnOptionOfGenerate) {
  const auto with = [](const Arguments& more) {
    Arguments all = {"generate",         "--model",  model_path(),
                     "--json",           "--prompt", "Count to one hundred.",
                     "--max-new-tokens", "40"};
    all.insert(all.end(), more.begin(), more.end());
    return run_tool(all);
  };
  const Outcome outcome = with({"--method", "streaming", "--rows", "16", "--decode-every", "4"});
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  EXPECT_EQ(outcome.json().at("rows_peak"), 20);
  EXPECT_EQ(outcome.json().at("settings").at("decode_every"), 4);
  EXPECT_EQ(with({"--method", "rkv", "--rows", "16", "--decode-every", "4"}).json().at("rows_peak"), 20);
  EXPECT_EQ(with({"--method", "blend", "--rows", "24", "--decode-every", "4"}).json().at("rows_peak"), 28);
  const std::vector<std::pair<const char*, const char*>> refused = {
      {"full", "keeps every row"},
      {"kvzip", "feeds the whole context once more"},
      {"kvzip-plus", "feeds the whole context once more"},
      {"h2o", "wants the queries of all tokens"},
      {"kvzap", "wants hidden states, which are not kept of what is decoded"}};
  for (const auto& [method, why] : refused) {
    const Outcome wrong = with({"--method", method, "--rows", "16", "--decode-every", "4"});
    EXPECT_EQ(wrong.code, 2) << method;
    EXPECT_NE(wrong.err.find(std::string("--decode-every 4 compresses each layer again by the last queries, "
                                         "which --method ") +
                             method + " does not, as it " + why + ": drop one"),
              std::string::npos)
        << wrong.err;
  }
}

}  // namespace
}  // namespace ckv_test
