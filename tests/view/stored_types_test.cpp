// Every stored type: rows score as what they decode to, bit for bit, and move as the bytes they are.

#include <gtest/gtest.h>

#include <cmath>
#include <compresskv/compresskv.hpp>
#include <cstdint>
#include <cstring>
#include <functional>
#include <span>
#include <utility>
#include <vector>

#include "reference/cache.hpp"
#include "reference/errors.hpp"
#include "reference/layer_case.hpp"
#include "reference/pool.hpp"
#include "reference/stored.hpp"

namespace compresskv {
namespace {

using reference::Cache;
using reference::element;
using reference::expect_error;
using reference::Layer;
using reference::LayoutFunction;
using reference::Random;
using reference::randomise;
using Rows = std::vector<std::uint32_t>;

constexpr std::size_t kv_heads = 2;
constexpr std::size_t rows = 150;
constexpr std::size_t head_dim = 64;

template <class T>
constexpr std::size_t units_of_row = head_dim / elements_per_unit<T>();

reference::LayerCase sizes() {
  return {.group = 3,
          .kv_heads = kv_heads,
          .head_dim = head_dim,
          .rows = rows,
          .capacity = 40,
          .heads_per_layer = 4,
          .seed = 8};
}

/// `quantised` views a cache whose keys decode to `layer.cache`: same scores, same rows kept.
template <class V>
Rows expect_same_selection(Layer<float>& layer, const V& quantised) {
  Compressor plain{layer.plan};
  plain.begin(rows);
  const auto scores = plain.score(0, layer.cache.view(), layer.observation());
  const std::vector<float> expected(scores.values().begin(), scores.values().end());
  auto copy = layer.cache;
  const Retained& kept = plain.compress(0, copy.view(), layer.observation());

  Compressor compressor{layer.plan};
  compressor.begin(rows);
  for (const kernel::CodePath path : {kernel::CodePath::portable, kernel::code_path()}) {
    kernel::force_code_path(path);
    const auto own = compressor.score(0, quantised, layer.observation());
    EXPECT_TRUE(reference::same_bytes({own.values().begin(), own.values().end()}, expected));
  }
  const Retained& retained = compressor.compress(0, quantised, layer.observation());
  EXPECT_EQ(retained.bytes_freed(), (rows - 40) * kv_heads * kv_row_bytes(quantised));
  const Rows positions(retained.positions().begin(), retained.positions().end());
  EXPECT_EQ(positions, Rows(kept.positions().begin(), kept.positions().end()));
  return positions;
}

/// Rows of keys or of values, and where a unit of them lies.
template <class T>
struct Units {
  std::function<std::size_t(std::size_t head, std::size_t row, std::size_t unit)> at;
  std::vector<T> memory;

  Units(std::size_t size, std::function<std::size_t(std::size_t, std::size_t, std::size_t)> where,
        Random& random)
      : at(std::move(where)), memory(size) {
    for (T& unit : memory) {
      randomise(unit, random);
    }
  }

  std::vector<T> compacted(const Rows& kept) const {
    std::vector<T> expected = memory;
    for (std::size_t head = 0; head < kv_heads; ++head) {
      for (std::size_t row = 0; row < kept.size(); ++row) {
        for (std::size_t unit = 0; unit < units_of_row<T>; ++unit) {
          expected[at(head, row, unit)] = memory[at(head, kept[row], unit)];
        }
      }
    }
    return expected;
  }
};

template <class Key, class Value, class View>
void check(Units<Key>& keys, Units<Value>& values, const View& view) {
  Layer<float> layer(sizes());
  for (std::size_t head = 0; head < kv_heads; ++head) {
    for (std::size_t row = 0; row < rows; ++row) {
      for (std::size_t e = 0; e < head_dim; ++e) {
        constexpr std::size_t elements = elements_per_unit<Key>();
        layer.cache.keys[layer.cache.at(head, row, e)] =
            element(keys.memory[keys.at(head, row, e / elements)], e % elements);
      }
    }
  }
  EXPECT_EQ(kv_row_bytes(view), units_of_row<Key> * sizeof(Key) + units_of_row<Value> * sizeof(Value));
  const Units<Key> keys_before = keys;
  const Units<Value> values_before = values;
  const Rows kept = expect_same_selection(layer, view);
  EXPECT_TRUE(reference::same_bytes(keys.memory, keys_before.compacted(kept)));
  EXPECT_TRUE(reference::same_bytes(values.memory, values_before.compacted(kept)));
}

template <class T>
Units<T> strided(const LayoutFunction& layout, Random& random) {
  const layout::Strides strides = layout({.kv_heads = kv_heads, .rows = rows, .units = units_of_row<T>});
  return {kv_heads * rows * units_of_row<T>,
          [strides](std::size_t head, std::size_t row, std::size_t unit) {
            return reference::unit_at(strides, units_of_row<T>, head, row, unit);
          },
          random};
}

template <class Key, class Value>
void check_strided(const LayoutFunction& key_layout, const LayoutFunction& value_layout) {
  Random random(21);
  Units<Key> keys = strided<Key>(key_layout, random);
  Units<Value> values = strided<Value>(value_layout, random);
  check(keys, values,
        StridedKv<Key, Value>(std::span<Key>(keys.memory), std::span<Value>(values.memory),
                              KvShape{.kv_heads = kv_heads, .rows = rows, .head_dim = head_dim}, key_layout,
                              value_layout));
}

TEST(StoredTypes, ScoreAsTheyDecodeAndMoveAsBytes) {
  const auto plain = layout::head_token_dim;
  const auto by_token = layout::token_head_dim;
  const auto transposed = layout::head_dim_token;
  check_strided<BlockQ8_0, BlockQ4_0>(plain, by_token);
  check_strided<BlockQ4_0, BlockQ8_0>(plain, transposed);
  check_strided<BlockQ4_0, BlockQ8_0>(transposed, plain);
  // Keys and values of different kinds.
  check_strided<BlockQ8_0, half>(by_token, transposed);
  check_strided<half, bfloat16>(plain, transposed);
  check_strided<half, bfloat16>(transposed, plain);
  check_strided<bfloat16, BlockQ8_0>(by_token, plain);
  check_strided<float, BlockQ4_0>(transposed, by_token);
}

TEST(StoredTypes, InPagedCachesToo) {
  constexpr std::size_t block_rows = 16;
  constexpr std::size_t blocks = (rows + block_rows - 1) / block_rows;
  Random random(24);
  const auto table = reference::shuffled_blocks(blocks, blocks + 3, random);
  const auto paged = [&](const layout::Strides& strides, std::size_t units) {
    return [&table, strides, units](std::size_t head, std::size_t row, std::size_t unit) {
      return static_cast<std::size_t>(table[row / block_rows]) * kv_heads * block_rows * units +
             reference::unit_at(strides, units, head, row % block_rows, unit);
    };
  };
  const auto pool_units = [](std::size_t units) { return (blocks + 3) * kv_heads * block_rows * units; };
  using Key = BlockQ8_0;
  using Value = half;
  const layout::SplitDim key_layout{1};
  const layout::TokenHeadDim value_layout{};
  const auto key_strides = key_layout({.kv_heads = kv_heads, .rows = block_rows, .units = units_of_row<Key>});
  const auto value_strides =
      value_layout({.kv_heads = kv_heads, .rows = block_rows, .units = units_of_row<Value>});
  Units<Key> keys(pool_units(units_of_row<Key>), paged(key_strides, units_of_row<Key>), random);
  Units<Value> values(pool_units(units_of_row<Value>), paged(value_strides, units_of_row<Value>), random);
  check(keys, values,
        PagedKv<Key, Value>(std::span<Key>(keys.memory), std::span<Value>(values.memory),
                            PagedShape{.kv_heads = kv_heads,
                                       .rows = rows,
                                       .head_dim = head_dim,
                                       .block_rows = block_rows,
                                       .pool_blocks = blocks + 3},
                            table, key_layout, value_layout));
}

struct Int8Memory {
  std::vector<std::int8_t> data = std::vector<std::int8_t>(kv_heads * rows * head_dim);
  std::vector<float> scales = std::vector<float>(kv_heads * rows);
  std::vector<float> zeros = std::vector<float>(kv_heads * rows);

  explicit Int8Memory(Random& random) {
    for (std::int8_t& quant : data) {
      quant = static_cast<std::int8_t>(static_cast<int>(random.below(256)) - 128);
    }
    for (std::size_t i = 0; i < scales.size(); ++i) {
      scales[i] = 0.01F + 0.02F * std::abs(random.gaussian());
      zeros[i] = static_cast<float>(random.below(100)) - 50.0F;
    }
  }
  Int8Rows view() { return {.data = data, .scales = scales, .zeros = zeros}; }

  /// Data is `[row][head][dim]`, scales and zeros `[head][row]`.
  static std::size_t at(std::size_t head, std::size_t row) { return (row * kv_heads + head) * head_dim; }

  Int8Memory compacted(const Rows& kept) const {
    Int8Memory expected = *this;
    for (std::size_t head = 0; head < kv_heads; ++head) {
      for (std::size_t row = 0; row < kept.size(); ++row) {
        std::memcpy(&expected.data[at(head, row)], &data[at(head, kept[row])], head_dim);
        expected.scales[head * rows + row] = scales[head * rows + kept[row]];
        expected.zeros[head * rows + row] = zeros[head * rows + kept[row]];
      }
    }
    return expected;
  }
  friend bool operator==(const Int8Memory&, const Int8Memory&) = default;
};

TEST(StoredTypes, Int8RowsMoveWithTheirScaleAndZero) {
  Layer<float> layer(sizes());
  Random random(22);
  Int8Memory keys(random);
  Int8Memory values(random);
  for (std::size_t head = 0; head < kv_heads; ++head) {
    for (std::size_t row = 0; row < rows; ++row) {
      for (std::size_t e = 0; e < head_dim; ++e) {
        const auto quant = static_cast<float>(keys.data[Int8Memory::at(head, row) + e]);
        layer.cache.keys[layer.cache.at(head, row, e)] =
            keys.scales[head * rows + row] * (quant - keys.zeros[head * rows + row]);
      }
    }
  }
  const Int8Memory keys_before = keys;
  const Int8Memory values_before = values;
  const Int8Kv view(keys.view(), values.view(),
                    KvShape{.kv_heads = kv_heads, .rows = rows, .head_dim = head_dim},
                    layout::token_head_dim);
  EXPECT_EQ(kv_row_bytes(view), 2 * (head_dim + 8));
  const Rows kept = expect_same_selection(layer, view);
  EXPECT_EQ(keys, keys_before.compacted(kept));
  EXPECT_EQ(values, values_before.compacted(kept));
}

TEST(StoredTypes, Int8RejectsBuffersThatAreTooSmall) {
  Random random(23);
  Int8Memory keys(random);
  Int8Memory values(random);
  const KvShape shape{.kv_heads = kv_heads, .rows = rows, .head_dim = head_dim};
  const auto make = [&] { Int8Kv(keys.view(), values.view(), shape, layout::token_head_dim); };
  EXPECT_NO_THROW(make());
  values.zeros.pop_back();
  expect_error<ArgumentError>(make, {"Int8Kv", "values", "299"});
  values.zeros.push_back(0.0F);
  keys.data.pop_back();
  expect_error<ArgumentError>(make, {"Int8Kv", "the buffer has 19199"});
  keys.data.push_back(0);
  expect_error<ArgumentError>(
      [&] {
        Int8Kv(keys.view(), values.view(), {.kv_heads = 0, .rows = 1, .head_dim = 1}, layout::token_head_dim);
      },
      {"Int8Kv: shape has 0 KV heads"});
}

TEST(StoredTypes, Int8AsksForTheScalesThatItsRowsHave) {
  std::vector<std::int8_t> data(1000);
  std::vector<float> parameters(25);
  const auto make = [&](std::size_t count, std::size_t heads, std::size_t allocated) {
    const auto some = std::span(parameters).first(count);
    const Int8Rows of_each{.data = data, .scales = some, .zeros = some};
    Int8Kv(of_each, of_each, {.kv_heads = heads, .rows = 5, .head_dim = 8, .allocated_rows = allocated},
           layout::token_head_dim);
  };
  // [kv_head][row] of 20 allocated rows: nothing lies behind the rows of the last head.
  EXPECT_NO_THROW(make(25, 2, 20));
  expect_error<ArgumentError>([&] { make(24, 2, 20); },
                              {"Int8Kv: keys have 24 scales", "2 KV heads of 20 rows need 25 of each"});
  // Products that wrap: 2 * 2^63 is 0, and so are the bytes of 2 * 2^61.
  expect_error<ArgumentError>(
      [&] { make(0, 2, std::size_t{1} << 63U); },
      {"Int8Kv: 2 KV heads of 9223372036854775808 rows", "scales do not fit in memory"});
  expect_error<ArgumentError>([&] { make(25, 2, std::size_t{1} << 61U); }, {"do not fit in memory"});
  expect_error<ArgumentError>([&] { make(25, (std::size_t{1} << 61U) + 1, 8); }, {"do not fit in memory"});
}

}  // namespace
}  // namespace compresskv
