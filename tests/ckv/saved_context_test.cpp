// A text compressed once and asked in another process: what is saved, that the answer is the same, and what
// is refused.

#include "ckv/saved_context.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <compresskv/core/error.hpp>
#include <cstddef>
#include <filesystem>
#include <functional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "ckv/compress.hpp"
#include "engine/error.hpp"
#include "engine/sha256.hpp"
#include "message_of.hpp"
#include "model_fixture.hpp"
#include "runs.hpp"
#include "tool.hpp"

namespace ckv_test {
namespace {

using compresskv::test::message_of;
using engine::TokenId;

std::string boxes_text() {
  std::string text;
  for (int i = 0; i < 12; ++i) {
    text += "Item " + std::to_string(i) + ": the box number " + std::to_string(i * i) + " holds " +
            std::to_string(100 - i) + " nails. ";
  }
  return text;
}
const std::string boxes_question = "How many nails are in box number 25?";

ckv::Compression third_by(ckv::Method method) {
  ckv::Compression how{.method = method,
                       .budget = method == ckv::Method::full
                                     ? std::nullopt
                                     : std::optional(compresskv::Budget::kept_ratio(0.3))};
  model().show_outputs(how);
  return how;
}

/// Tokens and logits of an answer.
struct Said {
  std::vector<TokenId> tokens;
  std::vector<std::vector<float>> logits;
  std::vector<std::vector<std::vector<std::uint32_t>>> kept;
  bool operator==(const Said&) const = default;
};

Said asked(ckv::Context context, const ckv::Compression& how, ckv::RunOptions options) {
  Said said;
  options.max_new_tokens = 10;
  options.on_logits = [&](std::span<const float> logits) {
    said.logits.emplace_back(logits.begin(), logits.end());
  };
  const std::vector<TokenId> rest = ckv::rest_of_chat(model(), boxes_text(), context.tokens, boxes_question);
  ckv::RunResult result = ckv::ask(model(), context, rest, how, options);
  said.tokens = std::move(result.tokens);
  said.kept = std::move(result.kept);
  return said;
}

ckv::ContextOrigin origin_of(const std::vector<TokenId>& tokens) {
  return {.model_sha256 = "of the model",
          .text = boxes_text(),
          .tokens = tokens,
          .method = "any",
          .budget = {{"ratio", 0.3}},
          .settings = {{"window", 8}},
          .calibration = {}};
}

class SavedContexts : public RealModel {};

TEST_F(SavedContexts, AnswersAreThoseOfOneProcessBitForBit) {
  const std::vector<TokenId> tokens = ckv::context_tokens(model(), boxes_text());
  for (const auto& [how, options] : std::vector<std::pair<ckv::Compression, ckv::RunOptions>>{
           {third_by(ckv::Method::full), {}},
           {compresskv_at(0.3), {}},
           {third_by(ckv::Method::snapkv), {.kv_type = engine::KvType::f16, .decode_every = 4}},
           {third_by(ckv::Method::adakv), {.kv_type = engine::KvType::bf16}},
           {third_by(ckv::Method::cake), {}},
           {third_by(ckv::Method::kvzip), {}},
           {third_by(ckv::Method::kvzip_plus), {}}}) {
    SCOPED_TRACE(ckv::info(how.method).name);
    ckv::Context context = ckv::read_context(model(), tokens, how, options);
    const ckv::SavedContext saved("a.cache", ckv::save_context(origin_of(tokens), model(), how, context));
    EXPECT_EQ(saved.origin().text, boxes_text());
    EXPECT_EQ(saved.origin().tokens, tokens);
    const Said again = asked(saved.restore(model(), how, options.kv_type, {}), how, options);
    const Said twice = asked(saved.restore(model(), how, options.kv_type, {}), how, options);
    const Said once = asked(std::move(context), how, options);
    EXPECT_EQ(again, once);
    EXPECT_EQ(twice, once) << "a file may be asked any number of times";
    EXPECT_FALSE(once.tokens.empty());
    EXPECT_EQ(once.kept[0][0].size() < tokens.size(), how.method != ckv::Method::full);
  }
}

TEST_F(SavedContexts, AWholeCacheAnswersAsOneThatReadTheWholeChat) {
  const std::vector<TokenId> tokens = ckv::context_tokens(model(), boxes_text());
  const ckv::Compression how = third_by(ckv::Method::full);
  const Said parts = asked(ckv::read_context(model(), tokens, how, {}), how, {});
  const std::vector<TokenId> chat =
      ckv::encode_prompt(model(), ckv::chat_prompt(model(), ckv::message_text(boxes_text(), boxes_question)));
  EXPECT_EQ(parts.tokens, ckv::run(model(), chat, how, {.max_new_tokens = 10}).tokens);
}

TEST_F(SavedContexts, BothPartsAreTheTokensOfTheWholeChat) {
  for (const std::string text : {"One.", "Ends in a word", "A question?", "Blanks \n\n ", "\"Quoted.\"", "3",
                                 "a ?? b ?", "Caf\xC3\xA9", "  before"}) {
    const std::vector<TokenId> context = ckv::context_tokens(model(), text);
    for (const std::string question : {"Who?", "and who", "\"He\"?", "3 or 4", "\xC3\x89", "?"}) {
      std::vector<TokenId> both = context;
      const std::vector<TokenId> rest = ckv::rest_of_chat(model(), text, context, question);
      both.insert(both.end(), rest.begin(), rest.end());
      EXPECT_EQ(both,
                ckv::encode_prompt(model(), ckv::chat_prompt(model(), ckv::message_text(text, question))))
          << text << '|' << question;
    }
  }
  EXPECT_EQ(message_of<engine::Error>([&] { ckv::context_tokens(model(), " \n"); }),
            "the text is blank; give one that is asked about");
  const std::vector<TokenId> other = ckv::context_tokens(model(), "Another text.");
  EXPECT_NE(message_of<engine::Error>([&] {
              ckv::rest_of_chat(model(), "One.", other, "Who?");
            }).find("has other tokens than those that were read"),
            std::string::npos);
}

TEST_F(SavedContexts, DamageIsRefused) {
  const std::vector<TokenId> tokens = ckv::context_tokens(model(), "A short text.");
  const ckv::Compression how = third_by(ckv::Method::streaming);
  const ckv::Context context = ckv::read_context(model(), tokens, how, {});
  const std::string bytes = ckv::save_context(origin_of(tokens), model(), how, context);
  const auto refused = [](const std::string& damaged) {
    return message_of<engine::Error>([&] { ckv::SavedContext("a.cache", damaged); });
  };
  for (std::size_t at = 0; at < bytes.size(); at += at < 2000 ? 1 : 4999) {
    std::string damaged = bytes;
    damaged[at] = static_cast<char>(damaged[at] ^ 0x10);
    ASSERT_TRUE(refused(damaged).starts_with("a.cache: ")) << at << refused(damaged);
  }
  for (std::size_t length = 0; length < bytes.size(); length += length < 2000 ? 1 : 4999) {
    ASSERT_TRUE(refused(bytes.substr(0, length)).starts_with("a.cache: ")) << length;
  }
  EXPECT_EQ(refused("GGUF"), "a.cache: is no cache that `ckv generate --save-cache` wrote");
  std::string newer = bytes;
  newer[8] = 2;
  EXPECT_EQ(refused(newer), "a.cache: has version 2, this tool reads version 1; save it again");
  EXPECT_NE(refused(bytes.substr(0, bytes.size() - 1)).find("its checksum is not that of its bytes"),
            std::string::npos);

  // The library finds what differs.
  const ckv::SavedContext saved("a.cache", bytes);
  EXPECT_NE(message_of<compresskv::ArgumentError>([&] {
              saved.restore(model(), third_by(ckv::Method::snapkv), engine::KvType::f32, {});
            }).find("method is 'streaming, {"),
            std::string::npos);
  EXPECT_NE(message_of<compresskv::ArgumentError>([&] {
              saved.restore(model(), how, engine::KvType::f32,
                            {.heads = calibration("_head_idx.json"), .errors = {}});
            }).find("calibration is '', this plan's is 'heads "),
            std::string::npos);
  EXPECT_NE(message_of<compresskv::ArgumentError>([&] {
              saved.restore(model(), how, engine::KvType::f16, {});
            }).find("kv_row_bytes"),
            std::string::npos);
}

// ---- the tool ----

TEST(SavedContextTool, WhatDoesNotGoTogetherIsRefused) {
  const Folder folder;
  const std::string model_file = folder.write("m.gguf", "GGUF").string();
  const std::string cache = folder.write("c.cache", "no cache").string();
  const auto with = [&](const Arguments& more) {
    Arguments all = {"generate", "--model", model_file};
    all.insert(all.end(), more.begin(), more.end());
    return all;
  };
  const std::string out = folder.path("new.cache").string();
  const Arguments save = {"--prompt", "x", "--method", "streaming", "--rows", "9", "--save-cache", out};
  const auto and_save = [&](const Arguments& more) {
    Arguments all = with(save);
    all.insert(all.end(), more.begin(), more.end());
    return all;
  };
  expect_usage_error(and_save({"--raw"}), "--save-cache does not go with --raw");
  expect_usage_error(and_save({"--decode-every", "4"}), "--decode-every has no use with --save-cache alone");
  expect_usage_error(and_save({"--load-cache", cache}), "--load-cache");
  expect_usage_error(with({"--prompt", "x", "--method", "streaming", "--rows", "9", "--save-cache",
                           folder.path("none").string() + "/c"}),
                     "--save-cache '");
  expect_usage_error(with({"--load-cache", cache}), "--load-cache needs --question");
  const Arguments load = {"--load-cache", cache, "--question", "Who?"};
  const auto and_load = [&](const Arguments& more) {
    Arguments all = with(load);
    all.insert(all.end(), more.begin(), more.end());
    return all;
  };
  for (const Arguments& said : std::vector<Arguments>{{"--method", "full"},
                                                      {"--rows", "9"},
                                                      {"--ratio", "0.5"},
                                                      {"--bytes", "9MB"},
                                                      {"--window", "9"},
                                                      {"--pool", "avg"},
                                                      {"--heads-per-layer", "2"},
                                                      {"--kv-type", "f32"}}) {
    expect_usage_error(and_load(said), said[0] + " has no use with --load-cache, whose file says it");
  }
  expect_usage_error(and_load({"--prefill-chunk", "9"}), "the text was read already");
  expect_usage_error(and_load({"--prompt", "x"}), "--prompt");
  expect_failure(and_load({}), "c.cache: is no cache that");
  expect_usage_error(with({"--load-cache", out, "--question", "Who?"}), "no such file");
  // Refused by name, whether or not libllama is there.
  expect_usage_error(and_load({"--engine", "llama.cpp"}), "llama.cpp");
  EXPECT_FALSE(std::filesystem::exists(out));
}

class SavedContextRuns : public RealModel {};

TEST_F(SavedContextRuns, AnotherProcessAnswersAsOne) {
  const Folder folder;
  const auto generate = [&](const Arguments& more) {
    Arguments all = {"generate", "--model", model_path(), "--json", "--positions", "--max-new-tokens", "10"};
    all.insert(all.end(), more.begin(), more.end());
    return run_tool(all);
  };
  const std::string text = folder.write("boxes.txt", boxes_text()).string();
  const std::string both = folder.path("both.cache").string();
  const std::string alone = folder.path("alone.cache").string();
  const Arguments how = {"--prompt-file", text, "--method", "compresskv", "--ratio", "0.3"};
  const auto and_how = [&](const Arguments& more) {
    Arguments all = how;
    all.insert(all.end(), more.begin(), more.end());
    return generate(all);
  };
  const Outcome one = and_how({"--save-cache", both, "--question", boxes_question});
  ASSERT_EQ(one.code, 0) << one.err;
  const Outcome saved = and_how({"--save-cache", alone});
  ASSERT_EQ(saved.code, 0) << saved.err;
  EXPECT_EQ(read(alone), read(both)) << "the question is not in it";
  const Json said = saved.json();
  EXPECT_FALSE(said.contains("answer"));
  EXPECT_EQ(said.at("cache"), alone);
  EXPECT_LT(said.at("kv_bytes_kept").get<double>(), 0.4 * said.at("kv_bytes_full").get<double>());
  std::filesystem::remove(text);  // it is not read again
  const Outcome other = generate({"--load-cache", alone, "--question", boxes_question});
  ASSERT_EQ(other.code, 0) << other.err;
  for (const char* key : {"answer", "answer_token_ids", "prompt_token_ids", "rows", "kept_positions",
                          "kv_bytes_kept", "kv_bytes_full", "model_sha256"}) {
    EXPECT_EQ(other.json().at(key), one.json().at(key)) << key;
  }
  EXPECT_EQ(other.json().at("settings").at("method"), "compresskv");
  EXPECT_EQ(other.json().at("settings").at("budget"), Json({{"ratio", 0.3}}));

  // Another calibration, another model, damage.
  const std::string heads = calibration("_head_scores.json").string();
  expect_failure(
      {"generate", "--model", model_path(), "--load-cache", alone, "--question", "Who?", "--heads", heads},
      "saved sequence: calibration is 'heads ");
  const std::string other_model = folder.write("m.gguf", "GGUF").string();
  expect_failure({"generate", "--model", other_model, "--load-cache", alone, "--question", "Who?"},
                 "is a cache of another model file, whose SHA-256 begins " +
                     engine::sha256_of_file(model_path()).substr(0, 16));
  std::string bytes = read(alone);
  bytes[bytes.size() / 2] ^= 1;
  const std::string damaged = folder.write("damaged.cache", bytes).string();
  expect_failure({"generate", "--model", model_path(), "--load-cache", damaged, "--question", "Who?"},
                 "its checksum is not that of its bytes");
}

TEST_F(SavedContextRuns, LongAnswersStayOnTheirBudget) {
  const Folder folder;
  const std::string cache = folder.path("c.cache").string();
  const Outcome saved = run_tool({"generate", "--model", model_path(), "--prompt", boxes_text(), "--method",
                                  "snapkv", "--rows", "40", "--window", "32", "--save-cache", cache});
  ASSERT_EQ(saved.code, 0) << saved.err;
  EXPECT_NE(saved.out.find("c.cache: "), std::string::npos) << saved.out;
  const auto ask = [&](const char* every) {
    return run_tool({"generate", "--model", model_path(), "--load-cache", cache, "--question",
                     "Count to fifty.", "--decode-every", every, "--max-new-tokens", "30", "--json"});
  };
  const Outcome answered = ask("20");
  ASSERT_EQ(answered.code, 0) << answered.err;
  EXPECT_LE(answered.json().at("rows_peak").get<std::size_t>(), 40U + 20U + 20U);
  const Outcome refused = ask("1");
  EXPECT_EQ(refused.code, 2);
  EXPECT_NE(refused.err.find("fewer than the window of 32"), std::string::npos) << refused.err;
}

}  // namespace
}  // namespace ckv_test
