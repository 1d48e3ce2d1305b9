// The second pass of KVzip over the real model: what is fed, and that the sequence is then as it was.

#include "ckv/repeat.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <compresskv/compresskv.hpp>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "ckv/compress.hpp"
#include "ckv/run.hpp"
#include "engine/error.hpp"
#include "engine/sequence.hpp"
#include "model_fixture.hpp"
#include "runs.hpp"

namespace ckv_test {
namespace {

class Repeats : public RealModel {
 protected:
  static std::unique_ptr<ckv::PromptCompressor> kvzip(double kept, ckv::Method method = ckv::Method::kvzip) {
    ckv::Compression how{.method = method, .budget = compresskv::Budget::kept_ratio(kept)};
    model().show_outputs(how);
    return ckv::make_compressor(how, ckv::shape_of(model().model.config(), engine::KvType::f32),
                                model().model.pool());
  }
};

std::string text_of(std::span<const engine::TokenId> tokens) {
  std::string text;
  for (const engine::TokenId token : tokens) {
    text += model().token_bytes(token);
  }
  return text;
}

TEST_F(Repeats, AreAskedForInTheTemplatesWords) {
  const std::vector<engine::TokenId> context = boxes_prompt();
  const std::string first = text_of(ckv::repeat_request(model(), context, 0));
  EXPECT_NE(first.find("Repeat the previous context exactly."), std::string::npos) << first;
  EXPECT_EQ(first.rfind("assistant"), first.size() - std::string("assistant\n").size()) << first;
  const std::string later = text_of(ckv::repeat_request(model(), context, 100));
  EXPECT_NE(later.find("exactly, starting with " + text_of(std::span(context).subspan(92, 8))),
            std::string::npos)
      << later;
  const std::string early = text_of(ckv::repeat_request(model(), context, 3));
  EXPECT_NE(early.find("starting with " + text_of(std::span(context).first(3))), std::string::npos) << early;
}

TEST_F(Repeats, LeaveTheSequenceAsItWas) {
  const std::vector<engine::TokenId> context = boxes_prompt();
  engine::Sequence sequence{model().model};
  sequence.prefill(context);
  const std::vector<float> logits(sequence.logits().begin(), sequence.logits().end());
  engine::Sequence before = sequence.clone();
  const auto compressor = kvzip(0.3);
  compressor->begin(context.size());
  ckv::PromptCompressor* const shown = compressor.get();
  ckv::repeat_context(model(), sequence, context, {&shown, 1}, 100);
  EXPECT_EQ(sequence.next_position(), context.size());
  EXPECT_EQ(std::vector<float>(sequence.logits().begin(), sequence.logits().end()), logits);
  for (const engine::TokenId token : {engine::TokenId{20}, engine::TokenId{300}}) {
    const auto a = sequence.decode(token, sequence.next_position());
    const std::vector<float> after(a.begin(), a.end());
    const auto b = before.decode(token, before.next_position());
    EXPECT_EQ(after, std::vector<float>(b.begin(), b.end()));
  }
}

TEST_F(Repeats, OfStretchesKeepTheBudgetToTheRow) {
  const std::vector<engine::TokenId> context = boxes_prompt();
  const auto& config = model().model.config();
  std::vector<std::vector<std::vector<std::uint32_t>>> kept;
  for (const auto& [method, at_once] :
       {std::pair{ckv::Method::kvzip, std::size_t{60}}, std::pair{ckv::Method::kvzip, context.size()},
        std::pair{ckv::Method::kvzip_plus, context.size()}}) {
    SCOPED_TRACE(ckv::info(method).name);
    engine::Sequence sequence{model().model};
    sequence.prefill(context);
    const auto compressor = kvzip(0.25, method);
    compressor->begin(context.size());
    ckv::PromptCompressor* const shown = compressor.get();
    ckv::repeat_context(model(), sequence, context, {&shown, 1}, at_once);
    sequence.revisit([&](engine::LayerView& layer) { compressor->finish(layer); });
    std::size_t rows = 0;
    bool unequal = false;
    for (int layer = 0; layer < config.layers; ++layer) {
      for (int head = 0; head < config.kv_heads; ++head) {
        rows += sequence.rows(layer, head);
        unequal = unequal || sequence.rows(layer, head) != sequence.rows(0, 0);
      }
    }
    EXPECT_EQ(rows, context.size() / 4 * static_cast<std::size_t>(config.layers * config.kv_heads));
    EXPECT_TRUE(unequal) << "heads share by what they look at";
    kept.push_back(ckv::positions_of(compressor->retained(3)));
  }
  EXPECT_NE(kept[1], kept[2]) << "what values add to the output counts";
}

/// What a layer shows are the lengths of what its attention was given, and the weights are those of its
/// product.
TEST_F(Repeats, AreShownWithLengthsAndWeights) {
  const std::vector<engine::TokenId> context = boxes_prompt();
  const auto& config = model().model.config();
  engine::Sequence sequence{model().model};
  std::vector<float> norms;
  const auto note = [&](engine::LayerView& layer) {
    if (layer.layer == 0) {
      norms.assign(layer.hidden_norms, layer.hidden_norms + layer.window);
    }
  };
  sequence.prefill(context, {.window = 5, .on_layer = note, .on_logits = {}});
  ASSERT_EQ(norms.size(), 5U);
  for (std::size_t i = 0; i < 5; ++i) {  // of the first layer: the embedding, normed
    const engine::TokenId token = context[context.size() - 5 + i];
    double squares = 0.0;
    for (int e = 0; e < config.embedding; ++e) {
      squares += std::pow(static_cast<double>(model().model.embedding()(token, e)), 2);
    }
    double normed = 0.0;
    for (int e = 0; e < config.embedding; ++e) {
      const double scale =
          1.0 / std::sqrt(squares / config.embedding + static_cast<double>(config.rms_epsilon));
      normed += std::pow(static_cast<double>(model().model.embedding()(token, e)) * scale *
                             static_cast<double>(model().model.layers()[0].attention_norm[e]),
                         2);
    }
    EXPECT_NEAR(norms[i], std::sqrt(normed), 1e-4 * std::sqrt(normed));
  }
  const auto weights = model().output_weights();
  ASSERT_TRUE(weights.has_value());
  std::vector<float> row(static_cast<std::size_t>(config.head_dim));
  weights->read(2, 4, 17, row.data());
  for (int e = 0; e < config.head_dim; ++e) {
    EXPECT_EQ(row[static_cast<std::size_t>(e)],
              model().model.layers()[2].output(17, 4 * config.head_dim + e));
  }
}

TEST_F(Repeats, ThatDoNotFitAreRefusedBeforeTheyAreFed) {
  const std::size_t most = model().model.config().context;
  std::vector<engine::TokenId> context(most - 20, engine::TokenId{20});
  engine::Sequence sequence{model().model};
  const auto compressor = kvzip(0.3);
  compressor->begin(context.size());
  ckv::PromptCompressor* const shown = compressor.get();
  try {
    ckv::repeat_context(model(), sequence, context, {&shown, 1});
    FAIL() << "it does not fit";
  } catch (const engine::Error& error) {
    EXPECT_NE(std::string(error.what()).find("are more than the model's " + std::to_string(most)),
              std::string::npos)
        << error.what();
  }
}

}  // namespace
}  // namespace ckv_test
