// Copies of a sequence that are shrunk while they are made, and layers that are shrunk again later.

#include <gtest/gtest.h>

#include <cstddef>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "engine/error.hpp"
#include "engine/sequence.hpp"
#include "engine/sequence_checks.hpp"
#include "engine/tiny_model.hpp"
#include "message_of.hpp"

namespace engine::test {
namespace {

constexpr std::size_t prompt_tokens = 40;

using compresskv::test::message_of;
using Rows = std::vector<std::vector<std::size_t>>;

/// So many rows of each KV head, spread over all that it holds.
Rows spread(const LayerView& view, std::size_t count) {
  Rows kept(static_cast<std::size_t>(view.kv_heads));
  for (std::size_t head = 0; head < kept.size(); ++head) {
    for (std::size_t r = 0; r < count; ++r) {
      kept[head].push_back(r * view.head_rows[head] / count);
    }
  }
  return kept;
}

/// A cascade: each layer keeps 20 rows when it comes and 12 once the next has come.
void cascade(LayerView& view) {
  keep_rows(view, spread(view, 20));
  if (view.layer > 0) {
    LayerView& earlier = view.earlier(view.layer - 1);
    EXPECT_EQ(earlier.layer, view.layer - 1);
    EXPECT_EQ(earlier.rows, 20U);
    EXPECT_EQ(earlier.allocated_rows, 20U);
    EXPECT_EQ(&view.earlier(view.layer - 1), &earlier);
    keep_rows(earlier, spread(earlier, 12));
  }
}

void expect_same(Sequence& a, Sequence& b, const TinyShape& shape) {
  EXPECT_EQ(a.cache_bytes(), b.cache_bytes());
  EXPECT_EQ(a.next_position(), b.next_position());
  EXPECT_EQ(copy(a.logits()), copy(b.logits()));
  for (int layer = 0; layer < shape.layers; ++layer) {
    for (int head = 0; head < shape.kv_heads; ++head) {
      ASSERT_EQ(a.rows(layer, head), b.rows(layer, head)) << "layer " << layer;
      const std::size_t count = a.rows(layer, head) * static_cast<std::size_t>(shape.head_dim);
      const float* left = a.cache(layer).keys<float>(head);
      const float* right = b.cache(layer).keys<float>(head);
      EXPECT_EQ(std::vector<float>(left, left + count), std::vector<float>(right, right + count));
    }
  }
  for (const TokenId token : {3, 14, 15}) {
    const std::size_t position = a.next_position();
    EXPECT_EQ(copy(a.decode(token, position)), copy(b.decode(token, position)));
  }
}

TEST(LayeredClone, IsWhatPrefillWouldHaveLeft) {
  const TinyModel tiny{{.layers = 3}};
  const Model model = tiny.model(2);
  const auto tokens = random_tokens(prompt_tokens, tiny.shape.vocabulary, 1);
  const std::vector<std::function<void(LayerView&)>> ways = {
      [](LayerView&) {}, [](LayerView& view) { keep_rows(view, spread(view, 9)); }, cascade};
  Sequence full{model};
  full.prefill(tokens);
  for (const auto& way : ways) {
    Sequence read{model};
    read.prefill(tokens, {.on_layer = way, .on_logits = {}});
    Sequence cloned = full.clone([&](LayerView& view) {
      EXPECT_EQ(view.window, 0U);
      EXPECT_EQ(view.queries, nullptr);
      way(view);
    });
    EXPECT_EQ(cloned.prefill_peak_cache_bytes(), read.prefill_peak_cache_bytes());
    expect_same(cloned, read, tiny.shape);
  }
  EXPECT_EQ(full.cache_bytes(), Sequence::full_cache_bytes(model.config(), KvType::f32, prompt_tokens));
}

TEST(LayeredClone, CascadesGiveMemoryBackAtOnce) {
  const TinyModel tiny{{.layers = 3}};
  const Model model = tiny.model();
  Sequence sequence{model};
  sequence.prefill(random_tokens(prompt_tokens, tiny.shape.vocabulary, 2),
                   {.on_layer = cascade, .on_logits = {}});
  const std::size_t row = Sequence::full_cache_bytes(model.config(), KvType::f32, 1) /
                          static_cast<std::size_t>(tiny.shape.layers);
  const auto layers = static_cast<std::size_t>(tiny.shape.layers);
  EXPECT_EQ(sequence.cache_bytes(), row * (12 * (layers - 1) + 20));
  // Whole are at most the last layer, and the one before it at 20 rows.
  EXPECT_EQ(sequence.prefill_peak_cache_bytes(), row * (12 * (layers - 2) + 20 + prompt_tokens));
}

TEST(LayeredClone, ShadowsCascadeToo) {
  const TinyModel tiny{{.layers = 3}};
  const Model model = tiny.model();
  const auto tokens = random_tokens(prompt_tokens, tiny.shape.vocabulary, 3);
  Sequence full{model};
  full.prefill(tokens);
  Sequence beside = full.clone([](LayerView& view) { cascade(view.shadow()); });
  // Layer 0 sees the same input either way, so that its shadow's output is that of the cache itself.
  std::vector<float> from_shadow;
  beside.hooks().shadow = [&](int layer, std::span<const float>, std::span<const float> part) {
    if (layer == 0) from_shadow = copy(part);
  };
  EXPECT_EQ(copy(beside.decode(5, prompt_tokens)), copy(full.clone().decode(5, prompt_tokens)));
  Sequence shrunk = full.clone([](LayerView& view) {
    cascade(view);
    view.shadow();
  });
  std::vector<float> from_cache;
  shrunk.hooks().shadow = [&](int layer, std::span<const float> whole, std::span<const float>) {
    if (layer == 0) from_cache = copy(whole);
  };
  shrunk.decode(5, prompt_tokens);
  ASSERT_FALSE(from_shadow.empty());
  EXPECT_EQ(from_shadow, from_cache);
}

TEST(LayeredClone, MistakesAreNamed) {
  const TinyModel tiny{{.layers = 3}};
  const Model model = tiny.model();
  const auto tokens = random_tokens(prompt_tokens, tiny.shape.vocabulary, 4);
  Sequence full{model};
  full.prefill(tokens);
  const auto message = [&](const std::function<void(LayerView&)>& way) {
    return message_of<Error>([&] { full.clone(way); });
  };
  EXPECT_EQ(message([](LayerView& view) { view.earlier(view.layer); }),
            "layer 0: layer 0 has not come before it");
  EXPECT_EQ(message([](LayerView& view) { view.earlier(-1); }), "layer 0: layer -1 has not come before it");
  EXPECT_EQ(message([](LayerView& view) {
              if (view.layer == 1) view.shadow().earlier(0);
            }),
            "layer 1: layer 0 before it has no shadow");
  EXPECT_EQ(message([](LayerView& view) {
              if (view.layer == 1) view.earlier(0);
              Rows kept = spread(view, 8);
              kept[0].pop_back();
              keep_rows(view, kept);
            }),
            "layer 1: the KV heads of layer 0 hold different numbers of rows, so that they do not lie at one "
            "distance");
  Sequence shadowed = full.clone([](LayerView& view) { view.shadow(); });
  EXPECT_NE(message_of<Error>([&] { shadowed.clone([](LayerView&) {}); }).find("clone: layer 0 has a shadow"),
            std::string::npos);
}

}  // namespace
}  // namespace engine::test
