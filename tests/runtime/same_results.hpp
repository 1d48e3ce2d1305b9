#pragma once

#include <gtest/gtest.h>

#include <compresskv/compresskv.hpp>
#include <compresskv/methods.hpp>
#include <compresskv/runtime/any_compressor.hpp>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <vector>

#include "reference/arriving_methods.hpp"
#include "reference/output_norms.hpp"
#include "reference/queries.hpp"
#include "reference/random.hpp"
#include "reference/stored.hpp"

// The door beside the compressor that is written down: two turns of a small model by every method, compared
// bit for bit.

namespace compresskv::reference {

inline constexpr ModelShape small_model{.layers = 3, .query_heads = 4, .kv_heads = 2, .head_dim = 64};
inline constexpr std::size_t first_turn = 150;
inline constexpr std::size_t second_turn = 190;
inline constexpr std::size_t allocated = 192;

template <class T>
std::vector<T> random_units(std::uint64_t seed, std::size_t count) {
  Random random(seed);
  std::vector<T> units(count);
  for (T& unit : units) {
    randomise(unit, random);
  }
  return units;
}

/// A layer's cache in two buffers, by a layout.
template <class K, class W, class KeyLayout, class ValueLayout>
struct StridedMemory {
  std::vector<K> keys;
  std::vector<W> values;
  std::vector<std::size_t> rows;
  KeyLayout key_layout;
  ValueLayout value_layout;

  StridedMemory(std::uint64_t seed, KeyLayout of_keys, ValueLayout of_values)
      : keys(random_units<K>(seed, allocated * small_model.kv_heads * 64 / elements_per_unit<K>())),
        values(random_units<W>(seed + 1, allocated * small_model.kv_heads * 64 / elements_per_unit<W>())),
        rows(small_model.kv_heads),
        key_layout(of_keys),
        value_layout(of_values) {}

  StridedKv<K, W> view() {
    return {
        keys.data(), values.data(),
        KvShape{
            .kv_heads = small_model.kv_heads, .head_dim = 64, .allocated_rows = allocated, .head_rows = rows},
        key_layout, value_layout};
  }
  bool same_bytes(const StridedMemory& other) const {
    return rows == other.rows &&
           std::memcmp(static_cast<const void*>(keys.data()), other.keys.data(), keys.size() * sizeof(K)) ==
               0 &&
           std::memcmp(static_cast<const void*>(values.data()), other.values.data(),
                       values.size() * sizeof(W)) == 0;
  }
};

/// In blocks of 16 rows, in any order.
template <class K, class W>
struct PagedMemory {
  std::vector<K> keys;
  std::vector<W> values;
  std::vector<std::size_t> rows;
  std::vector<std::int32_t> table = {7, 2, 9, 11, 0, 1, 4, 3, 5, 6, 8, 10};

  explicit PagedMemory(std::uint64_t seed)
      : keys(random_units<K>(seed, allocated * small_model.kv_heads * 64 / elements_per_unit<K>())),
        values(random_units<W>(seed + 1, allocated * small_model.kv_heads * 64 / elements_per_unit<W>())),
        rows(small_model.kv_heads) {}

  PagedKv<K, W> view() {
    return {keys, values,
            PagedShape{.kv_heads = small_model.kv_heads,
                       .head_dim = 64,
                       .block_rows = 16,
                       .pool_blocks = 12,
                       .head_rows = rows},
            table, layout::token_head_dim};
  }
  bool same_bytes(const PagedMemory& other) const {
    return rows == other.rows &&
           std::memcmp(static_cast<const void*>(keys.data()), other.keys.data(), keys.size() * sizeof(K)) ==
               0 &&
           std::memcmp(static_cast<const void*>(values.data()), other.values.data(),
                       values.size() * sizeof(W)) == 0;
  }
};

struct Int8Memory {
  static constexpr std::size_t head_rows = allocated * small_model.kv_heads;
  std::vector<std::int8_t> data = std::vector<std::int8_t>(2 * head_rows * 64);
  std::vector<std::vector<float>> parameters{4, std::vector<float>(head_rows)};
  std::vector<std::size_t> rows = std::vector<std::size_t>(small_model.kv_heads);

  explicit Int8Memory(std::uint64_t seed) {
    Random random(seed);
    for (std::int8_t& quant : data) {
      quant = static_cast<std::int8_t>(static_cast<int>(random.below(256)) - 128);
    }
    for (std::size_t i = 0; i < head_rows; ++i) {
      for (std::size_t part = 0; part < 4; ++part) {
        parameters[part][i] = 0.02F + 0.01F * random.gaussian();
      }
    }
  }
  Int8Kv view() {
    const std::span<std::int8_t> all(data);
    return {
        {all.first(data.size() / 2), parameters[0], parameters[1]},
        {all.last(data.size() / 2), parameters[2], parameters[3]},
        KvShape{
            .kv_heads = small_model.kv_heads, .head_dim = 64, .allocated_rows = allocated, .head_rows = rows},
        layout::head_token_dim};
  }
  bool same_bytes(const Int8Memory& other) const {
    return rows == other.rows && data == other.data && parameters == other.parameters;
  }
};

inline MethodSettings small_settings() {
  Random random(77);
  std::vector<std::vector<double>> scores(small_model.layers * small_model.query_heads);
  for (auto& runs : scores) {
    runs = {0.1 + static_cast<double>(random.below(100))};
  }
  return {
      .budget = Budget::tokens_per_layer(40),
      .heads = HeadRanking(std::vector<std::vector<std::uint32_t>>{{2, 0, 1, 3}, {1, 3, 0, 2}, {3, 2, 1, 0}}),
      .scores = HeadScores(small_model.layers, small_model.query_heads, scores),
      .statistics = query_statistics(small_model),
      .output_weights = output_weights(small_model),
      .kv_scores = HeadScores(
          small_model.layers, small_model.kv_heads,
          {scores.begin(),
           scores.begin() + static_cast<std::ptrdiff_t>(small_model.layers * small_model.kv_heads)}),
      .heads_per_layer = 2,
      .window = 8,
      .model_heads = 4,
      .lag = 16};
}

/// What happened to a model: its caches, and what each call said.
template <class M>
struct Model {
  std::vector<M> layers;
  std::vector<std::string> log;

  /// The layers that a call shrank: their rows are noted, and the call.
  template <class C>
  void shrink(const C& compressor, std::span<const std::size_t> changed) {
    std::string line;
    for (const std::size_t layer : changed) {
      const Retained& kept = compressor.retained(layer);
      line += "layer " + std::to_string(layer) + " frees " + std::to_string(kept.bytes_freed()) +
              " goes on at " + std::to_string(kept.next_position()) + ":";
      for (std::size_t head = 0; head < layers[layer].rows.size(); ++head) {
        layers[layer].rows[head] = kept.rows(head);
        for (const std::uint32_t position : kept.positions(head)) {
          line += " " + std::to_string(position);
        }
      }
    }
    log.push_back(line);
    line.clear();
    for (const std::size_t rows : compressor.capacities()) {
      line += " " + std::to_string(rows);
    }
    log.push_back(line);
  }

  void append(std::size_t count) {
    for (M& layer : layers) {
      for (std::size_t& rows : layer.rows) {
        rows += count;
      }
    }
  }

  void expect_same(const Model& other) const {
    EXPECT_EQ(log, other.log);
    for (std::size_t l = 0; l < layers.size(); ++l) {
      EXPECT_TRUE(layers[l].same_bytes(other.layers[l])) << "layer " << l;
    }
  }
};

/// Two turns, as `turn(compressor, model, tokens)` takes each.
template <class C, class M, class Turn>
void two_turns(C& compressor, Model<M>& model, Turn&& turn) {
  model.append(first_turn);
  compressor.begin(first_turn, {.keep_first = 2});
  turn(compressor, model, first_turn);
  model.append(second_turn - first_turn);
  compressor.begin_turn(second_turn);
  turn(compressor, model, second_turn - first_turn);
}

template <class M, class Observe>
Model<M> by_door(const MethodInfo& method, const Model<M>& original, Observe&& observe) {
  Model<M> model = original;
  AnyCompressor compressor{AnyPlan{small_model, method.name, small_settings()}};
  const auto views = [&](std::size_t layer) { return model.layers[layer].view(); };
  two_turns(compressor, model, [&](AnyCompressor& c, Model<M>& m, std::size_t queries) {
    for (std::size_t layer = 0; layer < small_model.layers; ++layer) {
      m.shrink(c, c.arrive(layer, views, observe(layer, queries)));
    }
    const auto last = c.finish(views);
    EXPECT_EQ(last.empty(), c.plan().reach() != Reach::all_layers);
    if (!last.empty()) {
      m.shrink(c, last);
    }
  });
  return model;
}

template <class M, class Observe>
Model<M> by_template(const MethodInfo& method, const Model<M>& original, Observe&& observe) {
  Model<M> model = original;
  reference::with_arriving_method(
      method.method, small_settings(), [&](const auto& scorer, const auto& selector, const auto& allocator) {
        const Plan plan{small_model, scorer, selector, allocator};
        using P = std::remove_const_t<decltype(plan)>;
        Compressor compressor{plan};
        const auto views = [&](std::size_t layer) { return model.layers[layer].view(); };
        two_turns(compressor, model, [&](auto& c, Model<M>& m, std::size_t queries) {
          for (std::size_t layer = 0; layer < small_model.layers; ++layer) {
            if constexpr (P::reach == Reach::own_layer) {
              c.compress(layer, views(layer), observe(layer, queries));
              m.shrink(c, std::span<const std::size_t>(&layer, 1));
            } else {
              m.shrink(c, c.arrive(layer, views, observe(layer, queries)));
            }
          }
          if constexpr (P::reach == Reach::all_layers) {
            m.shrink(c, c.finish(views));
          }
        });
      });
  return model;
}

/// Every method; `Q` are the elements of the queries.
template <class Q, class M>
void expect_same_results(const Model<M>& original) {
  const std::vector<Q> queries =
      random_units<Q>(5, small_model.layers * small_model.query_heads * first_turn * 64);
  const auto observe = [&](std::size_t layer, std::size_t count) {
    return QueryWindow<Q>(queries.data() + layer * small_model.query_heads * first_turn * 64,
                          {.query_heads = small_model.query_heads, .queries = count, .head_dim = 64},
                          {.head = first_turn * 64, .query = 64});
  };
  for (const MethodInfo& method : methods) {
    if (method.method == Method::full || method.repeats) {
      continue;
    }
    SCOPED_TRACE(method.name);
    const Model<M> expected = by_template(method, original, observe);
    ASSERT_FALSE(expected.layers[0].same_bytes(original.layers[0])) << "something moved";
    by_door(method, original, observe).expect_same(expected);
  }
}

}  // namespace compresskv::reference
