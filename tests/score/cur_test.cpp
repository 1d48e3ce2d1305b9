#include <gtest/gtest.h>

#include <algorithm>
#include <compresskv/score/cur.hpp>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "reference/errors.hpp"
#include "reference/executors.hpp"
#include "reference/methods.hpp"
#include "reference/stored.hpp"

namespace compresskv {
namespace {

using reference::expect_error;
using reference::Layer;
using reference::LayerCase;
using score::Cur;

template <class X = SerialExecutor>
std::vector<std::vector<float>> cur_scores(const Cur::Options& options, Layer<float>& layer,
                                           X executor = {}) {
  const Plan plan{layer.shape, Cur{options}, select::GroupedTopK{},
                  budget::Uniform{Budget::tokens_per_layer(options.window)}};
  Compressor compressor{plan, executor};
  compressor.begin(layer.sizes.rows);
  const auto scores = compressor.score(0, layer.cache.view());
  std::vector<std::vector<float>> rows;
  for (std::size_t head = 0; head < scores.rows(); ++head) {
    rows.emplace_back(scores.row(head).begin(), scores.row(head).end());
  }
  return rows;
}

TEST(Cur, IsTheReferenceOverGeneratedLayers) {
  std::vector<LayerCase> cases = reference::layer_cases(25, 91);
  std::erase_if(cases, [](const LayerCase& c) { return c.rows > 1000 || c.kv_heads * c.rows > 3000; });
  for (const LayerCase& c : cases) {
    for (const auto& [sinks, block] :
         std::vector<std::pair<std::size_t, std::size_t>>{{4, 16}, {0, 1}, {2, 7}, {100, 16}, {0, 100000}}) {
      SCOPED_TRACE(testing::Message() << c << " sinks " << sinks << " block " << block);
      Layer<float> layer(c);
      // A score is rounded to float32 twice.
      reference::expect_scores(Cur{{.sinks = sinks, .block = block, .window = c.window}}, layer,
                               reference::cur(layer, sinks, block), 2e-7, 0.0);
    }
  }
}

TEST(Cur, RowsWithoutLengthHaveNoShare) {
  Layer<float> layer({.head_dim = 4, .rows = 40, .window = 1, .capacity = 4});
  for (std::size_t row = 0; row < 40; ++row) {
    for (std::size_t dim = 0; dim < 4; ++dim) {
      if (row < 8 || row == 11) {
        layer.cache.keys[layer.cache.at(0, row, dim)] = 0.0F;
      }
      if (row >= 24) {
        layer.cache.values[layer.cache.value_at(0, row, dim)] = 0.0F;
      }
    }
  }
  const auto scores = cur_scores({.sinks = 0, .block = 8, .window = 1}, layer)[0];
  for (std::size_t row = 0; row < 39; ++row) {
    EXPECT_EQ(scores[row] == 0.0F, row < 8 || row == 11 || row >= 24) << row;
  }
  reference::expect_scores(Cur{{.sinks = 0, .block = 8, .window = 1}}, layer, reference::cur(layer, 0, 8),
                           2e-7, 0.0);
  std::fill(layer.cache.keys.begin(), layer.cache.keys.end(), 0.0F);
  EXPECT_EQ(cur_scores({.sinks = 2, .window = 1}, layer)[0][2], 0.0F);
  EXPECT_EQ(cur_scores({.sinks = 2, .window = 1}, layer)[0][1], 1.0F) << "sinks stay";
}

/// Lengths that are shared out are compared within a block alone: their size says nothing.
TEST(Cur, AnyFiniteNumbersHaveScores) {
  Layer<float> layer({.head_dim = 8, .rows = 64, .window = 1, .capacity = 4});
  Layer<float> tiny = layer;
  for (float& x : layer.cache.keys) {
    x = static_cast<float>(static_cast<int>(4.0F * x));
  }
  const detail::PlainFloats plain;  // with -Ofast the program takes such numbers for zero
  for (std::size_t i = 0; i < layer.cache.keys.size(); ++i) {
    tiny.cache.keys[i] = layer.cache.keys[i] * std::numeric_limits<float>::denorm_min();
  }
  const auto expected = cur_scores({.window = 1}, layer)[0];
  const auto scores = cur_scores({.window = 1}, tiny)[0];
  for (std::size_t t = 0; t < scores.size(); ++t) {
    EXPECT_NEAR(static_cast<double>(scores[t]), static_cast<double>(expected[t]),
                2e-7 * static_cast<double>(expected[t]));
  }
  std::fill(layer.cache.keys.begin(), layer.cache.keys.end(), std::numeric_limits<float>::max());
  const auto of_largest = cur_scores({.window = 1}, layer)[0];
  for (const float score : of_largest) {
    EXPECT_TRUE(score > 0.0F && score <= 1.0F);
  }
}

/// Blocks count rows, sinks count positions: a cache that lost rows scores as one that never had them.
TEST(Cur, AfterAnEvictionBlocksAreOfTheRowsThatAreLeft) {
  Layer<float> whole({.kv_heads = 2, .head_dim = 8, .rows = 100, .window = 4, .capacity = 40});
  const std::vector<std::vector<std::uint32_t>> rows = [] {
    std::vector<std::vector<std::uint32_t>> kept(2);
    for (std::uint32_t row = 1; row < 100; ++row) {  // of the sinks, the first is gone
      for (std::uint32_t head = 0; head < 2; ++head) {
        if (row < 4 || (row * (head + 3)) % 4 > 0) {
          kept[head].push_back(row);
        }
      }
    }
    return kept;
  }();
  Layer<float> layer = whole;
  const Plan plan{layer.shape, Cur{{.window = 4}}, select::GroupedTopK{},
                  budget::Uniform{Budget::tokens_per_layer(40)}};
  Compressor compressor{plan};
  compressor.begin(100);
  compressor.compact(0, layer.cache.view(), Selection::per_head(rows));
  layer.cache.set_rows({rows[0].size(), rows[1].size()});
  const auto scores = compressor.score(0, layer.cache.view());
  for (std::size_t head = 0; head < 2; ++head) {
    Layer<float> alone({.head_dim = 8, .rows = rows[head].size(), .window = 4, .capacity = 8});
    for (std::size_t row = 0; row < rows[head].size(); ++row) {
      for (std::size_t dim = 0; dim < 8; ++dim) {
        alone.cache.keys[alone.cache.at(0, row, dim)] =
            whole.cache.keys[whole.cache.at(head, rows[head][row], dim)];
        alone.cache.values[alone.cache.value_at(0, row, dim)] =
            whole.cache.values[whole.cache.value_at(head, rows[head][row], dim)];
      }
    }
    const auto expected = cur_scores({.sinks = 3, .window = 4}, alone)[0];
    EXPECT_TRUE(
        std::equal(scores.row(head).begin(), scores.row(head).end(), expected.begin(), expected.end()));
  }
}

TEST(Cur, ThreadsDecideNoBit) {
  Layer<float> layer({.kv_heads = 9, .head_dim = 20, .rows = 300, .window = 8, .capacity = 8});
  const auto expected = cur_scores({}, layer);
  EXPECT_EQ(cur_scores({}, layer, reference::ReverseExecutor{}), expected);
  EXPECT_EQ(cur_scores({}, layer, reference::ShuffledExecutor{}), expected);
  EXPECT_EQ(cur_scores({}, layer, reference::ThreadExecutor{}), expected);
}

TEST(Cur, NamesTheKeyOrValueThatIsNotFinite) {
  for (const float poison :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    for (const std::size_t row : {0U, 17U, 29U}) {  // a sink, and the window, too
      for (const bool key : {true, false}) {
        Layer<float> layer({.kv_heads = 3, .head_dim = 4, .rows = 30, .window = 8, .capacity = 12});
        (key ? layer.cache.keys[layer.cache.at(2, row, 1)]
             : layer.cache.values[layer.cache.value_at(2, row, 1)]) = poison;
        const Plan plan{layer.shape, Cur{{}}, select::GroupedTopK{},
                        budget::Uniform{Budget::tokens_per_layer(12)}};
        Compressor compressor{plan};
        compressor.begin(30);
        const reference::Cache<float> before = layer.cache;
        expect_error<ScoreError>([&] { compressor.compress(0, layer.cache.view()); },
                                 {std::string(key ? "key" : "value") + " of layer 0 KV head 2 token " +
                                      std::to_string(row) + " holds NaN or infinite elements",
                                  "the cache was left as it is"});
        EXPECT_TRUE(layer.cache == before);
      }
    }
  }
}

/// The scale of a quantised block that is NaN makes its row one.
TEST(Cur, NamesAQuantisedRowThatIsNotFinite) {
  reference::Random random(92);
  std::vector<BlockQ8_0> keys(20);
  std::vector<BlockQ8_0> values(20);
  for (std::size_t i = 0; i < 20; ++i) {
    reference::randomise(keys[i], random);
    reference::randomise(values[i], random);
  }
  values[13].scale = 0x7E00;
  const ModelShape shape{.layers = 1, .query_heads = 1, .kv_heads = 1, .head_dim = 32};
  const Plan plan{shape, Cur{{}}, select::GroupedTopK{}, budget::Uniform{Budget::tokens_per_layer(10)}};
  Compressor compressor{plan};
  compressor.begin(20);
  const StridedKv kv{keys, values, KvShape{.kv_heads = 1, .rows = 20, .head_dim = 32},
                     layout::head_token_dim};
  expect_error<ScoreError>([&] { compressor.compress(0, kv); }, {"value of layer 0 KV head 0 token 13 "});
}

TEST(Cur, RejectsOptionsByName) {
  expect_error<ArgumentError>([] { Cur{{.window = 0}}; }, {"window is 0"});
  expect_error<ArgumentError>([] { Cur{{.block = 0}}; }, {"block is 0", "1 row or more"});
}

}  // namespace
}  // namespace compresskv
