// Heads that are masked: what the model is without them.

#include <gtest/gtest.h>

#include <array>
#include <cstddef>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "engine/error.hpp"
#include "engine/sequence.hpp"
#include "engine/sequence_checks.hpp"
#include "engine/tiny_model.hpp"
#include "message_of.hpp"

namespace engine::test {
namespace {

using compresskv::test::message_of;

const std::vector<HeadIndex> masked = {
    {.layer = 0, .head = 4}, {.layer = 1, .head = 0}, {.layer = 1, .head = 5}};

/// The model whose output projection does not read the masked heads.
Model without_heads(TinyModel tiny) {
  const auto width = static_cast<std::size_t>(tiny.shape.heads * tiny.shape.head_dim);
  const auto head_dim = static_cast<std::size_t>(tiny.shape.head_dim);
  for (const auto& [layer, head] : masked) {
    std::vector<float>& weights = tiny.weights.at("blk." + std::to_string(layer) + ".attn_output.weight");
    for (std::size_t i = 0; i < weights.size(); ++i) {
      if (i % width / head_dim == static_cast<std::size_t>(head)) weights[i] = 0.0F;
    }
  }
  const auto tensors = std::exchange(tiny.writer.tensors, {});
  tiny.writer.data = {};
  for (const auto& tensor : tensors)
    tiny.writer.tensor(tensor.name, tensor.shape, tiny.weights.at(tensor.name));
  return tiny.model();
}

TEST(MaskedHeads, AreAsIfTheOutputProjectionDidNotReadThem) {
  const TinyModel tiny;
  const Model model = tiny.model(2);
  const Model less = without_heads(tiny);
  const auto tokens = random_tokens(150, tiny.shape.vocabulary, 1);

  Sequence with_mask{model, {.masked_heads = masked}};
  Sequence expected{less};
  Sequence whole{model};
  with_mask.prefill(std::span(tokens).first(140));  // more than a tile, then a chunk
  with_mask.prefill(std::span(tokens).subspan(140));
  expected.prefill(tokens);
  whole.prefill(tokens);
  EXPECT_EQ(copy(with_mask.logits()), copy(expected.logits()));
  EXPECT_NE(copy(with_mask.logits()), copy(whole.logits()));

  // Beside sequences without a mask, whose bits stay what they are alone.
  Sequence cloned = with_mask.clone();
  Sequence alone = whole.clone();
  for (const TokenId token : {3, 14, 15, 9}) {
    const std::size_t position = expected.next_position();
    const std::array<DecodeStep, 3> steps = {{{.sequence = &whole, .token = token, .position = position},
                                              {.sequence = &with_mask, .token = token, .position = position},
                                              {.sequence = &cloned, .token = token, .position = position}}};
    decode_batch(steps);
    const auto wanted = copy(expected.decode(token, position));
    EXPECT_EQ(copy(with_mask.logits()), wanted);
    EXPECT_EQ(copy(cloned.logits()), wanted);
    EXPECT_EQ(copy(whole.logits()), copy(alone.decode(token, position)));
    EXPECT_NE(copy(whole.logits()), wanted);
  }
}

TEST(MaskedHeads, AreMaskedInTheShadowToo) {
  const TinyModel tiny;
  const Model model = tiny.model();
  const auto tokens = random_tokens(30, tiny.shape.vocabulary, 2);
  const auto shadows = [&](const Model& of, const SequenceOptions& options) {
    Sequence sequence{of, options};
    std::vector<std::vector<float>> outputs;
    sequence.hooks().shadow = [&](int, std::span<const float> full, std::span<const float> shadow) {
      outputs.push_back(copy(full));
      outputs.push_back(copy(shadow));
    };
    const std::vector<std::vector<std::size_t>> kept(2, {0, 7, 28, 29});
    sequence.prefill(tokens,
                     {.on_layer = [&](LayerView& view) { keep_rows(view.shadow(), kept); }, .on_logits = {}});
    sequence.decode(5, tokens.size());
    return outputs;
  };
  const auto outputs = shadows(model, {.masked_heads = masked});
  EXPECT_EQ(outputs.size(), 4U);
  EXPECT_EQ(outputs, shadows(without_heads(tiny), {}));
  EXPECT_NE(outputs, shadows(model, {}));
}

TEST(MaskedHeads, HooksSeeTheirAttention) {
  const TinyModel tiny{{.layers = 1}};
  const Model model = tiny.model();
  const auto attention = [&](const SequenceOptions& options) {
    Sequence sequence{model, options};
    std::vector<std::vector<float>> rows;
    sequence.hooks().attention = [&](int, int, std::span<const float> row) { rows.push_back(copy(row)); };
    sequence.prefill(random_tokens(20, tiny.shape.vocabulary, 3));
    sequence.decode(5, 20);
    return rows;
  };
  EXPECT_EQ(attention({.masked_heads = {{.layer = 0, .head = 2}}}), attention({}));
}

TEST(MaskedHeads, ThatDoNotExistAreNamed) {
  const TinyModel tiny;
  const Model model = tiny.model();
  for (const HeadIndex& masked_head : {HeadIndex{2, 0}, {-1, 0}, {0, 6}, {1, -1}}) {
    EXPECT_EQ(message_of<Error>([&] { Sequence(model, {.masked_heads = {masked_head}}); }),
              "masked_heads names layer " + std::to_string(masked_head.layer) + " head " +
                  std::to_string(masked_head.head) + ", the model has layers 0 to 1 of heads 0 to 5");
  }
}

}  // namespace
}  // namespace engine::test
