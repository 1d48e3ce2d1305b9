// What the end-to-end tests ask of the real model: needles, and a short prompt of which every logit is looked
// at.
#pragma once

#include <gtest/gtest.h>

#include <compresskv/io/calibration_files.hpp>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "ckv/method.hpp"
#include "ckv/needle.hpp"
#include "ckv/run.hpp"
#include "engine/error.hpp"
#include "evaluation_needles.hpp"
#include "model_fixture.hpp"

namespace ckv_test {

inline ckv::Compression compresskv_at(double share) {
  return {.method = ckv::Method::compresskv,
          .budget = compresskv::Budget::kept_ratio(share),
          .heads = compresskv::io::load_head_ranking(calibration("_head_idx.json")),
          .errors = compresskv::io::load_layer_errors(calibration("_layer_score.jsonl"))};
}

class Needles : public RealModel {
 protected:
  void SetUp() override {
    RealModel::SetUp();
    if (IsSkipped()) {
      return;
    }
    try {
      haystack_ = ckv::Haystack::from_bible();
    } catch (const engine::Error& error) {
      GTEST_SKIP() << error.what();
    }
  }

  ckv::NeedlePrompt prompt(std::size_t needle) const {
    return ckv::needle_prompt(model(), *haystack_, evaluation_needles[needle], evaluation_place(needle));
  }

  std::optional<ckv::Haystack> haystack_;
};

/// Whether the answer holds what the needle says; a line of the test's output shows it.
inline bool is_right(std::string_view way, std::size_t needle, const ckv::NeedlePrompt& prompt,
                     const std::string& answer) {
  const bool right = ckv::holds(answer, evaluation_needles[needle].expect);
  std::printf("  needle %2zu, %zu tokens, %-10s %s: %s\n", needle, prompt.tokens.size(),
              std::string(way).c_str(), right ? "right" : "wrong", answer.c_str());
  std::fflush(stdout);
  return right;
}

/// A prompt of some 300 tokens.
inline std::vector<engine::TokenId> boxes_prompt() {
  std::string text;
  for (int i = 0; i < 16; ++i) {
    text += "Item " + std::to_string(i) + ": the box number " + std::to_string(i * i) + " holds " +
            std::to_string(100 - i) + " nails. ";
  }
  return ckv::encode_prompt(
      model(), ckv::chat_prompt(model(), ckv::message_text(text, "How many nails are in box number 25?")));
}

/// All that can be seen of a run.
struct Trace {
  std::vector<engine::TokenId> tokens;
  std::vector<std::vector<float>> logits;                     // [step][vocabulary]
  std::vector<std::vector<std::vector<std::uint32_t>>> kept;  // as RunResult::kept
};

/// Answers `boxes_prompt()`.
inline Trace trace(const ckv::Compression& how, ckv::RunOptions options = {}) {
  Trace out;
  options.max_new_tokens = 24;
  options.on_logits = [&](std::span<const float> logits) {
    out.logits.emplace_back(logits.begin(), logits.end());
  };
  ckv::RunResult result = ckv::run(model(), boxes_prompt(), how, options);
  out.tokens = std::move(result.tokens);
  out.kept = std::move(result.kept);
  return out;
}

}  // namespace ckv_test
