// Every method over every stored type: it keeps the rows that it keeps of the decoded cache, and they move as
// bytes.

#include <gtest/gtest.h>

#include <cmath>
#include <compresskv/compresskv.hpp>
#include <compresskv/methods.hpp>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "reference/arriving_methods.hpp"
#include "reference/layer_case.hpp"
#include "reference/output_norms.hpp"
#include "reference/queries.hpp"
#include "reference/stored.hpp"

namespace compresskv {
namespace {

using reference::Layer;
using reference::Random;
using Bytes = std::vector<unsigned char>;

constexpr std::size_t kv_heads = 2;
constexpr std::size_t rows = 150;
constexpr std::size_t capacity = 40;
constexpr std::size_t head_dim = 64;
constexpr KvShape kv_shape{.kv_heads = kv_heads, .rows = rows, .head_dim = head_dim};

template <class T>
void add_bytes(Bytes& bytes, const T* from, std::size_t count) {
  const auto* first = reinterpret_cast<const unsigned char*>(from);
  bytes.insert(bytes.end(), first, first + count * sizeof(T));
}

/// Keys and values of a type, `[KV head][row]`.
template <class T>
struct Memory {
  static constexpr std::size_t units = head_dim / elements_per_unit<T>();
  std::vector<T> keys = std::vector<T>(kv_heads * rows * units);
  std::vector<T> values = keys;

  explicit Memory(Random& random) {
    for (std::vector<T>* memory : {&keys, &values}) {
      for (T& unit : *memory) {
        reference::randomise(unit, random);
      }
    }
  }
  StridedKv<T> view() { return {keys.data(), values.data(), kv_shape, layout::head_token_dim}; }
  float key(std::size_t head, std::size_t row, std::size_t e) const { return element(keys, head, row, e); }
  float value(std::size_t head, std::size_t row, std::size_t e) const {
    return element(values, head, row, e);
  }
  /// All that belongs to a row.
  Bytes row(std::size_t head, std::size_t index) const {
    Bytes bytes;
    add_bytes(bytes, keys.data() + (head * rows + index) * units, units);
    add_bytes(bytes, values.data() + (head * rows + index) * units, units);
    return bytes;
  }

 private:
  static float element(const std::vector<T>& memory, std::size_t head, std::size_t row, std::size_t e) {
    constexpr std::size_t elements = elements_per_unit<T>();
    return reference::element(memory[(head * rows + row) * units + e / elements], e % elements);
  }
};

template <>
struct Memory<AffineInt8> {
  std::vector<std::int8_t> data = std::vector<std::int8_t>(2 * kv_heads * rows * head_dim);
  // Keys' scales, keys' zeros, values' scales, values' zeros.
  std::vector<std::vector<float>> parameters{4, std::vector<float>(kv_heads* rows)};

  explicit Memory(Random& random) {
    for (std::int8_t& quant : data) {
      quant = static_cast<std::int8_t>(static_cast<int>(random.below(256)) - 128);
    }
    for (std::size_t i = 0; i < kv_heads * rows; ++i) {
      for (const std::size_t part : {0U, 2U}) {
        parameters[part][i] = 0.01F + 0.02F * std::abs(random.gaussian());
        parameters[part + 1][i] = static_cast<float>(random.below(100)) - 50.0F;
      }
    }
  }
  Int8Kv view() {
    const std::span<std::int8_t> all(data);
    return {{all.first(data.size() / 2), parameters[0], parameters[1]},
            {all.last(data.size() / 2), parameters[2], parameters[3]},
            kv_shape,
            layout::head_token_dim};
  }
  float key(std::size_t head, std::size_t row, std::size_t e) const {
    const std::size_t at = head * rows + row;
    return parameters[0][at] * (static_cast<float>(data[at * head_dim + e]) - parameters[1][at]);
  }
  float value(std::size_t head, std::size_t row, std::size_t e) const {
    const std::size_t at = head * rows + row;
    return parameters[2][at] *
           (static_cast<float>(data[data.size() / 2 + at * head_dim + e]) - parameters[3][at]);
  }
  Bytes row(std::size_t head, std::size_t index) const {
    const std::size_t at = head * rows + index;
    Bytes bytes;
    add_bytes(bytes, data.data() + at * head_dim, head_dim);
    add_bytes(bytes, data.data() + data.size() / 2 + at * head_dim, head_dim);
    for (const auto& part : parameters) {
      add_bytes(bytes, &part[at], 1);
    }
    return bytes;
  }
};

/// The rows of `view` that a method keeps.
template <class V>
Selection selected(Method method, const Layer<float>& layer, const V& view) {
  const MethodSettings settings{
      .budget = Budget::tokens_per_layer(capacity),
      .heads = HeadRanking{layer.ranking},
      .scores = HeadScores(1, 6, std::vector<std::vector<double>>(6, {0.5})),
      .statistics = reference::query_statistics(layer.shape),
      .output_weights = reference::output_weights(layer.shape),
      .kv_scores = HeadScores(1, kv_heads, std::vector<std::vector<double>>(kv_heads, {0.5})),
      .model_heads = 4,
      .lag = 16};
  Selection selection;
  reference::with_arriving_method(
      method, settings, [&](const auto& scorer, const auto& selector, const auto& allocator) {
        const Plan plan{layer.shape, scorer, selector, allocator};
        Compressor compressor{plan};
        compressor.begin(rows);
        selection = compressor.select(0, compressor.score(0, view, layer.observation()));
      });
  return selection;
}

template <class T>
struct StoredTypesMethods : testing::Test {};
using Types = testing::Types<float, half, bfloat16, BlockQ8_0, BlockQ4_0, AffineInt8>;
TYPED_TEST_SUITE(StoredTypesMethods, Types);

TYPED_TEST(StoredTypesMethods, KeepWhatTheyKeepOfTheDecodedCache) {
  // A query for every row: methods that look at fewer take the last.
  Layer<float> layer({.group = 3,
                      .kv_heads = kv_heads,
                      .head_dim = head_dim,
                      .rows = rows,
                      .capacity = capacity,
                      .extra_queries = rows - 8,
                      .seed = 9});
  Random random(31);
  const Memory<TypeParam> original(random);
  for (std::size_t head = 0; head < kv_heads; ++head) {
    for (std::size_t row = 0; row < rows; ++row) {
      for (std::size_t e = 0; e < head_dim; ++e) {
        layer.cache.keys[layer.cache.at(head, row, e)] = original.key(head, row, e);
        layer.cache.values[layer.cache.value_at(head, row, e)] = original.value(head, row, e);
      }
    }
  }
  Compressor compressor{layer.plan};
  for (const MethodInfo& method : methods) {
    if (method.method == Method::full || method.repeats || method.needs_surrogate) {
      continue;
    }
    SCOPED_TRACE(method.name);
    Memory<TypeParam> memory = original;
    const Selection selection = selected(method.method, layer, memory.view());
    EXPECT_EQ(selection, selected(method.method, layer, layer.cache.view()));
    // Moving asks for no method, so that one compressor does it for all: less to compile.
    compressor.begin(rows);
    const Retained& kept = compressor.compact(0, memory.view(), selection);
    for (std::size_t head = 0; head < kv_heads; ++head) {
      std::size_t row = 0;
      for (const std::uint32_t from : selection.rows(head)) {
        ASSERT_EQ(memory.row(head, row), original.row(head, from)) << "KV head " << head << " row " << row;
        ++row;
      }
    }
    EXPECT_EQ(kept.bytes_freed(), (rows - capacity) * kv_heads * original.row(0, 0).size());
  }
}

}  // namespace
}  // namespace compresskv
