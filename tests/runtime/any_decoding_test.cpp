// Every method by its name as a budget while decoding: it holds its rows however long the answer becomes, or
// is refused by a message that says why.

#include <gtest/gtest.h>

#include <algorithm>
#include <compresskv/method_settings.hpp>
#include <compresskv/runtime/any_compressor.hpp>
#include <compresskv/view/recent_queries.hpp>
#include <compresskv/view/strided_kv.hpp>
#include <cstddef>
#include <map>
#include <numeric>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "reference/hidden_states.hpp"
#include "reference/output_norms.hpp"
#include "reference/queries.hpp"
#include "reference/random.hpp"

namespace compresskv {
namespace {

constexpr ModelShape decoding_model{.layers = 3, .query_heads = 4, .kv_heads = 2, .head_dim = 16};
constexpr std::size_t prompt_length = 100;
constexpr std::size_t generated = 400;
constexpr std::size_t every = 16;
constexpr std::size_t budget_rows = 48;
constexpr std::size_t room = prompt_length + generated;  // some methods let a KV head keep all

/// A layer of an engine: [kv_head][room][head_dim], and the queries of its last tokens.
struct DecodingLayer {
  static constexpr std::size_t head_floats = room * decoding_model.head_dim;

  std::vector<float> keys = std::vector<float>(decoding_model.kv_heads * head_floats);
  std::vector<float> values = keys;
  std::vector<std::size_t> rows = std::vector<std::size_t>(decoding_model.kv_heads, 0);
  RecentQueries<float> recent;

  explicit DecodingLayer(std::size_t window)
      : recent({.query_heads = decoding_model.query_heads,
                .queries = window,
                .head_dim = decoding_model.head_dim}) {}

  /// The first element of a value is the token's position.
  void append(std::size_t position, reference::Random& random) {
    for (std::size_t head = 0; head < rows.size(); ++head) {
      const std::size_t at = head * head_floats + rows[head]++ * decoding_model.head_dim;
      for (std::size_t i = 0; i < decoding_model.head_dim; ++i) {
        keys[at + i] = random.gaussian();
        values[at + i] = i == 0 ? static_cast<float>(position) : random.gaussian();
      }
    }
    std::vector<float> queries(decoding_model.query_heads * decoding_model.head_dim);
    std::ranges::generate(queries, [&] { return random.gaussian(); });
    recent.append(queries.data(), 1, {.head = decoding_model.head_dim, .query = decoding_model.head_dim});
  }

  AnyKv view() {
    return AnyKv(StridedKv<float>(keys.data(), values.data(),
                                  KvShape{.kv_heads = decoding_model.kv_heads,
                                          .head_dim = decoding_model.head_dim,
                                          .allocated_rows = room,
                                          .head_rows = rows},
                                  layout::head_token_dim));
  }
};

MethodSettings decoding_settings() {
  return {.budget = Budget::tokens_per_layer(budget_rows),
          .heads = HeadRanking{std::vector<std::vector<std::uint32_t>>(3, {3, 1, 0, 2})},
          .scores = HeadScores(3, 4, std::vector<std::vector<double>>(12, {0.5})),
          .statistics = reference::query_statistics(decoding_model),
          .output_weights = reference::output_weights(decoding_model),
          .kv_scores = HeadScores(3, 2, std::vector<std::vector<double>>(6, {0.5})),
          .surrogate = reference::surrogate(decoding_model, 64),
          .model_heads = 4,
          .lag = 16,
          .head_sinks = 4,
          .head_recent = 12};
}

std::size_t rows_of(const std::vector<DecodingLayer>& layers) {
  std::size_t rows = 0;
  for (const DecodingLayer& layer : layers) {
    rows += std::accumulate(layer.rows.begin(), layer.rows.end(), std::size_t{0});
  }
  return rows;
}

/// Generates with a compression after every `every` tokens. `queries`: of the last tokens, as many are kept.
void decode_on_budget(Method method, std::size_t queries) {
  AnyCompressor compressor{AnyPlan{decoding_model, method, decoding_settings()}};
  std::vector<DecodingLayer> layers(decoding_model.layers, DecodingLayer(queries));
  reference::Random random(5);
  std::size_t next = 0;
  const auto append = [&] {
    for (DecodingLayer& layer : layers) {
      layer.append(next, random);
    }
    ++next;
  };
  const auto views = [&](std::size_t layer) { return layers[layer].view(); };
  const auto note = [&](std::span<const std::size_t> changed) {
    for (const std::size_t l : changed) {
      for (std::size_t head = 0; head < decoding_model.kv_heads; ++head) {
        const Retained& kept = compressor.retained(l);
        layers[l].rows[head] = kept.rows(head);
        std::size_t row = 0;
        for (const std::uint32_t position : kept.positions(head)) {
          ASSERT_EQ(layers[l].values[head * DecodingLayer::head_floats + row++ * decoding_model.head_dim],
                    static_cast<float>(position));
        }
      }
    }
  };
  const auto compress = [&] {
    for (std::size_t l = 0; l < layers.size(); ++l) {
      note(compressor.arrive(l, views, AnyObservation(layers[l].recent.view())));
    }
    note(compressor.finish(views));
  };
  while (next < prompt_length) {
    append();
  }
  compressor.begin(prompt_length);
  compress();
  for (std::size_t step = 1; step <= generated; ++step) {
    append();
    if (step % every == 0) {
      compressor.begin_turn(next);
      compress();
      if (method == Method::full) {
        return;
      }
      ASSERT_EQ(rows_of(layers), budget_rows * decoding_model.layers * decoding_model.kv_heads) << next;
      for (const DecodingLayer& layer : layers) {
        for (std::size_t head = 0; head < decoding_model.kv_heads; ++head) {
          const float* const last = layer.values.data() + head * DecodingLayer::head_floats +
                                    (layer.rows[head] - 1) * decoding_model.head_dim;
          ASSERT_EQ(*last, static_cast<float>(next - 1)) << "the token just generated stays";
        }
      }
    }
  }
}

TEST(AnyDecoding, EachMethodKeepsItsRowsOrSaysWhyNot) {
  const std::map<Method, std::string> refused = {{Method::kvzip, "repeat the context"},
                                                 {Method::kvzip_plus, "repeat the context"},
                                                 {Method::h2o, "queries"},
                                                 {Method::kvzap, "give HiddenStates"}};
  for (const MethodInfo& row : methods) {
    SCOPED_TRACE(row.name);
    const auto why = refused.find(row.method);
    try {
      decode_on_budget(row.method, row.window);
      EXPECT_TRUE(why == refused.end()) << "it runs";
    } catch (const ArgumentError& error) {
      ASSERT_TRUE(why != refused.end()) << error.what();
      EXPECT_NE(std::string_view(error.what()).find(why->second), std::string_view::npos) << error.what();
    }
  }
}

}  // namespace
}  // namespace compresskv
