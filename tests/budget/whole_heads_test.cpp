// Budgets by KV head: the best keep all. What each may keep is held against one row at a time, what it keeps
// against its order written down.

#include <gtest/gtest.h>

#include <algorithm>
#include <compresskv/compresskv.hpp>
#include <compresskv/methods.hpp>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <sstream>
#include <string>
#include <vector>

#include "reference/budgets.hpp"
#include "reference/cache.hpp"
#include "reference/errors.hpp"
#include "reference/layer_case.hpp"
#include "reference/random.hpp"

namespace compresskv {
namespace {

using budget::WholeHeads;
using reference::expect_error;
using reference::Random;
using score::DuoAttention;
using HeadRows = std::vector<std::uint32_t>;
using DuoPlan = Plan<DuoAttention, select::GroupedTopK, WholeHeads>;

HeadScores scores_of(const std::vector<double>& means, std::size_t heads) {
  std::vector<std::vector<double>> runs;
  for (const double mean : means) {
    runs.push_back({mean - 0.25, mean + 0.25});  // the mean of two runs
  }
  return {means.size() / heads, heads, std::move(runs)};
}

/// Numbers with many that are equal.
std::vector<double> drawn_numbers(Random& random, std::size_t count) {
  std::vector<double> numbers(count);
  for (double& number : numbers) {
    number = 0.5 * static_cast<double>(random.below(8));
  }
  return numbers;
}

std::vector<std::size_t> allocated(const WholeHeads& budget, const budget::Allowance& allowance,
                                   std::size_t heads) {
  std::vector<std::size_t> capacities(heads);
  budget.allocate(allowance, capacities);
  return capacities;
}

TEST(WholeHeads, AreTheReferenceOverGeneratedModels) {
  Random random(1);
  std::size_t whole = 0;
  for (int i = 0; i < 300; ++i) {
    const std::size_t layers = random.between(1, 6);
    const std::size_t kv_heads = random.between(1, 4);
    const std::size_t group = random.between(1, 3);
    const std::size_t tokens = random.between(2, 400);
    const std::size_t per_layer = random.between(1, tokens - 1);
    const std::size_t window = random.between(1, per_layer);
    const std::size_t least = random.pick(std::vector<std::size_t>{0, 1, 12, 60, 384, 5000});
    SCOPED_TRACE(testing::Message() << layers << " layers of " << kv_heads << " KV heads, group " << group
                                    << " S " << tokens << " p " << per_layer << " w " << window << " least "
                                    << least);
    const std::vector<double> of_queries = drawn_numbers(random, layers * kv_heads * group);
    std::vector<double> of_heads;
    for (std::size_t head = 0; head < layers * kv_heads; ++head) {
      const auto first = of_queries.begin() + static_cast<std::ptrdiff_t>(head * group);
      of_heads.push_back(*std::max_element(first, first + static_cast<std::ptrdiff_t>(group)));
    }
    const auto expected = reference::whole_heads(of_heads, per_layer, window, tokens, least);
    const Budget budget = Budget::tokens_per_layer(per_layer);
    const budget::Allowance allowance{.per_layer = per_layer, .window = window, .tokens = tokens};
    EXPECT_EQ(
        allocated(WholeHeads{scores_of(of_heads, kv_heads), budget, least}, allowance, layers * kv_heads),
        expected)
        << "by numbers of KV heads";
    EXPECT_EQ(allocated(WholeHeads{scores_of(of_queries, kv_heads * group), budget, least}, allowance,
                        layers * kv_heads),
              expected)
        << "by the largest of query heads";
    EXPECT_EQ(reference::sum(expected), per_layer * layers * kv_heads);
    whole += static_cast<std::size_t>(std::count(expected.begin(), expected.end(), tokens));
  }
  EXPECT_GT(whole, 500U);
}

TEST(WholeHeads, AQuarterOfAShortPromptStillHasWholeHeads) {
  // 250 rows a head in the mean: half of them for all, and 4 * 250 - 4 * 125 = 500 for the best.
  const budget::Allowance quarter{.per_layer = 250, .window = 8, .tokens = 1000};
  const HeadScores scores = scores_of({1.0, 3.0, 2.0, 3.0}, 2);
  EXPECT_EQ(allocated(WholeHeads{scores, Budget::kept_ratio(0.25)}, quarter, 4),
            (std::vector<std::size_t>{125, 625, 125, 125}));
  const HeadScores more = scores_of({1.0, 3.0, 2.0, 3.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0}, 2);
  EXPECT_EQ(allocated(WholeHeads{more, Budget::kept_ratio(0.25)}, quarter, 10),
            (std::vector<std::size_t>{125, 1000, 125, 500, 125, 125, 125, 125, 125, 125}))
      << "of equal numbers the lower layer";
  // Of a long one the paper's 128 and 256.
  EXPECT_EQ(allocated(WholeHeads{scores, Budget::kept_ratio(0.5)},
                      {.per_layer = 5000, .window = 8, .tokens = 10000}, 4),
            (std::vector<std::size_t>{384, 10000, 384, 9232}));
}

// ---- which rows ----

/// The places of `tokens` rows in a head's order: sink i at time i / sinks, recent token j at j / recent, the
/// sink first where both come at once; then the others, the most recent first.
HeadRows order_of(std::size_t rows, std::size_t sinks, const DuoAttention::Options& options) {
  HeadRows order;
  const auto add = [&](std::size_t row) {
    if (std::find(order.begin(), order.end(), row) == order.end()) {
      order.push_back(static_cast<std::uint32_t>(row));
    }
  };
  std::size_t sink = 0;
  std::size_t recent = 0;
  while (sink < options.sinks || recent < options.recent) {
    if (recent == options.recent ||
        (sink < options.sinks && sink * options.recent <= recent * options.sinks)) {
      if (sink < sinks) {
        add(sink);
      }
      ++sink;
    } else {
      if (recent < rows) {
        add(rows - 1 - recent);
      }
      ++recent;
    }
  }
  for (std::size_t row = rows; row-- > 0;) {
    add(row);
  }
  return order;
}

/// What stays of `rows` rows, `sinks` of them at positions of sinks.
HeadRows rows_kept(std::size_t rows, std::size_t sinks, std::size_t capacity,
                   const DuoAttention::Options& options) {
  HeadRows kept;
  const std::size_t window = std::min(options.window, rows);
  for (std::size_t row = rows - window; row < rows; ++row) {
    kept.push_back(static_cast<std::uint32_t>(row));
  }
  for (const std::uint32_t row : order_of(rows, sinks, options)) {
    if (kept.size() < std::max(capacity, window) && row < rows - window) {
      kept.push_back(row);
    }
  }
  std::sort(kept.begin(), kept.end());
  return kept;
}

/// A model whose layers are compressed as they arrive, and go on.
struct DuoModel {
  ModelShape shape;
  std::vector<reference::Cache<float>> caches;
  std::vector<std::vector<HeadRows>> positions;  // [layer][kv_head], in the cache now
  std::vector<std::vector<std::size_t>> rows;

  DuoModel(const ModelShape& model, std::size_t room) : shape(model) {
    Random random(7);
    for (std::size_t l = 0; l < shape.layers; ++l) {
      caches.emplace_back(KvShape{.kv_heads = shape.kv_heads, .rows = room, .head_dim = shape.head_dim},
                          reference::Arrangement::head_token_dim);
      caches.back().fill(random);
    }
    positions.assign(shape.layers, std::vector<HeadRows>(shape.kv_heads));
    rows.assign(shape.layers, std::vector<std::size_t>(shape.kv_heads, 0));
  }

  void append(std::size_t first, std::size_t last) {
    for (std::size_t l = 0; l < shape.layers; ++l) {
      for (std::size_t head = 0; head < shape.kv_heads; ++head) {
        for (std::size_t t = first; t < last; ++t) {
          positions[l][head].push_back(static_cast<std::uint32_t>(t));
        }
        rows[l][head] = positions[l][head].size();
      }
    }
  }

  StridedKv<float> view(std::size_t l) {
    KvShape now = caches[l].shape;
    now.head_rows = rows[l];
    return {caches[l].keys.data(), caches[l].values.data(), now, caches[l].strides};
  }

  /// Compresses all layers, each on its own, and holds what stays against the reference.
  template <class C>
  std::size_t compress(C& compressor, const std::vector<std::size_t>& capacities,
                       const DuoAttention::Options& options) {
    std::size_t total = 0;
    for (std::size_t l = 0; l < shape.layers; ++l) {
      std::vector<HeadRows> expected;
      for (std::size_t head = 0; head < shape.kv_heads; ++head) {
        const HeadRows& now = positions[l][head];
        const auto sinks = static_cast<std::size_t>(
            std::count_if(now.begin(), now.end(), [&](std::size_t p) { return p < options.sinks; }));
        expected.push_back(rows_kept(now.size(), sinks, capacities[l * shape.kv_heads + head], options));
        EXPECT_TRUE(std::is_sorted(expected.back().begin(), expected.back().end()));
      }
      const auto original = caches[l];
      const Retained& kept = compressor.compress(l, view(l));
      for (std::size_t head = 0; head < shape.kv_heads; ++head) {
        HeadRows left;
        for (const std::uint32_t row : expected[head]) {
          left.push_back(positions[l][head][row]);
        }
        EXPECT_EQ(HeadRows(kept.positions(head).begin(), kept.positions(head).end()), left)
            << "layer " << l << " KV head " << head;
        for (std::size_t row = 0; row < left.size(); ++row) {
          EXPECT_EQ(caches[l].keys[caches[l].at(head, row, 0)],
                    original.keys[original.at(head, expected[head][row], 0)]);
        }
        positions[l][head] = left;
        rows[l][head] = left.size();
        total += left.size();
      }
    }
    return total;
  }
};

constexpr ModelShape duo_shape{.layers = 3, .query_heads = 4, .kv_heads = 2, .head_dim = 3};

TEST(DuoAttention, KeepsSinksAndRecentOfSomeHeadsAndAllOfOthers) {
  Random random(3);
  for (int i = 0; i < 150; ++i) {
    const DuoAttention::Options options{.sinks = random.pick(std::vector<std::size_t>{0, 1, 4, 7, 30}),
                                        .recent = random.pick(std::vector<std::size_t>{0, 3, 8, 14, 60}),
                                        .window = random.between(1, 8)};
    const std::size_t tokens = random.between(2, 150);
    const std::size_t per_layer = random.between(options.window, std::max(options.window, tokens) + 2);
    SCOPED_TRACE(testing::Message() << "sinks " << options.sinks << " recent " << options.recent << " w "
                                    << options.window << " S " << tokens << " p " << per_layer);
    const std::vector<double> numbers = drawn_numbers(random, 6);
    const DuoPlan plan{duo_shape, DuoAttention{options}, select::GroupedTopK{},
                       WholeHeads{scores_of(numbers, 2), Budget::tokens_per_layer(per_layer),
                                  options.sinks + options.recent}};
    Compressor compressor{plan};
    compressor.begin(tokens);
    const auto capacities = per_layer < tokens
                                ? reference::whole_heads(numbers, per_layer, options.window, tokens,
                                                         options.sinks + options.recent)
                                : std::vector<std::size_t>(6, tokens);
    EXPECT_EQ(std::vector<std::size_t>(compressor.capacities().begin(), compressor.capacities().end()),
              capacities);
    DuoModel model(duo_shape, tokens);
    model.append(0, tokens);
    EXPECT_EQ(model.compress(compressor, capacities, options), std::min(per_layer, tokens) * 6);
  }
}

TEST(DuoAttention, FewRowsAreASmallerPictureOfManyRows) {
  const DuoAttention::Options paper{};
  EXPECT_EQ(rows_kept(1000, 128, 384, paper).size(), 384U);
  for (const std::size_t capacity : {24U, 126U, 384U, 500U}) {
    const HeadRows rows = rows_kept(1000, 128, capacity, paper);
    const auto sinks = static_cast<std::size_t>(
        std::count_if(rows.begin(), rows.end(), [](std::uint32_t row) { return row < 128; }));
    EXPECT_EQ(sinks, std::min<std::size_t>(capacity / 3, 128)) << capacity;
    EXPECT_EQ(rows[sinks], 1000 - (capacity - sinks)) << "the others are the most recent";
  }
}

TEST(DuoAttention, GoesOnOverTurnsTokensTakenBackAndSaving) {
  const DuoAttention::Options options{.sinks = 4, .recent = 12, .window = 4};
  const std::vector<double> numbers{1.0, 3.0, 2.0, 1.0, 0.5, 2.5};
  const DuoPlan plan{duo_shape, DuoAttention{options}, select::GroupedTopK{},
                     WholeHeads{scores_of(numbers, 2), Budget::kept_ratio(0.4), 16}};
  Compressor compressor{plan};
  DuoModel model(duo_shape, 400);
  const auto capacities = [&](std::size_t tokens) {
    return reference::whole_heads(numbers, tokens * 2 / 5, 4, tokens, 16);
  };
  compressor.begin(100);
  model.append(0, 100);
  EXPECT_EQ(model.compress(compressor, capacities(100), options), 240U);
  EXPECT_EQ(model.rows[0][1], 100U) << "the best head";

  // Thirty tokens are decoded, five of them taken back.
  model.append(100, 130);
  const Held held = compressor.truncate(125);
  for (std::size_t l = 0; l < 3; ++l) {
    for (std::size_t head = 0; head < 2; ++head) {
      model.positions[l][head].resize(model.positions[l][head].size() - 5);
      EXPECT_EQ(held.rows(l, head), model.positions[l][head].size());
    }
  }
  model.append(125, 200);
  std::ostringstream saved;
  compressor.save(saved, {.method = "duoattention"});
  Compressor loaded{plan};
  std::istringstream stream(saved.str());
  loaded.load(stream, {.method = "duoattention"});
  EXPECT_TRUE(std::equal(loaded.capacities().begin(), loaded.capacities().end(),
                         compressor.capacities().begin(), compressor.capacities().end()));
  loaded.begin_turn(200);
  model.compress(loaded, capacities(200), options);
  EXPECT_EQ(model.rows[0][1], 200U) << "nothing of the best head has gone";
  EXPECT_EQ(model.rows[2][0], 16U) << "a head that streams keeps as much as before";

  // One token at a time, as a cache that is cut while the model decodes.
  for (std::size_t token = 200; token < 230; ++token) {
    model.append(token, token + 1);
    loaded.begin_turn(token + 1);
    model.compress(loaded, capacities(token + 1), options);
  }
  EXPECT_EQ(model.rows[0][1], 230U);
}

TEST(DuoAttention, ProtectedTokensStayInEveryHead) {
  const DuoAttention::Options options{.sinks = 2, .recent = 6, .window = 2};
  const DuoPlan plan{
      duo_shape, DuoAttention{options}, select::GroupedTopK{},
      WholeHeads{scores_of({1.0, 3.0, 2.0, 1.0, 0.5, 2.5}, 2), Budget::tokens_per_layer(20), 8}};
  Compressor compressor{plan};
  DuoModel model(duo_shape, 60);
  model.append(0, 60);
  const HeadRows wanted{20, 31, 32};
  compressor.begin(60, {.positions = wanted});
  for (std::size_t l = 0; l < 3; ++l) {
    const Retained& kept = compressor.compress(l, model.view(l));
    for (std::size_t head = 0; head < 2; ++head) {
      EXPECT_EQ(kept.rows(head), compressor.capacities()[l * 2 + head]);
      for (const std::uint32_t position : wanted) {
        EXPECT_TRUE(kept.row(position, head).has_value()) << "layer " << l << " KV head " << head;
      }
    }
  }
  const HeadRows many{20, 21, 22, 23, 24, 25, 26};
  compressor.begin(60, {.positions = many});
  const auto before = model.caches[0];
  expect_error<ArgumentError>([&] { compressor.compress(0, model.view(0)); },
                              {"layer 0 has room for 6 tokens beside the window", "7 are protected"});
  EXPECT_EQ(model.caches[0], before);
}

/// Heads with a budget of their own choose by any scorer of KV heads.
TEST(WholeHeads, GoWithOtherScorers) {
  for (const reference::LayerCase& c : reference::model_cases(40, 5)) {
    SCOPED_TRACE(testing::Message() << c);
    reference::Layer<float> layer(c);
    Random random(c.seed);
    const std::vector<double> numbers = drawn_numbers(random, c.kv_heads);
    const Plan plan{layer.shape, score::SnapKv{{.window = c.window}}, select::GroupedTopK{},
                    WholeHeads{scores_of(numbers, c.kv_heads), Budget::tokens_per_layer(c.capacity), 16}};
    Compressor compressor{plan};
    compressor.begin(c.rows);
    const std::vector<std::size_t> capacities(compressor.capacities().begin(), compressor.capacities().end());
    const auto scores = compressor.score(0, layer.cache.view(), layer.observation());
    const Selection selection = compressor.select(0, scores);
    for (std::size_t head = 0; head < c.kv_heads; ++head) {
      const auto row = scores.row(head);
      HeadRows expected(row.size());
      std::iota(expected.begin(), expected.end(), 0U);
      std::stable_sort(expected.begin(), expected.end(),
                       [&](std::uint32_t a, std::uint32_t b) { return row[a] > row[b]; });
      expected.resize(std::min(row.size(), capacities[head] - scores.window(head)));
      for (std::size_t t = row.size(); t < c.rows; ++t) {
        expected.push_back(static_cast<std::uint32_t>(t));
      }
      std::sort(expected.begin(), expected.end());
      EXPECT_EQ(HeadRows(selection.rows(head).begin(), selection.rows(head).end()), expected);
    }
  }
}

TEST(WholeHeads, SayWhatDoesNotFit) {
  const Budget budget = Budget::tokens_per_layer(20);
  const auto plan_of = [&](const HeadScores& scores) {
    return DuoPlan{duo_shape, DuoAttention{}, select::GroupedTopK{}, WholeHeads{scores, budget}};
  };
  expect_error<ArgumentError>([&] { plan_of(scores_of(std::vector<double>(9, 1.0), 3)); },
                              {"head scores are of 3 layers of 3 heads",
                               "3 layers of 4 query heads and 2 KV heads", "calibrated for this model"});
  expect_error<ArgumentError>([&] { plan_of(scores_of(std::vector<double>(8, 1.0), 4)); },
                              {"head scores are of 2 layers of 4 heads"});
  expect_error<ArgumentError>([] { DuoAttention{{.window = 0}}; },
                              {"window is 0", "the last token must stay"});
  expect_error<ArgumentError>([] { DuoAttention{{.sinks = std::size_t{1} << 32U}}; },
                              {"sinks is 4294967296, the most is 4294967295"});
  expect_error<ArgumentError>([] { DuoAttention{{.recent = std::size_t{1} << 32U}}; },
                              {"recent is 4294967296, the most is 4294967295"});
  const DuoPlan plan = plan_of(scores_of(std::vector<double>(6, 1.0), 2));
  std::ostringstream saved;
  Compressor compressor{plan};
  compressor.begin(50);
  compressor.save(saved, {.method = "duoattention"});
  // What one capacity a layer has written is not taken for one a KV head.
  const Plan uniform{duo_shape, DuoAttention{}, select::GroupedTopK{}, budget::Uniform{budget}};
  Compressor other{uniform};
  std::istringstream stream(saved.str());
  expect_error<FileError>([&] { other.load(stream, {.method = "duoattention"}); }, {""});
}

}  // namespace
}  // namespace compresskv
