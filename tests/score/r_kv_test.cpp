// R-KV against its formula with the whole matrix of cosines, in double.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <compresskv/compresskv.hpp>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "reference/errors.hpp"
#include "reference/executors.hpp"
#include "reference/forced_path.hpp"
#include "reference/redundancy.hpp"

namespace compresskv {
namespace {

using reference::expect_error;
using reference::Layer;
using reference::LayerCase;

/// Two of three keys become like an earlier one, of any length.
void repeat_keys(Layer<float>& layer, std::uint64_t seed) {
  reference::Random random(seed);
  for (std::size_t head = 0; head < layer.sizes.kv_heads; ++head) {
    for (std::size_t row = 1; row < layer.sizes.rows; ++row) {
      if (random.below(3) == 0) {
        continue;
      }
      const std::size_t like = random.below(row);
      const float length = 0.25F + std::abs(random.gaussian());
      for (std::size_t dim = 0; dim < layer.shape.head_dim; ++dim) {
        const float key = layer.cache.keys[layer.cache.at(head, like, dim)] + 0.7F * random.gaussian();
        layer.cache.keys[layer.cache.at(head, row, dim)] = length * key;
      }
    }
  }
}

template <class X = SerialExecutor>
std::vector<float> scores_of(const Layer<float>& layer, const score::RKvOptions& options, X executor = {},
                             std::size_t layers = 1) {
  ModelShape shape = layer.shape;
  shape.layers = layers;
  const Plan plan{shape, score::RKv{options}, select::GroupedTopK{},
                  budget::Uniform{Budget::tokens_per_layer(std::max<std::size_t>(options.window, 1))}};
  auto cache = layer.cache;
  Compressor compressor{plan, executor};
  compressor.begin(layer.sizes.rows);
  const auto values = compressor.score(0, cache.view(), layer.observation()).values();
  return {values.begin(), values.end()};
}

/// A KV head whose keys are these, with queries that look at nothing.
Layer<float> layer_of(const std::vector<std::vector<float>>& keys, std::size_t window) {
  Layer<float> layer(
      {.head_dim = keys.front().size(), .rows = keys.size(), .window = window, .capacity = window});
  for (std::size_t row = 0; row < keys.size(); ++row) {
    for (std::size_t dim = 0; dim < keys[row].size(); ++dim) {
      layer.cache.keys[layer.cache.at(0, row, dim)] = keys[row][dim];
    }
  }
  std::fill(layer.queries.begin(), layer.queries.end(), 0.0F);
  return layer;
}

/// Redundancy from the scores of `lambda` 0.
std::vector<double> redundancy_of(const Layer<float>& layer, float threshold) {
  std::vector<double> found;
  for (const float score :
       scores_of(layer, {.lambda = 0.0F, .threshold = threshold, .window = layer.sizes.window})) {
    found.push_back(-static_cast<double>(score));
  }
  return found;
}

TEST(RKv, IsTheReferenceOverGeneratedLayers) {
  std::size_t case_number = 0;
  for (const LayerCase& c : reference::layer_cases(45, 241)) {
    SCOPED_TRACE(c);
    Layer<float> layer(c);
    if (case_number % 2 == 0) {
      repeat_keys(layer, c.seed);
    }
    score::RKvOptions options{
        .threshold = std::vector{0.5F, 0.0F, 0.9F}[case_number % 3],
        .window = c.window,
        .pool = c.pool,
        .pool_width = c.pool_width,
    };
    const double relative = reference::score_tolerance(c.head_dim, c.rows, c.observed(), c.pool_width,
                                                       c.group, reference::largest_logit_mass(layer));
    options.lambda = 1.0F;
    const reference::ScoreRows attention = reference::r_kv(layer, options);
    reference::expect_scores(score::RKv{options}, layer, attention, relative,
                             reference::score_underflow(c.observed()));
    // Sums of cosines are in double: what is left is the softmax in float32.
    options.lambda = 0.0F;
    const reference::ScoreRows redundancy = reference::r_kv(layer, options);
    reference::expect_scores(score::RKv{options}, layer, redundancy, 2e-6, 0.0);
    options.lambda = 0.07F;
    reference::ScoreRows both = redundancy;
    for (std::size_t row = 0; row < both.size(); ++row) {
      for (std::size_t t = 0; t < both[row].size(); ++t) {
        both[row][t] = 0.07 * attention[row][t] + 0.93 * redundancy[row][t];
      }
    }
    reference::expect_scores(score::RKv{options}, layer, both, 3e-6,
                             0.08 * relative + 3e-6 / static_cast<double>(c.rows));
    ++case_number;
  }
}

TEST(RKv, HasTheAuthorsOptions) {
  const score::RKvOptions options;
  EXPECT_EQ(options.lambda, 0.07F);
  EXPECT_EQ(options.threshold, 0.5F);
  EXPECT_EQ(options.window, 8U);
  EXPECT_EQ(options.pool, kernel::Pool::max);
  EXPECT_EQ(options.pool_width, 7U);
}

TEST(RKv, OfKeysThatAreAlikeTheLatestStays) {
  // Five keys alike, one alone, and that of the window.
  const std::vector<float> a{1.0F, 0.0F, 0.0F, 0.0F};
  const Layer<float> layer =
      layer_of({a, a, a, a, a, {0.0F, 3.0F, 0.0F, 0.0F}, {0.0F, 0.0F, -2.0F, 0.0F}}, 1);
  // Rows 0 to 3 forgive row 4, which forgives row 3.
  const std::vector<double> means{4.0 / 7, 4.0 / 7, 4.0 / 7, 3.0 / 7, 0.0, 0.0, 0.0};
  const std::vector<double> expected = reference::softmax(means);
  const std::vector<double> found = redundancy_of(layer, 0.5F);
  ASSERT_EQ(found.size(), 6U);
  for (std::size_t t = 0; t < found.size(); ++t) {
    EXPECT_NEAR(found[t], expected[t], 1e-7) << t;
  }
  // With room for three beside the window: the latest, the one alone, and the one before the latest.
  const Plan plan{layer.shape, score::RKv{{.lambda = 0.0F, .window = 1}}, select::GroupedTopK{},
                  budget::Uniform{Budget::tokens_per_layer(4)}};
  auto cache = layer.cache;
  Compressor compressor{plan};
  compressor.begin(7);
  const auto kept = compressor.compress(0, cache.view(), layer.observation()).positions(0);
  EXPECT_EQ(std::vector<std::uint32_t>(kept.begin(), kept.end()), (std::vector<std::uint32_t>{3, 4, 5, 6}));
}

TEST(RKv, OfEqualScoresTheEarlierStays) {
  const std::vector<float> a{1.0F, 2.0F};
  const Layer<float> layer = layer_of(std::vector<std::vector<float>>(20, a), 1);
  const Plan plan{layer.shape, score::RKv{{.window = 1}}, select::GroupedTopK{},
                  budget::Uniform{Budget::tokens_per_layer(5)}};
  auto cache = layer.cache;
  Compressor compressor{plan};
  compressor.begin(20);
  // The window is the latest of all, and forgives row 18.
  const auto kept = compressor.compress(0, cache.view(), layer.observation()).positions(0);
  EXPECT_EQ(std::vector<std::uint32_t>(kept.begin(), kept.end()),
            (std::vector<std::uint32_t>{0, 1, 2, 18, 19}));
}

TEST(RKv, ACosineThatIsTheThresholdIsNotAboveIt) {
  const Layer<float> layer =
      layer_of({{2.0F, 0.0F, 0.0F, 0.0F}, {0.5F, 0.5F, 0.5F, 0.5F}, {0.0F, 0.0F, 0.0F, 0.0F}}, 1);
  const auto equal = redundancy_of(layer, 0.5F);
  const auto expected = reference::softmax({0.5 / 3, 0.5 / 3, 0.0});
  EXPECT_NEAR(equal[0], expected[0], 1e-7);
  EXPECT_NEAR(equal[1], expected[1], 1e-7);
  const auto below = redundancy_of(layer, std::nextafter(0.5F, 0.0F));
  EXPECT_NEAR(below[0], 1.0 / 3, 1e-7);
  EXPECT_NEAR(below[1], 1.0 / 3, 1e-7);
}

/// Pairs of keys whose cosine is nearer to the threshold than float32 tells.
TEST(RKv, DecidesInDouble) {
  Layer<float> layer({.head_dim = 64, .rows = 300, .window = 1, .capacity = 10});
  const auto key = [&](std::size_t row, std::size_t dim) -> float& {
    return layer.cache.keys[layer.cache.at(0, row, dim)];
  };
  for (std::size_t row = 0; row + 1 < 300; row += 2) {
    // What is left of the second key without the first one's direction, as long as makes the cosine 0.5.
    double dot = 0.0;
    double length = 0.0;
    for (std::size_t dim = 0; dim < 64; ++dim) {
      dot += static_cast<double>(key(row, dim)) * static_cast<double>(key(row + 1, dim));
      length += static_cast<double>(key(row, dim)) * static_cast<double>(key(row, dim));
    }
    std::vector<double> rest(64);
    double rest_length = 0.0;
    for (std::size_t dim = 0; dim < 64; ++dim) {
      rest[dim] = static_cast<double>(key(row + 1, dim)) - dot / length * static_cast<double>(key(row, dim));
      rest_length += rest[dim] * rest[dim];
    }
    for (std::size_t dim = 0; dim < 64; ++dim) {
      key(row + 1, dim) = static_cast<float>(static_cast<double>(key(row, dim)) +
                                             std::sqrt(3.0 * length / rest_length) * rest[dim]);
    }
  }
  const auto cosines = reference::key_cosines(layer, 0);
  std::size_t above = 0;
  for (std::size_t row = 0; row + 1 < 300; row += 2) {
    EXPECT_NEAR(cosines[row][row + 1], 0.5, 1e-7);
    above += cosines[row][row + 1] > 0.5 ? 1U : 0U;
  }
  EXPECT_GT(above, 20U);
  EXPECT_LT(above, 130U);
  const score::RKvOptions options{.lambda = 0.0F, .window = 1};
  reference::expect_scores(score::RKv{options}, layer, reference::r_kv(layer, options), 1e-6, 0.0);
}

TEST(RKv, AKeyOfNoLengthIsLikeNone) {
  Layer<float> layer({.head_dim = 8, .rows = 150, .window = 3, .capacity = 10});
  for (const std::size_t row : {0U, 70U, 149U}) {
    for (std::size_t dim = 0; dim < 8; ++dim) {
      layer.cache.keys[layer.cache.at(0, row, dim)] = 0.0F;
    }
  }
  for (const float threshold : {0.0F, 0.5F}) {
    const score::RKvOptions options{.lambda = 0.0F, .threshold = threshold, .window = 3};
    reference::expect_scores(score::RKv{options}, layer, reference::r_kv(layer, options), 2e-6, 0.0);
  }
}

/// Directions alone count, whether or not float32 has room for products of keys.
TEST(RKv, KeysOfAnyLengthHaveTheirDirection) {
  reference::Random random(78);
  Layer<float> layer({.head_dim = 8, .rows = 140, .window = 3, .capacity = 10});
  for (std::size_t row = 0; row < 140; ++row) {
    for (std::size_t dim = 0; dim < 8; ++dim) {
      layer.cache.keys[layer.cache.at(0, row, dim)] = static_cast<float>(random.below(101)) - 50.0F;
    }
  }
  std::fill(layer.queries.begin(), layer.queries.end(), 0.0F);
  const auto expected = redundancy_of(layer, 0.5F);
  const detail::PlainFloats plain;  // with -Ofast the program takes the smallest for zero
  for (const float factor : {0x1p-149F, 0x1p-126F, 0x1p-40F, 0x1p90F, 0x1p121F}) {
    Layer<float> other = layer;
    for (std::size_t row = 0; row < 140; ++row) {
      for (std::size_t dim = 0; dim < 8; ++dim) {
        other.cache.keys[layer.cache.at(0, row, dim)] *= factor;
      }
    }
    EXPECT_EQ(redundancy_of(other, 0.5F), expected) << factor;
  }
}

TEST(RKv, LooksAsTheModelDoes) {
  const LayerCase c{.group = 3, .kv_heads = 2, .head_dim = 16, .rows = 1100, .window = 8, .capacity = 40};
  Layer<float> layer(c);
  const std::vector<float> sinks(6, 2.0F);
  const auto attention = [&](const QueryShape& extra) {
    QueryShape shown = extra;
    shown.query_heads = 6;
    shown.queries = 8;
    shown.head_dim = 16;
    const Plan plan{layer.shape, score::RKv{{.lambda = 1.0F}}, select::GroupedTopK{},
                    budget::Uniform{Budget::tokens_per_layer(40)}};
    Compressor compressor{plan};
    compressor.begin(c.rows);
    const auto values =
        compressor.score(0, layer.cache.view(), QueryWindow<float>(layer.queries.data(), shown)).values();
    return std::vector<float>(values.begin(), values.end());
  };
  const auto expect = [&](const std::vector<float>& found, double soft_cap, std::size_t sliding) {
    const auto expected = reference::r_kv(layer, {.lambda = 1.0F}, soft_cap, sliding);
    for (std::size_t head = 0; head < 2; ++head) {
      for (std::size_t t = 0; t < expected[head].size(); ++t) {
        ASSERT_NEAR(static_cast<double>(found[head * expected[head].size() + t]), expected[head][t],
                    2e-5 * expected[head][t] + 1e-12)
            << "KV head " << head << " token " << t << " cap " << soft_cap << " sliding " << sliding;
      }
    }
  };
  constexpr std::size_t all = std::numeric_limits<std::size_t>::max();
  const auto plain = attention({});
  expect(plain, 0.0, all);
  EXPECT_EQ(attention({.sinks = sinks}), plain) << "sinks are no rows";
  expect(attention({.soft_cap = 2.0F}), 2.0, all);
  for (const std::size_t sliding : {30U, 900U}) {
    expect(attention({.sliding_window = sliding}), 0.0, sliding);
  }
  // The first five queries see some of the evictable rows, the others none.
  expect(attention({.sliding_window = 6}), 0.0, 6);
  // Nothing evictable is seen by any.
  EXPECT_EQ(attention({.sliding_window = 1}), std::vector<float>(plain.size(), 0.0F));
}

TEST(RKv, ThreadsLayoutsMemoryAndProcessorsChangeNoBit) {
  LayerCase c{.group = 2, .kv_heads = 2, .head_dim = 20, .rows = 1500, .window = 8, .capacity = 40};
  const auto layer_in = [&](reference::Arrangement arrangement) {
    c.arrangement = arrangement;
    Layer<float> layer(c);
    repeat_keys(layer, 5);
    return layer;
  };
  const Layer<float> layer = layer_in(reference::Arrangement::head_token_dim);
  const std::vector<float> expected = scores_of(layer, {});
  EXPECT_EQ(scores_of(layer, {}, reference::ReverseExecutor{}), expected);
  EXPECT_EQ(scores_of(layer, {}, reference::ShuffledExecutor{}), expected);
  EXPECT_EQ(scores_of(layer, {}, reference::ThreadExecutor{}), expected);
  for (const std::size_t layers : {2U, 5U, 12U, 2000U}) {
    EXPECT_EQ(scores_of(layer, {}, SerialExecutor{}, layers), expected) << layers << " layers";
  }
  for (const reference::Arrangement arrangement : reference::all_arrangements) {
    EXPECT_EQ(scores_of(layer_in(arrangement), {}), expected) << static_cast<int>(arrangement);
  }
  reference::on_all_paths([&] { EXPECT_EQ(scores_of(layer, {}), expected); });
}

TEST(RKv, NamesWhatIsNotFinite) {
  for (const float poison :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    const LayerCase c{.group = 2, .kv_heads = 2, .head_dim = 4, .rows = 20, .window = 2, .capacity = 4};
    const auto expect = [&](std::vector<std::string_view> parts, const auto& spoil) {
      Layer<float> layer(c);
      spoil(layer);
      const auto before = layer.cache.keys;
      const Plan plan{layer.shape, score::RKv{{.window = 2}}, select::GroupedTopK{},
                      budget::Uniform{Budget::tokens_per_layer(4)}};
      Compressor compressor{plan};
      compressor.begin(20);
      for (const std::string_view part : parts) {
        expect_error<ScoreError>([&] { compressor.compress(0, layer.cache.view(), layer.observation()); },
                                 {part});
      }
      EXPECT_TRUE(reference::same_bytes(layer.cache.keys, before));
    };
    expect({"query head 2 token 7 is not finite", "the keys or queries hold NaN or infinite"},
           [&](auto& layer) { layer.cache.keys[layer.cache.at(1, 7, 2)] = poison; });
    expect({"KV head 1 token 19 is not finite", "the keys hold NaN or infinite"},  // of the window
           [&](auto& layer) { layer.cache.keys[layer.cache.at(1, 19, 2)] = poison; });
    // The second head of a group, whose logits another head's might outdo.
    expect({"query head 3 token 0 is not finite", "the queries hold NaN or infinite"},
           [&](auto& layer) { layer.queries[(3 * 2 + 1) * 4 + 1] = poison; });
  }
  Layer<float> layer({.group = 2, .kv_heads = 1, .head_dim = 4, .rows = 20, .window = 2, .capacity = 4});
  for (std::size_t e = 0; e < 4; ++e) {
    layer.cache.keys[layer.cache.at(0, 6, e)] = 1e30F;
    layer.queries[(1 * 2 + 1) * 4 + e] = 1e30F;
  }
  const Plan plan{layer.shape, score::RKv{{.window = 2}}, select::GroupedTopK{},
                  budget::Uniform{Budget::tokens_per_layer(4)}};
  Compressor compressor{plan};
  compressor.begin(20);
  expect_error<ScoreError>([&] { compressor.compress(0, layer.cache.view(), layer.observation()); },
                           {"query head 1 token 6 is not finite", "beyond float32"});
}

TEST(RKv, RejectsOptionsByName) {
  expect_error<ArgumentError>([] { score::RKv{{.window = 0}}; },
                              {"window is 0: at least the last query must observe"});
  expect_error<ArgumentError>([] { score::RKv{{.pool_width = 2}}; }, {"pooling width is 2"});
  for (const float bad : {-0.1F, 1.1F, std::numeric_limits<float>::quiet_NaN()}) {
    expect_error<ArgumentError>([&] { score::RKv{{.lambda = bad}}; }, {"lambda is ", "from 0 "});
  }
  for (const float bad : {-0.1F, 1.0F, std::numeric_limits<float>::infinity()}) {
    expect_error<ArgumentError>([&] { score::RKv{{.threshold = bad}}; }, {"threshold is ", "a cosine"});
  }
}

}  // namespace
}  // namespace compresskv
