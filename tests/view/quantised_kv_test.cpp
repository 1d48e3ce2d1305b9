// Quantised rows score as what they decode to, and move as the bytes they are.

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <compresskv/compresskv.hpp>
#include <cstdint>
#include <cstring>
#include <vector>

#include "reference/cache.hpp"
#include "reference/errors.hpp"
#include "reference/layer_case.hpp"

namespace compresskv {
namespace {

using reference::Cache;
using reference::expect_error;
using reference::Layer;
using reference::Random;
using Rows = std::vector<std::uint32_t>;

constexpr std::size_t kv_heads = 2;
constexpr std::size_t rows = 150;
constexpr std::size_t head_dim = 64;
constexpr std::size_t blocks_of_row = head_dim / 32;

std::uint16_t random_scale(Random& random) {
  return std::bit_cast<std::uint16_t>(static_cast<Eigen::half>(0.01F + 0.02F * std::abs(random.gaussian())));
}

float scale_of(std::uint16_t bits) { return static_cast<float>(std::bit_cast<Eigen::half>(bits)); }

void randomise(BlockQ8_0& block, Random& random) {
  block.scale = random_scale(random);
  for (std::int8_t& quant : block.quants) {
    quant = static_cast<std::int8_t>(static_cast<int>(random.below(256)) - 128);
  }
}

void randomise(BlockQ4_0& block, Random& random) {
  block.scale = std::bit_cast<std::uint16_t>(static_cast<Eigen::half>(0.2F + 0.1F * random.gaussian()));
  for (std::uint8_t& pair : block.quants) {
    pair = static_cast<std::uint8_t>(random.below(256));
  }
}

// ggml's definitions: an element is the scale times a byte; or times a nibble less 8, the first 16 elements
// in the low ones.
float element(const BlockQ8_0& block, std::size_t e) {
  return scale_of(block.scale) * static_cast<float>(block.quants[e]);
}
float element(const BlockQ4_0& block, std::size_t e) {
  const int byte = block.quants[e % 16];
  return scale_of(block.scale) * static_cast<float>((e < 16 ? byte % 16 : byte / 16) - 8);
}

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

template <class B>
std::vector<B> random_blocks(Random& random) {
  std::vector<B> blocks(kv_heads * rows * blocks_of_row);
  for (B& block : blocks) {
    randomise(block, random);
  }
  return blocks;
}

/// `[head][row][block]` or `[head][block][row]` as the strides say.
std::size_t block_at(const layout::Strides& s, std::size_t head, std::size_t row, std::size_t block) {
  return head * s.head + row * s.row + (s.chunk == 0 ? block : block * s.chunk_stride);
}

template <class B>
std::vector<B> compacted(const std::vector<B>& blocks, const layout::Strides& s, const Rows& kept) {
  std::vector<B> expected = blocks;
  for (std::size_t head = 0; head < kv_heads; ++head) {
    for (std::size_t row = 0; row < kept.size(); ++row) {
      for (std::size_t block = 0; block < blocks_of_row; ++block) {
        expected[block_at(s, head, row, block)] = blocks[block_at(s, head, kept[row], block)];
      }
    }
  }
  return expected;
}

template <class Key, class Value>
void check_blocks(const layout::Strides& key_strides, const layout::Strides& value_strides) {
  Layer<float> layer(sizes());
  Random random(21);
  std::vector<Key> keys = random_blocks<Key>(random);
  std::vector<Value> values = random_blocks<Value>(random);
  for (std::size_t head = 0; head < kv_heads; ++head) {
    for (std::size_t row = 0; row < rows; ++row) {
      for (std::size_t e = 0; e < head_dim; ++e) {
        layer.cache.keys[layer.cache.at(head, row, e)] =
            element(keys[block_at(key_strides, head, row, e / 32)], e % 32);
      }
    }
  }
  const auto keys_before = keys;
  const auto values_before = values;
  const StridedKv<Key, Value> view(std::span<Key>(keys), std::span<Value>(values),
                                   KvShape{.kv_heads = kv_heads, .rows = rows, .head_dim = head_dim},
                                   key_strides, value_strides);
  EXPECT_EQ(kv_row_bytes(view), blocks_of_row * (sizeof(Key) + sizeof(Value)));
  const Rows kept = expect_same_selection(layer, view);
  EXPECT_TRUE(reference::same_bytes(keys, compacted(keys_before, key_strides, kept)));
  EXPECT_TRUE(reference::same_bytes(values, compacted(values_before, value_strides, kept)));
}

TEST(QuantisedKv, BlocksScoreAsTheyDecodeAndMoveAsBytes) {
  const layout::Extents extents{.kv_heads = kv_heads, .rows = rows, .units = blocks_of_row};
  check_blocks<BlockQ8_0, BlockQ4_0>(layout::head_token_dim(extents), layout::token_head_dim(extents));
  check_blocks<BlockQ4_0, BlockQ8_0>(layout::head_token_dim(extents), layout::head_dim_token(extents));
  check_blocks<BlockQ4_0, BlockQ8_0>(layout::head_dim_token(extents), layout::head_token_dim(extents));
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

TEST(QuantisedKv, Int8RowsMoveWithTheirScaleAndZero) {
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

TEST(QuantisedKv, Int8RejectsBuffersThatAreTooSmall) {
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

}  // namespace
}  // namespace compresskv
