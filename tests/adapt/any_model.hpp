// What must hold in libllama whatever the model: the same checks for tiny ones of many families and for a
// real one.
#pragma once

#include <gtest/gtest.h>
#include <llama.h>

#include <algorithm>
#include <cmath>
#include <compresskv/adapt/llama_cpp.hpp>
#include <compresskv/core/budget.hpp>
#include <compresskv/kernel/key_rows.hpp>
#include <compresskv/kernel/pool.hpp>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "llama_fixture.hpp"
#include "reference/scores.hpp"

namespace adapt_test {

inline constexpr std::size_t prompt_tokens = 150;
inline constexpr std::size_t window = 8;

inline std::vector<llama_token> prompt_of(const llama_model* of, std::size_t count = prompt_tokens,
                                          std::uint32_t seed = 1) {
  const auto known = static_cast<std::uint32_t>(llama_vocab_n_tokens(llama_model_get_vocab(of)));
  return some_tokens(count, seed, (std::min)(known - 100, 20000U));
}

inline AnyPlan plan_of(const ModelShape& shape, std::string_view method, std::size_t rows) {
  return {shape, method, {.budget = compresskv::Budget::tokens_per_layer(rows), .window = window}};
}

/// Attention that a graph without flash attention gives the last `window` tokens of the one batch that is
/// decoded: its own softmax, which the adapter does not read. `[layer][head]` of `weights[query][cell]`.
class GraphAttention {
 public:
  explicit GraphAttention(const ModelShape& shape)
      : weights(shape.layers, std::vector<compresskv::reference::WindowAttention>(shape.query_heads)) {}

  void attach(llama_context_params& params) {
    params.cb_eval = &GraphAttention::call;
    params.cb_eval_user_data = this;
  }

  std::vector<std::vector<compresskv::reference::WindowAttention>> weights;

 private:
  static bool call(ggml_tensor* node, bool ask, void* object) {
    constexpr std::string_view name = "kq_soft_max-";
    if (!std::string_view(node->name).starts_with(name)) {
      return !ask;
    }
    if (!ask) {
      auto& self = *static_cast<GraphAttention*>(object);
      self.take(*node, static_cast<std::size_t>(std::atoi(node->name + name.size())));
    }
    return true;
  }

  void take(const ggml_tensor& node, std::size_t layer) {
    const auto cells = static_cast<std::size_t>(node.ne[0]);
    const auto tokens = static_cast<std::size_t>(node.ne[1]);
    std::vector<float> all(static_cast<std::size_t>(ggml_nelements(&node)));
    ggml_backend_tensor_get(&node, all.data(), 0, ggml_nbytes(&node));
    for (std::size_t head = 0; head < weights.at(layer).size(); ++head) {
      for (std::size_t token = tokens - window; token < tokens; ++token) {
        const auto row = all.begin() + static_cast<std::ptrdiff_t>((head * tokens + token) * cells);
        // Cells beyond those in use are there to fill up.
        weights[layer][head].weights.emplace_back(row, row + static_cast<std::ptrdiff_t>(tokens));
      }
    }
  }
};

/// Decoding after a compression that keeps all is decoding without one, bit for bit.
inline void expect_nothing_is_lost_where_all_is_kept(llama_model* of, ContextOptions options) {
  const ModelShape shape = llama_cpp::model_shape(of, options.type_k, options.type_v);
  llama_cpp::Observer observer{shape, window};
  options.micro_batch = 48;
  const Context context = make_context(of, &observer, options);
  llama_cpp::Sequence sequence{plan_of(shape, "full", 1), observer, {.context = context.get()}};
  sequence.read(prompt_of(of));
  const std::vector<std::uint8_t> before = state_of(context.get(), 0);
  const auto expected = greedy(context.get(), 0, 107, 8);
  sequence.truncate(prompt_tokens);
  ASSERT_EQ(state_of(context.get(), 0), before);
  const auto result = sequence.compress();
  EXPECT_EQ(result.rows_after, prompt_tokens);
  EXPECT_EQ(state_of(context.get(), 0), before);
  EXPECT_TRUE(greedy(context.get(), 0, 107, 8) == expected);
}

/// How far attention may lie from the graph's, relative to the heaviest weight of a query.
struct Tolerance {
  double plain = 1e-5;
  double flash_attention = 0.01;  // the layers below then compute in another order, and with halves
  bool observes_plain = true;     // attention without flash attention is observed, too
};

/// How far what was observed, over the keys of the state, is from the attention of the graph.
struct AttentionError {
  double largest = 0.0;
  double relative = 0.0;  // to the heaviest weight of a query
};

inline AttentionError attention_error(const GraphAttention& graph, const llama_cpp::Sequence& sequence,
                                      const llama_cpp::Observer& observer) {
  ModelShape shape = sequence.plan().shape();
  const bool some_slide = sequence.layers().size() < shape.layers;
  shape.layers = sequence.layers().size();
  std::vector<std::uint8_t> bytes = state_of(sequence.place().context, 0);
  using Second = llama_cpp::State::Second;
  const llama_cpp::State state(bytes, shape, some_slide ? Second::sliding : Second::none);
  AttentionError out;
  for (std::size_t layer = 0; layer < shape.layers; ++layer) {
    const auto queries = observer.queries(sequence.place(), sequence.layers()[layer]);
    for (std::size_t head = 0; head < shape.query_heads; ++head) {
      std::vector<float> keys;
      std::vector<float> buffer(shape.head_dim);
      compresskv::kernel::for_each_key(
          state.view(layer), head / (shape.query_heads / shape.kv_heads), buffer.data(),
          [&](std::size_t, const float* key) { keys.insert(keys.end(), key, key + shape.head_dim); });
      const auto run = queries.query_run(head);
      const auto seen = compresskv::reference::window_attention(
          [&](std::size_t row, std::size_t dim) { return keys[row * shape.head_dim + dim]; },
          [&](std::size_t i, std::size_t dim) { return run.row(i)[dim]; }, prompt_tokens, window,
          shape.head_dim, static_cast<double>(queries.scale()), std::numeric_limits<std::size_t>::max(),
          static_cast<double>(queries.sink_logit(head)), static_cast<double>(queries.soft_cap()));
      for (std::size_t i = 0; i < window; ++i) {
        const std::vector<double>& expected = graph.weights[sequence.layers()[layer]][head].weights[i];
        const double heaviest = *std::ranges::max_element(expected);
        for (std::size_t cell = 0; cell < prompt_tokens; ++cell) {
          const double error = std::abs(seen.weights[i][cell] - expected[cell]);
          out.largest = (std::max)(out.largest, error);
          out.relative = (std::max)(out.relative, error / heaviest);
        }
      }
    }
  }
  return out;
}

/// SnapKV as the slow reference makes it from the graph's attention: no evicted row is above a kept one, but
/// for what the weights are off.
inline void expect_kept_is_the_references(const GraphAttention& graph, const llama_cpp::Sequence& sequence,
                                          double weights_off) {
  const ModelShape& shape = sequence.plan().shape();
  const std::size_t group = shape.query_heads / shape.kv_heads;
  for (std::size_t layer = 0; layer < sequence.layers().size(); ++layer) {
    const auto& weights = graph.weights[sequence.layers()[layer]];
    for (std::size_t head = 0; head < shape.kv_heads; ++head) {
      std::vector<std::vector<double>> sums;
      for (std::size_t i = 0; i < group; ++i) {
        sums.push_back(compresskv::reference::window_sums(weights[head * group + i].weights));
      }
      std::vector<double> evicted =
          compresskv::reference::layer_scores(sums, compresskv::kernel::Pool::average, 5);
      double worst_kept = 1e9;
      for (const std::uint32_t position : sequence.compressor().retained(layer).positions(head)) {
        if (position < evicted.size()) {  // the window has no scores
          worst_kept = (std::min)(worst_kept, std::exchange(evicted[position], 0.0));
        }
      }
      EXPECT_GT(worst_kept, *std::ranges::max_element(evicted) - 2.0 * window * weights_off)
          << "layer " << layer << ", KV head " << head;
    }
  }
}

/// What the observer saw is the attention of the graph, and what SnapKV keeps is what the reference makes of
/// it.
inline void expect_observed_queries_are_the_graphs(llama_model* of, ggml_type keys,
                                                   const Tolerance& tolerance) {
  const ModelShape shape = llama_cpp::model_shape(of, keys, GGML_TYPE_F32);
  const ContextOptions plain{.flash_attention = false, .type_k = keys, .type_v = GGML_TYPE_F32};
  GraphAttention graph(shape);
  {
    llama_context_params params = context_params(plain);
    graph.attach(params);
    const Context context = make_context(of, params);
    std::vector<llama_token> tokens = prompt_of(of);
    ASSERT_EQ(llama_decode(context.get(), llama_batch_get_one(tokens.data(), prompt_tokens)), 0);
  }
  for (const bool flash_attention : {false, true}) {
    if (flash_attention && keys != GGML_TYPE_F32) {
      continue;  // libllama wants values of the same type
    }
    if (!flash_attention && !tolerance.observes_plain) {
      continue;
    }
    SCOPED_TRACE(flash_attention ? "flash attention" : "plain attention");
    llama_cpp::Observer observer{shape, window};
    ContextOptions options = plain;
    options.flash_attention = flash_attention;
    options.micro_batch = 48;  // the last one has 6 tokens
    const Context context = make_context(of, &observer, options);
    llama_cpp::Sequence sequence{plan_of(shape, "snapkv", 40), observer, {.context = context.get()}};
    sequence.read(prompt_of(of));
    ASSERT_EQ(observer.seen(sequence.place(), prompt_tokens), window);
    const AttentionError error = attention_error(graph, sequence, observer);
    EXPECT_LT(error.relative, flash_attention ? tolerance.flash_attention : tolerance.plain);
    EXPECT_EQ(sequence.compress().rows_after, 40U);
    expect_kept_is_the_references(graph, sequence, error.largest);
  }
}

/// Decoding from the rows that are left is decoding with the others removed by libllama itself.
/// `tolerance` is relative to the largest logit: cells lie elsewhere, so sums round otherwise.
inline void expect_decoding_sees_what_is_kept(llama_model* of, const ContextOptions& options,
                                              double tolerance = 1e-2) {
  const ModelShape shape = llama_cpp::model_shape(of, options.type_k, options.type_v);
  llama_cpp::Observer observer{shape, window};
  const Context context = make_context(of, &observer, options);
  const Context other = make_context(of, nullptr, options);
  llama_cpp::Sequence sequence{plan_of(shape, "streaming", 40), observer, {.context = context.get()}};
  sequence.read(prompt_of(of));
  std::vector<llama_token> tokens = prompt_of(of);
  ASSERT_EQ(llama_decode(other.get(), llama_batch_get_one(tokens.data(), prompt_tokens)), 0);
  sequence.compress();
  const llama_memory_t memory = llama_get_memory(other.get());
  const auto whole = decode_one(other.get(), 0, 107);
  llama_memory_seq_rm(memory, 0, prompt_tokens, -1);
  const compresskv::Retained& kept = sequence.compressor().retained(0);
  llama_pos next = 0;
  for (const std::uint32_t position : kept.positions(0)) {
    llama_memory_seq_rm(memory, 0, next, static_cast<llama_pos>(position));
    next = static_cast<llama_pos>(position) + 1;
  }
  const auto expected = decode_one(other.get(), 0, 107);
  const auto logits = decode_one(context.get(), 0, 107);
  double largest = 0.0;
  double error = 0.0;
  double eviction = 0.0;
  for (std::size_t i = 0; i < logits.size(); ++i) {
    largest = (std::max)(largest, static_cast<double>(std::abs(expected[i])));
    error = (std::max)(error, static_cast<double>(std::abs(expected[i] - logits[i])));
    eviction = (std::max)(eviction, static_cast<double>(std::abs(expected[i] - whole[i])));
  }
  EXPECT_LT(error, tolerance * largest);
  EXPECT_GT(eviction, 3 * error) << "the evicted rows made no difference";
}

/// Every method that leaves all layers and heads equal rows and wants no calibration, over two turns.
inline void expect_methods_go_on(llama_model* of, ContextOptions options) {
  options.sequences = 2;
  options.cells = 1024;
  const ModelShape shape = llama_cpp::model_shape(of, options.type_k, options.type_v);
  llama_cpp::Observer observer{shape, window};
  const Context context = make_context(of, &observer, options);
  const llama_cpp::Place read{.context = context.get()};
  const llama_cpp::Place copied{.context = context.get(), .sequence = 1};
  llama_cpp::Sequence{plan_of(shape, "full", 1), observer, read}.read(prompt_of(of));
  for (const char* method :
       {"snapkv", "tova", "streaming", "random", "knorm", "keydiff", "lagkv", "cur", "chunkkv"}) {
    llama_memory_seq_cp(llama_get_memory(context.get()), 0, 1, -1, -1);
    observer.copy(read, copied);
    llama_cpp::Sequence sequence{plan_of(shape, method, 30), observer, copied};
    EXPECT_EQ(sequence.compress().rows_after, 30U) << method;
    sequence.read(prompt_of(of, 20, 2));
    EXPECT_EQ(sequence.compress().rows_before, 50U) << method;
    for (const auto& logits : greedy(context.get(), 1, 107, 4)) {
      EXPECT_TRUE(std::ranges::all_of(logits, [](float x) { return std::isfinite(x); })) << method;
    }
    EXPECT_EQ(sequence.next_position(), prompt_tokens + 24) << method;
    llama_memory_seq_rm(llama_get_memory(context.get()), 1, -1, -1);
  }
}

}  // namespace adapt_test
