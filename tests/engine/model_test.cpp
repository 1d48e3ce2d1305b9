// The forward pass against a plain one in double on tiny random models, against recorded logits of an
// independent implementation on a real one, and everything the engine must refuse.
#include "engine/model.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <fstream>
#include <nlohmann/json.hpp>
#include <numbers>
#include <numeric>
#include <stdexcept>

#include "engine/sequence.hpp"
#include "engine/sequence_checks.hpp"
#include "engine/tiny_model.hpp"
#include "message_of.hpp"

namespace engine {
namespace {

using compresskv::test::message_of;
using compresskv::test::says;
using test::copy;
using test::GgufWriter;
using test::keep_rows;
using test::near;
using test::plain_frequencies;
using test::random_tokens;
using test::Reference;
using test::TinyModel;
using test::TinyShape;

// Float32 against double through two layers; the numbers themselves are of size 1 to 10.
constexpr double tolerance = 2e-4;

// Prefill of the first `prompt` tokens, then one decode step for each that is left; all logits.
std::vector<std::vector<float>> run(Sequence& sequence, std::span<const TokenId> tokens, std::size_t prompt,
                                    PrefillOptions options = {}) {
  std::vector<std::vector<float>> logits;
  options.on_logits = [&](std::size_t first, const Matrix& tile) {
    EXPECT_EQ(first, logits.size());
    for (Eigen::Index t = 0; t < tile.rows(); ++t) {
      logits.emplace_back(tile.row(t).data(), tile.row(t).data() + tile.cols());
    }
  };
  const std::vector<float> last = copy(sequence.prefill(tokens.first(prompt), options));
  EXPECT_EQ(logits.size(), prompt);
  EXPECT_EQ(last, logits.back());
  for (std::size_t t = prompt; t < tokens.size(); ++t) {
    EXPECT_EQ(sequence.next_position(), t);
    logits.push_back(copy(sequence.decode(tokens[t], t)));
  }
  return logits;
}

struct Variant {
  std::string_view name;
  TinyShape shape;
};

class Forward : public testing::TestWithParam<Variant> {};

TEST_P(Forward, AgreesWithAPlainPassInDouble) {
  const TinyModel tiny{GetParam().shape};
  const Model model = tiny.model();
  // Over the sizes of the engine's tiles: 64 queries, 128 tokens, 256 keys.
  for (const std::size_t prompt : {1UL, 2UL, 63UL, 65UL, 129UL, 300UL}) {
    SCOPED_TRACE(prompt);
    const std::vector<TokenId> tokens = random_tokens(prompt + 3, GetParam().shape.vocabulary, prompt);
    const Reference reference{tiny, tokens, plain_frequencies(tiny.shape)};
    Sequence sequence{model};
    const auto logits = run(sequence, tokens, prompt);
    for (std::size_t t = 0; t < tokens.size(); ++t) {
      ASSERT_TRUE(near(logits[t], reference.logits[t], tolerance)) << "position " << t;
    }
    EXPECT_EQ(sequence.rows(1, 0), tokens.size());
  }
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, Forward,
    testing::Values(Variant{"grouped", {}}, Variant{"one_head", {.heads = 1, .kv_heads = 1}},
                    Variant{"group_of_nine", {.heads = 9, .kv_heads = 1}},
                    Variant{"no_groups", {.heads = 4, .kv_heads = 4}}, Variant{"tied_output", {.tied = true}},
                    Variant{"part_rotated", {.rope_dimensions = 4}},
                    Variant{"odd_sizes", {.embedding = 33, .feed_forward = 37, .head_dim = 10}}),
    [](const auto& tested) { return std::string{tested.param.name}; });

// ---- rotary scaling
// ---------------------------------------------------------------------------------------------

void expect_rotation(const TinyModel& tiny, std::span<const double> frequencies, double magnitude = 1.0) {
  const Model model = tiny.model();
  ASSERT_TRUE(near(model.rope_frequencies(), frequencies, 1e-12));
  EXPECT_NEAR(model.rope_magnitude(), magnitude, 1e-12);
  const std::vector<TokenId> tokens = random_tokens(90, tiny.shape.vocabulary, 1);
  const Reference reference{tiny, tokens, frequencies, magnitude};
  Sequence sequence{model};
  const auto logits = run(sequence, tokens, 85);
  for (std::size_t t = 0; t < tokens.size(); ++t) {
    ASSERT_TRUE(near(logits[t], reference.logits[t], tolerance)) << t;
  }
}

TEST(Rope, ScalesLinearly) {
  TinyModel tiny;
  tiny.writer.set("llama.rope.scaling.type", std::string{"linear"}).set("llama.rope.scaling.factor", 4.0F);
  std::vector<double> frequencies = plain_frequencies(tiny.shape);
  for (double& f : frequencies) f /= 4.0;
  expect_rotation(tiny, frequencies);
}

TEST(Rope, DividesByTheFilesFrequencyFactors) {
  TinyModel tiny;
  const std::vector<float> divisors{1.0F, 1.5F, 4.0F, 8.0F};
  tiny.writer.tensor("rope_freqs.weight", {4}, divisors);
  std::vector<double> frequencies = plain_frequencies(tiny.shape);
  for (std::size_t i = 0; i < frequencies.size(); ++i) frequencies[i] /= double{divisors[i]};
  expect_rotation(tiny, frequencies);
}

TEST(Rope, AFactorWithoutATypeScalesLinearly) {
  for (const char* key : {"llama.rope.scaling.factor", "llama.rope.scale_linear"}) {
    TinyModel tiny;
    tiny.writer.set(key, 4.0F);
    std::vector<double> frequencies = plain_frequencies(tiny.shape);
    for (double& f : frequencies) f /= 4.0;
    expect_rotation(tiny, frequencies);
    tiny.writer.set(key, 0.0F);
    expect_rotation(tiny, plain_frequencies(tiny.shape));
  }
}

TEST(Rope, TheAttentionFactorMultipliesTheRotation) {
  for (const std::string key : {"attn_factor", "yarn_attn_factor"}) {
    TinyModel tiny;
    tiny.writer.set("llama.rope.scaling." + key, 1.5F);
    expect_rotation(tiny, plain_frequencies(tiny.shape), 1.5);
    tiny.writer.set("llama.rope.scaling.type", std::string{"yarn"})
        .set("llama.rope.scaling.factor", 4.0F)
        .set("llama.rope.scaling.original_context_length", std::uint32_t{256});
    EXPECT_NEAR(tiny.model().rope_magnitude(), 1.5 * 1.1386294361119891, 1e-9) << key;
  }
}

// Each pair by the definition: how often it turns over the original context says how much of it is slowed
// down.
TEST(Rope, YarnTakesItsBoundsAndItsBlendFromTheFile) {
  struct Given {
    float fast, slow, blend;
  };
  for (const Given given : {Given{32, 1, 1}, Given{8, 2, 1}, Given{16, 4, 0.5F}, Given{32, 1, 0}}) {
    TinyModel tiny{{.head_dim = 16, .rope_dimensions = 16}};
    tiny.writer.set("llama.rope.scaling.type", std::string{"yarn"})
        .set("llama.rope.scaling.factor", 4.0F)
        .set("llama.rope.scaling.original_context_length", std::uint32_t{256})
        .set("llama.rope.scaling.yarn_beta_fast", given.fast)
        .set("llama.rope.scaling.yarn_beta_slow", given.slow)
        .set("llama.rope.scaling.yarn_ext_factor", given.blend);
    const auto pair_turning = [](double times) {
      return 16.0 * std::log(256.0 / (times * 2.0 * std::numbers::pi)) / (2.0 * std::log(5000.0));
    };
    const double first = std::max(0.0, std::floor(pair_turning(given.fast)));
    const double last = std::min(15.0, std::ceil(pair_turning(given.slow)));
    std::vector<double> frequencies = plain_frequencies(tiny.shape);
    for (std::size_t i = 0; i < frequencies.size(); ++i) {
      const double ramp = std::clamp((static_cast<double>(i) - first) / (last - first), 0.0, 1.0);
      const double kept = (1.0 - ramp) * double{given.blend};
      frequencies[i] = frequencies[i] / 4.0 * (1.0 - kept) + frequencies[i] * kept;
    }
    expect_rotation(tiny, frequencies, given.blend > 0 ? 0.1 * std::log(4.0) + 1.0 : 1.0);
  }
}

// Recorded from transformers' _compute_yarn_parameters for head_dim 16, base 5000, factor 4, 256 original
// positions (truncated correction range): inverse frequencies and attention factor.
TEST(Rope, FollowsYarn) {
  TinyModel tiny{{.head_dim = 16, .rope_dimensions = 16}};
  tiny.writer.set("llama.rope.scaling.type", std::string{"yarn"})
      .set("llama.rope.scaling.factor", 4.0F)
      .set("llama.rope.scaling.original_context_length", std::uint32_t{256});
  const std::vector<double> recorded{1.0,
                                     0.2801896631717682,
                                     0.07432544231414795,
                                     0.017941730096936226,
                                     0.0035355340223759413,
                                     0.001219224650412798,
                                     0.0004204481956548989,
                                     0.00014499106328003109};
  const Model model = tiny.model();
  ASSERT_TRUE(near(model.rope_frequencies(), recorded, 1e-7));
  EXPECT_NEAR(model.rope_magnitude(), 1.1386294361119891, 1e-9);
  const std::vector<double> exact(model.rope_frequencies().begin(), model.rope_frequencies().end());
  expect_rotation(tiny, exact, model.rope_magnitude());
}

// ---- the cache
// --------------------------------------------------------------------------------------------------

TEST(Prefill, ShowsEachLayerKeysValuesAndWindowQueries) {
  const TinyModel tiny;
  const TinyShape& s = tiny.shape;
  const Model model = tiny.model();
  const std::vector<TokenId> tokens = random_tokens(70, s.vocabulary, 2);
  const Reference reference{tiny, tokens, plain_frequencies(s)};
  for (const std::size_t window : {0UL, 1UL, 8UL, 70UL, 1000UL}) {
    int layers = 0;
    Sequence sequence{model};
    sequence.prefill(tokens,
                     {.window = window,
                      .on_layer =
                          [&](LayerView& view) {
                            const auto l = static_cast<std::size_t>(view.layer);
                            EXPECT_EQ(view.layer, layers++);
                            EXPECT_EQ(view.rows, tokens.size());
                            EXPECT_EQ(view.heads, s.heads);
                            EXPECT_EQ(view.kv_heads, s.kv_heads);
                            EXPECT_EQ(view.head_dim, s.head_dim);
                            ASSERT_EQ(view.window, std::min(window, tokens.size()));
                            const auto d = static_cast<std::size_t>(s.head_dim);
                            for (std::size_t t = 0; t < tokens.size(); ++t) {
                              for (std::size_t h = 0; h < static_cast<std::size_t>(s.kv_heads); ++h) {
                                const std::size_t at = (h * view.allocated_rows + t) * d;
                                const std::span keys{reference.keys[l][t]};
                                const std::span values{reference.values[l][t]};
                                ASSERT_TRUE(near(std::span{view.keys<float>() + at, d},
                                                 keys.subspan(h * d, d), tolerance));
                                ASSERT_TRUE(near(std::span{view.values<float>() + at, d},
                                                 values.subspan(h * d, d), tolerance));
                              }
                            }
                            for (std::size_t h = 0; h < static_cast<std::size_t>(s.heads); ++h) {
                              for (std::size_t i = 0; i < view.window; ++i) {
                                const std::size_t t = tokens.size() - view.window + i;
                                const std::span queries{reference.queries[l][t]};
                                ASSERT_TRUE(near(std::span{view.queries + (h * view.window + i) * d, d},
                                                 queries.subspan(h * d, d), tolerance));
                              }
                            }
                          },
                      .on_logits = {}});
    EXPECT_EQ(layers, s.layers);
  }
}

// Different rows in every layer and KV head: what is kept of 90 positions in a layer, by head.
std::vector<std::vector<std::size_t>> some_rows(int layer, std::size_t prompt) {
  std::vector<std::vector<std::size_t>> kept(2);
  for (std::size_t t = 0; t < prompt; ++t) {
    if (layer == 0 ? t % 3 == 1 : t % 7 == 2) kept[0].push_back(t);
    if (layer == 0 ? t < 5 || t + 4 >= prompt : t % 2 == 0) kept[1].push_back(t);
  }
  return kept;
}

TEST(Decode, ReadsKeptRowsAtTheirTruePositions) {
  const TinyModel tiny;
  const Model model = tiny.model();
  const std::size_t prompt = 90;
  // Enough steps for the cache to grow by more than one allocation.
  const std::vector<TokenId> tokens = random_tokens(prompt + 140, tiny.shape.vocabulary, 3);
  const Reference reference{tiny, tokens, plain_frequencies(tiny.shape), 1.0,
                            [&](int l, int h, std::size_t t, std::size_t k) {
                              if (t < prompt || k >= prompt) return true;
                              const auto kept = some_rows(l, prompt);
                              return std::ranges::find(kept[static_cast<std::size_t>(h)], k) !=
                                     kept[static_cast<std::size_t>(h)].end();
                            }};
  Sequence sequence{model};
  const auto logits =
      run(sequence, tokens, prompt,
          {.on_layer = [&](LayerView& view) { keep_rows(view, some_rows(view.layer, prompt)); },
           .on_logits = {}});
  for (std::size_t t = 0; t < tokens.size(); ++t) {
    ASSERT_TRUE(near(logits[t], reference.logits[t], tolerance)) << "position " << t;
  }
  for (int l = 0; l < 2; ++l) {
    for (int h = 0; h < 2; ++h) {
      EXPECT_EQ(sequence.rows(l, h), some_rows(l, prompt)[static_cast<std::size_t>(h)].size() + 140);
    }
  }
}

// A head that keeps nothing: only the generated tokens are left to attend to.
TEST(Decode, GoesOnFromAnEmptyHead) {
  const TinyModel tiny;
  const Model model = tiny.model();
  const std::vector<TokenId> tokens = random_tokens(25, tiny.shape.vocabulary, 4);
  const Reference reference{
      tiny, tokens, plain_frequencies(tiny.shape), 1.0,
      [](int, int h, std::size_t t, std::size_t k) { return h != 0 || t < 20 || k >= 20; }};
  Sequence sequence{model};
  const auto logits = run(sequence, tokens, 20,
                          {.on_layer =
                               [](LayerView& view) {
                                 view.shrink(std::vector<std::size_t>{0, view.rows});
                               },
                           .on_logits = {}});
  for (std::size_t t = 0; t < tokens.size(); ++t)
    ASSERT_TRUE(near(logits[t], reference.logits[t], tolerance)) << t;
}

TEST(Prefill, HoldsOneFullLayerAtATime) {
  const TinyModel tiny{{.layers = 4}};
  const Model model = tiny.model();
  const std::size_t prompt = 90;
  for (const KvType type : {KvType::f32, KvType::f16, KvType::bf16}) {
    const std::size_t row_bytes = 2 * 8 * kv_element_bytes(type);  // K and V of one KV head
    std::size_t kept_bytes = 0;
    std::size_t expected_peak = 0;
    Sequence sequence{model, {.kv_type = type}};
    sequence.prefill(random_tokens(prompt, 41, 5),
                     {.on_layer =
                          [&](LayerView& view) {
                            const std::size_t full = 2 * prompt * row_bytes;
                            EXPECT_EQ(sequence.cache_bytes(), kept_bytes + full);
                            expected_peak = std::max(expected_peak, kept_bytes + full);
                            const std::vector<std::size_t> rows{7, 30};
                            view.shrink(rows);
                            kept_bytes += (7 + 30) * row_bytes;
                          },
                      .on_logits = {}});
    EXPECT_EQ(sequence.cache_bytes(), kept_bytes);
    EXPECT_EQ(sequence.peak_cache_bytes(), expected_peak);
    EXPECT_EQ(sequence.prefill_peak_cache_bytes(), expected_peak);
    EXPECT_EQ(Sequence::full_cache_bytes(model.config(), type, prompt), 4 * 2 * prompt * row_bytes);
    sequence.reserve(10);
    EXPECT_EQ(sequence.cache_bytes(), kept_bytes + 4 * 2 * 10 * row_bytes);
    EXPECT_EQ(sequence.prefill_peak_cache_bytes(), expected_peak);
  }
}

TEST(Cache, RoundsToTheElementTypeAndNoMore) {
  const TinyModel tiny;
  const Model model = tiny.model();
  const std::vector<TokenId> tokens = random_tokens(80, tiny.shape.vocabulary, 6);
  const Reference reference{tiny, tokens, plain_frequencies(tiny.shape)};
  // Keys and values are of size 1 to 5; half keeps 11 bits of each, bfloat16 8.
  for (const auto& [type, bound] : {std::pair{KvType::f16, 2e-2}, {KvType::bf16, 2e-1}}) {
    Sequence sequence{model, {.kv_type = type}};
    const auto logits = run(sequence, tokens, 70);
    double largest = 0;
    for (std::size_t t = 0; t < tokens.size(); ++t) {
      ASSERT_TRUE(near(logits[t], reference.logits[t], bound)) << kv_type_name(type) << ", position " << t;
      for (std::size_t i = 0; i < logits[t].size(); ++i) {
        largest = std::max(largest, std::abs(double{logits[t][i]} - reference.logits[t][i]));
      }
    }
    EXPECT_GT(largest, tolerance) << "nothing was rounded: is the cache of the type asked for?";
  }
}

TEST(Cache, TypeNamesGoBothWays) {
  for (const KvType type : {KvType::f32, KvType::f16, KvType::bf16})
    EXPECT_EQ(parse_kv_type(kv_type_name(type)), type);
  EXPECT_TRUE(says(message_of<Error>([] { parse_kv_type("q8_0"); }), {"q8_0", "f32", "f16", "bf16"}));
}

TEST(Cache, RefusesToKeepMoreThanThereIs) {
  const TinyModel tiny;
  const Model model = tiny.model();
  const std::vector<TokenId> tokens = random_tokens(10, tiny.shape.vocabulary, 7);
  Sequence sequence{model};
  const auto shrink_to = [&](std::vector<std::size_t> rows) {
    return message_of<Error>([&] {
      sequence.prefill(tokens, {.on_layer = [&](LayerView& view) { view.shrink(rows); }, .on_logits = {}});
    });
  };
  EXPECT_TRUE(says(shrink_to({10, 11}), {"11", "10", "layer 0"}));
  EXPECT_TRUE(says(shrink_to({3}), {"1 lengths", "2 KV heads"}));
  EXPECT_EQ(shrink_to({3, 4}), "(nothing was thrown)");
}

// ---- determinism
// ------------------------------------------------------------------------------------------------

TEST(Prefill, GivesTheSameBitsForAnyThreadCount) {
  const TinyModel tiny;
  const std::vector<TokenId> tokens = random_tokens(210, tiny.shape.vocabulary, 8);
  const Model one = tiny.model(1);
  Sequence sequence{one};
  const auto expected = run(sequence, tokens, 200);
  for (const int threads : {2, 3, 8}) {
    const Model several = tiny.model(threads);
    EXPECT_EQ(several.threads(), threads);
    Sequence other{several};
    EXPECT_EQ(run(other, tokens, 200), expected) << threads;
  }
}

TEST(Decode, GivesTheSameBitsInABatchAndAlone) {
  // Sizes that no register width divides: what is beside a number must not matter there either.
  const TinyModel tiny{{.embedding = 33, .feed_forward = 37, .head_dim = 10}};
  const Model model = tiny.model(2);
  for (const std::size_t batch : {2UL, 3UL, 7UL}) {
    std::vector<Sequence> alone;
    std::vector<Sequence> together;
    for (std::size_t b = 0; b < batch; ++b) {
      alone.emplace_back(model);
      alone.back().prefill(random_tokens(5 + 20 * b, tiny.shape.vocabulary, b));
      together.push_back(alone.back().clone());
    }
    for (std::size_t step = 0; step < 5; ++step) {
      std::vector<DecodeStep> steps;
      for (std::size_t b = 0; b < batch; ++b) {
        const auto token = static_cast<TokenId>((7 * step + b) % 41);
        const std::size_t position = alone[b].next_position();
        alone[b].decode(token, position);
        steps.push_back({.sequence = &together[b], .token = token, .position = position});
      }
      decode_batch(steps);
      for (std::size_t b = 0; b < batch; ++b) {
        ASSERT_EQ(copy(together[b].logits()), copy(alone[b].logits()))
            << "sequence " << b << ", step " << step;
      }
    }
  }
}

TEST(Sequence, ClonesGoTheirOwnWays) {
  const TinyModel tiny;
  const Model model = tiny.model();
  Sequence first{model};
  first.prefill(random_tokens(30, 41, 9));
  Sequence second = first.clone();
  const std::vector<float> after = copy(first.decode(3, 30));
  second.decode(4, 30);
  EXPECT_NE(copy(second.logits()), after);
  Sequence third{model};
  third.prefill(random_tokens(30, 41, 9));
  EXPECT_EQ(copy(third.decode(4, 30)), copy(second.logits()));
  EXPECT_EQ(second.cache_bytes(), first.cache_bytes());
}

// ---- what can be watched
// ----------------------------------------------------------------------------------------

TEST(Hooks, ShowTheSoftmaxRowsOfTheLastPromptTokenAndOfEachDecodedOne) {
  const TinyModel tiny;
  const TinyShape& s = tiny.shape;
  const Model model = tiny.model(2);
  const std::vector<TokenId> tokens = random_tokens(75, s.vocabulary, 10);
  const Reference reference{tiny, tokens, plain_frequencies(s)};
  Sequence sequence{model};
  std::size_t position = 69;
  int calls = 0;
  sequence.hooks().attention = [&](int l, int h, std::span<const float> row) {
    EXPECT_EQ(l * s.heads + h, calls++ % (s.layers * s.heads));
    const auto& expected =
        reference.softmax[static_cast<std::size_t>(l)][static_cast<std::size_t>(h)][position];
    EXPECT_TRUE(near(row, expected, 1e-5));
    EXPECT_NEAR(std::accumulate(row.begin(), row.end(), 0.0), 1.0, 1e-5);
  };
  sequence.prefill(std::span{tokens}.first(70));
  EXPECT_EQ(calls, s.layers * s.heads);
  for (position = 70; position < 75; ++position) sequence.decode(tokens[position], position);
  EXPECT_EQ(calls, 6 * s.layers * s.heads);
}

TEST(Hooks, CompareALayerWithItsShadow) {
  const TinyModel tiny;
  const TinyShape& s = tiny.shape;
  const Model model = tiny.model();
  const std::size_t prompt = 90;
  const std::vector<TokenId> tokens = random_tokens(prompt + 70, s.vocabulary, 11);
  const Reference full{tiny, tokens, plain_frequencies(s)};

  Sequence plain{model};
  const auto expected = run(plain, tokens, prompt);

  Sequence sequence{model};
  std::size_t position = prompt;
  int calls = 0;
  sequence.hooks().shadow = [&](int l, std::span<const float> whole, std::span<const float> part) {
    EXPECT_EQ(l, calls++ % s.layers);
    const auto layer = static_cast<std::size_t>(l);
    EXPECT_TRUE(near(whole, full.attention_blocks[layer][position], tolerance));
    // What the layer would have given from the kept rows, with the queries, keys and values that it really
    // had.
    std::vector<double> gathered(static_cast<std::size_t>(s.heads * s.head_dim), 0.0);
    const auto kept = some_rows(l, prompt);
    for (int h = 0; h < s.heads; ++h) {
      const auto kv_head = static_cast<std::size_t>(h / (s.heads / s.kv_heads));
      double sum = 0;
      for (std::size_t k = 0; k <= position; ++k) {
        if (k < prompt && std::ranges::find(kept[kv_head], k) == kept[kv_head].end()) continue;
        const double weight = full.softmax[layer][static_cast<std::size_t>(h)][position][k];
        sum += weight;
        for (int e = 0; e < s.head_dim; ++e) {
          gathered[static_cast<std::size_t>(h * s.head_dim + e)] +=
              weight * full.values[layer][k][kv_head * static_cast<std::size_t>(s.head_dim) +
                                             static_cast<std::size_t>(e)];
        }
      }
      for (int e = 0; e < s.head_dim; ++e) gathered[static_cast<std::size_t>(h * s.head_dim + e)] /= sum;
    }
    const std::vector<float>& projection =
        tiny.weights.at("blk." + std::to_string(l) + ".attn_output.weight");
    std::vector<double> block(static_cast<std::size_t>(s.embedding), 0.0);
    for (std::size_t o = 0; o < block.size(); ++o) {
      for (std::size_t i = 0; i < gathered.size(); ++i)
        block[o] += double{projection[o * gathered.size() + i]} * gathered[i];
    }
    EXPECT_TRUE(near(part, block, 10 * tolerance));
  };
  sequence.prefill(
      std::span{tokens}.first(prompt),
      {.on_layer = [&](LayerView& view) { keep_rows(view.shadow(), some_rows(view.layer, prompt)); },
       .on_logits = {}});
  for (; position < tokens.size(); ++position) {
    // The shadow changes nothing: the hidden state that goes on is that of the full cache.
    ASSERT_EQ(copy(sequence.decode(tokens[position], position)), expected[position]);
  }
  EXPECT_EQ(calls, 70 * s.layers);
  EXPECT_EQ(sequence.rows(0, 0), tokens.size());
}

TEST(Hooks, AShadowOfEverythingIsTheSameBitForBit) {
  const TinyModel tiny;
  const Model model = tiny.model();
  Sequence sequence{model};
  int calls = 0;
  sequence.hooks().shadow = [&](int l, std::span<const float> whole, std::span<const float> part) {
    EXPECT_EQ(l, 1);
    EXPECT_EQ(copy(whole), copy(part));
    ++calls;
  };
  sequence.prefill(random_tokens(20, 41, 12), {.on_layer =
                                                   [](LayerView& view) {
                                                     if (view.layer == 1) view.shadow();
                                                   },
                                               .on_logits = {}});
  sequence.decode(1, 20);
  Sequence copied = sequence.clone();
  copied.hooks() = sequence.hooks();
  copied.decode(2, 21);
  EXPECT_EQ(calls, 2);
}

// ---- errors
// -----------------------------------------------------------------------------------------------------

struct WrongModel {
  std::string_view name;
  std::function<void(TinyModel&)> change;
  std::vector<std::string_view> message;
};

GgufWriter::TensorEntry& entry(TinyModel& tiny, std::string_view name) {
  const auto found = std::ranges::find(tiny.writer.tensors, name, &GgufWriter::TensorEntry::name);
  if (found == tiny.writer.tensors.end()) throw std::logic_error("no such tensor in the test's model");
  return *found;
}

void without(TinyModel& tiny, std::string_view key) {
  std::erase_if(tiny.writer.metadata, [&](const auto& known) { return known.first == key; });
}

const WrongModel wrong_models[] = {
    {"architecture",
     [](TinyModel& m) { m.writer.set("general.architecture", std::string{"gpt2"}); },
     {"\"gpt2\"", "llama"}},
    {"no_architecture",
     [](TinyModel& m) { without(m, "general.architecture"); },
     {"general.architecture", "missing"}},
    {"experts",
     [](TinyModel& m) { m.writer.set("llama.expert_count", std::uint32_t{8}); },
     {"llama.expert_count", "8"}},
    {"first_of_a_split_model",
     [](TinyModel& m) { m.writer.set("split.no", std::uint16_t{0}).set("split.count", std::uint16_t{2}); },
     {"tiny.gguf", "part 1", "2 files", "llama-gguf-split --merge"}},
    {"later_part_of_a_split_model",
     [](TinyModel& m) {
       without(m, "general.architecture");
       m.writer.set("split.no", std::uint16_t{2}).set("split.count", std::uint16_t{3});
     },
     {"part 3", "3 files"}},
    {"tensors_of_a_split_model",
     [](TinyModel& m) { m.writer.set("split.tensors.count", std::int32_t{33}); },
     {"split.tensors.count", "33", "21"}},
    {"adapter",
     [](TinyModel& m) { m.writer.set("general.type", std::string{"adapter"}); },
     {"general.type is \"adapter\""}},
    {"fewer_tokens_than_rows",
     [](TinyModel& m) { m.writer.set_array("tokenizer.ggml.tokens", std::vector<std::string>(40, "x")); },
     {"tiny.gguf", "41 rows", "tokenizer.ggml.tokens) are 40"}},
    {"more_tokens_than_rows",
     [](TinyModel& m) { m.writer.set_array("tokenizer.ggml.tokens", std::vector<std::string>(42, "x")); },
     {"41 rows", "42"}},
    {"vocab_size",
     [](TinyModel& m) { m.writer.set("llama.vocab_size", std::uint32_t{64}); },
     {"41 rows", "llama.vocab_size is 64"}},
    {"sliding_window",
     [](TinyModel& m) { m.writer.set("llama.attention.sliding_window", std::uint32_t{128}); },
     {"llama.attention.sliding_window", "128"}},
    {"soft_cap",
     [](TinyModel& m) { m.writer.set("llama.attn_logit_softcapping", 50.0F); },
     {"llama.attn_logit_softcapping", "50"}},
    {"clamp",
     [](TinyModel& m) { m.writer.set("llama.attention.clamp_kqv", 8.0F); },
     {"llama.attention.clamp_kqv", "8"}},
    {"not_causal",
     [](TinyModel& m) { m.writer.set("llama.attention.causal", false); },
     {"llama.attention.causal", "false"}},
    {"scale",
     [](TinyModel& m) { m.writer.set("llama.attention.scale", 0.125F); },
     {"llama.attention.scale", "0.125"}},
    {"sections",
     [](TinyModel& m) {
       m.writer.set_array("llama.rope.dimension_sections", std::vector<std::int32_t>{2, 2, 0, 0});
     },
     {"llama.rope.dimension_sections", "[2, 2, 0, 0]"}},
    {"a_key_that_nobody_knows",
     [](TinyModel& m) { m.writer.set("llama.attention.frobnication", std::uint32_t{3}); },
     {"llama.attention.frobnication", "3", "not supported"}},
    {"kv_heads_that_differ_by_layer",
     [](TinyModel& m) {
       m.writer.set_array("llama.attention.head_count_kv", std::vector<std::uint32_t>{2, 1});
     },
     {"llama.attention.head_count_kv", "[2, 1]"}},
    {"quantisation",
     [](TinyModel& m) { m.writer.set("general.quantization_version", std::uint32_t{1}); },
     {"general.quantization_version is 1"}},
    {"yarn_blend",
     [](TinyModel& m) {
       m.writer.set("llama.rope.scaling.type", std::string{"yarn"})
           .set("llama.rope.scaling.original_context_length", std::uint32_t{256})
           .set("llama.rope.scaling.yarn_ext_factor", 2.0F);
     },
     {"yarn_ext_factor is 2"}},
    {"yarn_blend_without_yarn",
     [](TinyModel& m) { m.writer.set("llama.rope.scaling.yarn_ext_factor", 1.0F); },
     {"yarn_ext_factor is 1", "\"none\""}},
    {"yarn_beta",
     [](TinyModel& m) { m.writer.set("llama.rope.scaling.yarn_beta_fast", 0.0F); },
     {"yarn_beta_fast", "0"}},
    {"yarn_log",
     [](TinyModel& m) { m.writer.set("llama.rope.scaling.yarn_log_multiplier", 0.1F); },
     {"yarn_log_multiplier", "0.1"}},
    {"magnitude",
     [](TinyModel& m) { m.writer.set("llama.rope.scaling.attn_factor", -1.0F); },
     {"attn_factor", "-1"}},
    {"no_layers",
     [](TinyModel& m) { m.writer.set("llama.block_count", std::uint32_t{0}); },
     {"\"llama.block_count\" is 0"}},
    {"too_many_layers",
     [](TinyModel& m) { m.writer.set("llama.block_count", ~std::uint32_t{0}); },
     {"llama.block_count"}},
    {"layers_missing",
     [](TinyModel& m) { m.writer.set("llama.block_count", std::uint32_t{3}); },
     {"blk.2.attn_norm.weight", "missing"}},
    {"layers_left_over",
     [](TinyModel& m) { m.writer.set("llama.block_count", std::uint32_t{1}); },
     {"blk.1.", "no place"}},
    {"heads_not_divisible",
     [](TinyModel& m) { m.writer.set("llama.attention.head_count_kv", std::uint32_t{4}); },
     {"6 query heads", "4 KV heads"}},
    {"head_dim_unknown",
     [](TinyModel& m) { without(m, "llama.attention.key_length"); },
     {"key_length", "20", "6 heads"}},
    {"value_length",
     [](TinyModel& m) { m.writer.set("llama.attention.value_length", std::uint32_t{4}); },
     {"8 dimensions", "4"}},
    {"no_context",
     [](TinyModel& m) { without(m, "llama.context_length"); },
     {"llama.context_length", "missing"}},
    {"epsilon",
     [](TinyModel& m) { m.writer.set("llama.attention.layer_norm_rms_epsilon", std::nanf("")); },
     {"rms_epsilon"}},
    {"rope_odd",
     [](TinyModel& m) { m.writer.set("llama.rope.dimension_count", std::uint32_t{7}); },
     {"dimension_count is 7"}},
    {"rope_wide",
     [](TinyModel& m) { m.writer.set("llama.rope.dimension_count", std::uint32_t{10}); },
     {"dimension_count is 10", "8"}},
    {"rope_base", [](TinyModel& m) { m.writer.set("llama.rope.freq_base", -1.0F); }, {"freq_base", "-1"}},
    {"rope_type",
     [](TinyModel& m) { m.writer.set("llama.rope.scaling.type", std::string{"longrope"}); },
     {"\"longrope\"", "linear"}},
    {"yarn_without_context",
     [](TinyModel& m) { m.writer.set("llama.rope.scaling.type", std::string{"yarn"}); },
     {"original_context_length"}},
    {"rope_factors_zero",
     [](TinyModel& m) { m.writer.tensor("rope_freqs.weight", {4}, std::vector<float>(4)); },
     {"rope_freqs.weight", "pair 0"}},
    {"no_embedding",
     [](TinyModel& m) { entry(m, "token_embd.weight").name = "other"; },
     {"token_embd.weight", "missing"}},
    {"no_query",
     [](TinyModel& m) { entry(m, "blk.1.attn_q.weight").name = "blk.1.attn_z.weight"; },
     {"blk.1.attn_q.weight", "[20, 48]", "missing"}},
    {"query_shape",
     [](TinyModel& m) {
       entry(m, "blk.0.attn_q.weight").shape = {48, 20};
     },
     {"blk.0.attn_q.weight", "[48, 20]", "[20, 48]"}},
    {"norm_shape",
     [](TinyModel& m) {
       entry(m, "output_norm.weight").shape = {4, 5};
     },
     {"output_norm.weight", "[4, 5]", "[20]"}},
    {"output_shape",
     [](TinyModel& m) {
       entry(m, "output.weight").shape = {20, 40};
     },
     {"output.weight", "[20, 40]", "[20, 41]"}},
    {"bias",
     [](TinyModel& m) { m.writer.tensor("blk.0.attn_q.bias", {48}, std::vector<float>(48)); },
     {"blk.0.attn_q.bias", "no place"}},
};

class ModelErrors : public testing::TestWithParam<WrongModel> {};

TEST_P(ModelErrors, NameWhatIsWrong) {
  TinyModel tiny;
  ASSERT_NO_THROW(tiny.model());
  GetParam().change(tiny);
  const std::string message = message_of<Error>([&] { tiny.model(); });
  for (const std::string_view part : GetParam().message) EXPECT_TRUE(says(message, {part}));
}

INSTANTIATE_TEST_SUITE_P(Files, ModelErrors, testing::ValuesIn(wrong_models),
                         [](const auto& tested) { return std::string{tested.param.name}; });

TEST(Model, TakesKeysThatSayWhatEveryModelHas) {
  TinyModel tiny;
  tiny.writer.set("split.count", std::uint16_t{1})
      .set("general.type", std::string{"model"})
      .set("general.quantization_version", std::uint32_t{2})
      .set("llama.vocab_size", std::uint32_t{41})
      .set("llama.expert_count", std::uint32_t{0})
      .set("llama.attention.sliding_window", std::uint32_t{0})
      .set("llama.attention.causal", true)
      .set("llama.attn_logit_softcapping", 0.0F)
      .set("llama.rope.scaling.finetuned", true)
      .set("llama.tensor_data_layout", std::string{"Meta AI original pth"});
  const std::vector<TokenId> tokens = random_tokens(9, tiny.shape.vocabulary, 1);
  const Model plain = TinyModel{}.model();
  const Model with_keys = tiny.model();
  Sequence expected{plain};
  Sequence found{with_keys};
  expected.prefill(tokens, {});
  found.prefill(tokens, {});
  EXPECT_TRUE(std::ranges::equal(found.logits(), expected.logits()));
}

TEST(Model, ReadsItsShape) {
  const ModelConfig config = read_config(TinyModel{}.file());
  EXPECT_EQ(config.layers, 2);
  EXPECT_EQ(config.context, 400U);
  EXPECT_EQ(config.head_dim, 8);
  EXPECT_EQ(config.group(), 3);
  EXPECT_EQ(config.vocabulary, 41);
  EXPECT_FALSE(config.tied_output);
  EXPECT_EQ(config.kv_elements_per_token(), 2U * 2U * 2U * 8U);
  EXPECT_TRUE(read_config(TinyModel{{.tied = true}}.file()).tied_output);
}

TEST(Model, RefusesThreadCountsOutOfRange) {
  EXPECT_TRUE(says(message_of<Error>([] { TinyModel{}.model(-1); }), {"-1", "1024"}));
  EXPECT_TRUE(says(message_of<Error>([] { TinyModel{}.model(5000); }), {"5000", "1024"}));
}

TEST(Prefill, RefusesWhatDoesNotFit) {
  const TinyModel tiny;
  const Model model = tiny.model();
  Sequence sequence{model};
  EXPECT_TRUE(says(message_of<Error>([&] { sequence.prefill({}); }), {"no tokens"}));
  EXPECT_TRUE(says(message_of<Error>([&] { sequence.prefill(random_tokens(401, 41, 1)); }), {"401", "400"}));
  EXPECT_TRUE(says(message_of<Error>([&] {
                     sequence.prefill(std::vector<TokenId>{0, 41});
                   }),
                   {"41", "0 to 40"}));
  EXPECT_TRUE(says(message_of<Error>([&] { sequence.prefill(std::vector<TokenId>{-1}); }), {"-1"}));
  EXPECT_NO_THROW(sequence.prefill(random_tokens(400, 41, 1)));
  EXPECT_TRUE(says(message_of<Error>([&] { sequence.prefill(random_tokens(4, 41, 1)); }), {"404", "400"}));
  EXPECT_TRUE(says(message_of<Error>([&] { sequence.decode(1, 400); }), {"400", "context"}));
}

TEST(Decode, RefusesWhatItCannotDo) {
  const TinyModel tiny;
  const Model model = tiny.model();
  const Model other = tiny.model();
  Sequence sequence{model};
  EXPECT_TRUE(says(message_of<Error>([&] { sequence.decode(1, 0); }), {"no prompt"}));
  sequence.prefill(random_tokens(4, 41, 1));
  Sequence elsewhere{other};
  elsewhere.prefill(random_tokens(4, 41, 1));
  const std::vector<float> before = copy(sequence.logits());
  const auto batch = [](std::vector<DecodeStep> steps) {
    return message_of<Error>([&] { decode_batch(steps); });
  };
  EXPECT_TRUE(says(batch({}), {"at least one"}));
  EXPECT_TRUE(says(batch({{.sequence = nullptr, .token = 1, .position = 4}}), {"no sequence"}));
  EXPECT_TRUE(says(batch({{&sequence, 1, 4}, {&sequence, 2, 5}}), {"0 and 1", "same sequence"}));
  EXPECT_TRUE(says(batch({{&sequence, 1, 4}, {&elsewhere, 2, 4}}), {"another model"}));
  EXPECT_TRUE(says(batch({{&sequence, 41, 4}}), {"41", "0 to 40"}));
  EXPECT_EQ(copy(sequence.logits()), before);
  EXPECT_EQ(sequence.rows(0, 0), 4U);
}

TEST(Prefill, LeavesAnEmptySequenceWhereACallbackThrows) {
  const TinyModel tiny;
  const Model model = tiny.model();
  const std::vector<TokenId> tokens = random_tokens(30, 41, 13);
  Sequence sequence{model};
  EXPECT_THROW(sequence.prefill(tokens, {.on_layer =
                                             [](LayerView& view) {
                                               view.shrink(3);
                                               if (view.layer == 1) throw std::runtime_error("stop");
                                             },
                                         .on_logits = {}}),
               std::runtime_error);
  EXPECT_EQ(sequence.next_position(), 0U);
  EXPECT_EQ(sequence.cache_bytes(), 0U);
  Sequence fresh{model};
  EXPECT_EQ(copy(sequence.prefill(tokens)), copy(fresh.prefill(tokens)));
}

// ---- a real model
// -----------------------------------------------------------------------------------------------

// Recorded by tools/compare_logits.py from transformers in float32 on the same file.
TEST(RealModel, AgreesWithTransformers) {
  const char* path = std::getenv("COMPRESSKV_TEST_MODEL");
  if (path == nullptr)
    GTEST_SKIP() << "set COMPRESSKV_TEST_MODEL to SmolLM2-135M-Instruct.Q4_1.gguf (scripts/model.sh)";
  std::ifstream file{COMPRESSKV_TEST_DATA_DIR "/logits_smollm2.json"};
  ASSERT_TRUE(file) << "the recorded logits are missing";
  const nlohmann::json recorded = nlohmann::json::parse(file);
  const auto tokens = recorded.at("tokens").get<std::vector<TokenId>>();
  const std::size_t prompt = recorded.at("prompt").get<std::size_t>();

  const Model model{GgufFile::open(path)};
  Sequence sequence{model};
  const auto logits = run(sequence, tokens, prompt);
  std::size_t compared = 0;
  for (const auto& row : recorded.at("positions")) {
    const auto position = row.at("position").get<std::size_t>();
    const std::vector<float>& found = logits[position];
    const auto ids = row.at("ids").get<std::vector<std::size_t>>();  // the largest logits first
    const auto values = row.at("logits").get<std::vector<double>>();
    EXPECT_EQ(static_cast<std::size_t>(std::ranges::max_element(found) - found.begin()), ids[0]) << position;
    for (std::size_t i = 0; i < ids.size(); ++i, ++compared) {
      EXPECT_NEAR(found[ids[i]], values[i], 1e-2) << "position " << position << ", token " << ids[i];
    }
  }
  EXPECT_GT(compared, 200U);
}

}  // namespace
}  // namespace engine
