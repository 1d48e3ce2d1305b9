// Layers shown again between decode steps, and the queries that decode steps show.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <numeric>
#include <span>
#include <stdexcept>
#include <vector>

#include "engine/error.hpp"
#include "engine/sequence.hpp"
#include "engine/sequence_checks.hpp"
#include "engine/tiny_model.hpp"
#include "message_of.hpp"

namespace engine::test {
namespace {

using compresskv::test::message_of;

/// The first `count` rows of each KV head; they lie in front already.
void keep_first(LayerView& view, std::size_t count) { view.shrink(count); }

TEST(Revisit, DecodeStepsShowTheQueriesThatPrefillWouldHave) {
  const TinyModel tiny{{.layers = 3}};
  const Model model = tiny.model();
  const auto tokens = random_tokens(30, tiny.shape.vocabulary, 1);
  std::vector<std::vector<float>> read;  // [layer], [head][window][head_dim]
  Sequence whole{model};
  whole.prefill(tokens, {.window = 5,
                         .on_layer =
                             [&](LayerView& view) {
                               read.emplace_back(view.queries, view.queries + view.heads * 5 * view.head_dim);
                             },
                         .on_logits = {}});
  Sequence sequence{model};
  sequence.prefill(std::span(tokens).first(25));
  std::vector<std::vector<std::vector<float>>> shown(3);  // [layer][step], [head][head_dim]
  sequence.hooks().queries = [&](int layer, std::span<const float> queries) {
    shown[static_cast<std::size_t>(layer)].emplace_back(queries.begin(), queries.end());
  };
  for (std::size_t t = 25; t < 30; ++t) {
    sequence.decode(tokens[t], t);
  }
  const auto head_dim = static_cast<std::size_t>(tiny.shape.head_dim);
  for (std::size_t layer = 0; layer < 3; ++layer) {
    ASSERT_EQ(shown[layer].size(), 5U);
    for (std::size_t step = 0; step < 5; ++step) {
      const std::vector<float>& queries = shown[layer][step];
      ASSERT_EQ(queries.size(), static_cast<std::size_t>(tiny.shape.heads) * head_dim);
      for (std::size_t i = 0; i < queries.size(); ++i) {
        const std::size_t head = i / head_dim;
        // Decoding multiplies in another order than prefill.
        ASSERT_NEAR(queries[i], read[layer][(head * 5 + step) * head_dim + i % head_dim], 1e-4)
            << "layer " << layer << " step " << step << " head " << head;
      }
    }
  }
}

TEST(Revisit, AShrunkCacheDecodesAsOneThatPrefillLeft) {
  const TinyModel tiny{{.layers = 3}};
  const Model model = tiny.model();
  const auto tokens = random_tokens(30, tiny.shape.vocabulary, 2);
  const auto shrink = [](LayerView& view) { keep_first(view, 10); };
  Sequence read{model};
  read.prefill(tokens, {.on_layer = shrink, .on_logits = {}});
  Sequence sequence{model};
  sequence.prefill(tokens);
  int layers = 0;
  sequence.revisit([&](LayerView& view) {
    EXPECT_EQ(view.layer, layers++);
    EXPECT_EQ(view.rows, 30U);
    EXPECT_EQ(view.window, 0U);
    shrink(view);
  });
  EXPECT_EQ(layers, 3);
  EXPECT_EQ(sequence.cache_bytes(), read.cache_bytes());
  EXPECT_EQ(sequence.next_position(), 30U);
  for (std::size_t t = 30; t < 40; ++t) {
    EXPECT_EQ(copy(sequence.decode(7, t)), copy(read.decode(7, t)));
  }
  // Its rows are no longer those of the last positions.
  EXPECT_NE(message_of<Error>([&] { sequence.truncate(20); }).find("was last shrunk"), std::string::npos);

  const std::size_t before = sequence.cache_bytes();
  sequence.revisit([](LayerView&) {});
  EXPECT_LE(sequence.cache_bytes(), before);
  EXPECT_EQ(sequence.rows(2, 0), 20U);
}

TEST(Revisit, SaysWhatCannotBe) {
  const TinyModel tiny{{.layers = 2}};
  const Model model = tiny.model();
  const auto tokens = random_tokens(12, tiny.shape.vocabulary, 3);
  Sequence sequence{model};
  EXPECT_EQ(message_of<Error>([&] { sequence.revisit([](LayerView&) {}); }),
            "revisit: the sequence is empty; call prefill first");
  sequence.prefill(tokens);
  EXPECT_THROW(sequence.revisit([](LayerView&) { throw std::runtime_error("stop"); }), std::runtime_error);
  EXPECT_EQ(sequence.next_position(), 0U);
  EXPECT_EQ(sequence.cache_bytes(), 0U);

  sequence.prefill(tokens, {.on_layer = [](LayerView& view) { view.shadow(); }, .on_logits = {}});
  EXPECT_NE(message_of<Error>([&] { sequence.revisit([](LayerView&) {}); }).find("has a shadow"),
            std::string::npos);
}

}  // namespace
}  // namespace engine::test
