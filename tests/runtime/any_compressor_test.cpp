// The door itself: what can be asked and given, wrong calls by their messages, copies, steps, allocations.

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <compresskv/budget/uniform.hpp>
#include <compresskv/compressor.hpp>
#include <compresskv/plan.hpp>
#include <compresskv/runtime/any_compressor.hpp>
#include <compresskv/score/kv_zip.hpp>
#include <compresskv/select/whole_model.hpp>
#include <compresskv/view/attention_matrix.hpp>
#include <compresskv/view/query_window.hpp>
#include <compresskv/view/strided_kv.hpp>
#include <cstddef>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <thread>
#include <vector>

#include "reference/allocations.hpp"
#include "reference/output_norms.hpp"
#include "reference/queries.hpp"
#include "reference/random.hpp"

namespace compresskv {
namespace {

constexpr ModelShape shape{.layers = 3, .query_heads = 4, .kv_heads = 2, .head_dim = 16};
constexpr std::size_t tokens = 100;

/// A small model in float.
struct Cache {
  std::vector<float> keys = random(1, shape.layers* shape.kv_heads* tokens* shape.head_dim);
  std::vector<float> values = random(2, shape.layers* shape.kv_heads* tokens* shape.head_dim);
  std::vector<float> queries = random(3, shape.layers* shape.query_heads* tokens* shape.head_dim);
  std::array<std::array<std::size_t, 2>, 3> rows = {{{tokens, tokens}, {tokens, tokens}, {tokens, tokens}}};

  static std::vector<float> random(std::uint64_t seed, std::size_t count) {
    reference::Random random(seed);
    std::vector<float> numbers(count);
    std::generate(numbers.begin(), numbers.end(), [&] { return random.gaussian(); });
    return numbers;
  }

  template <class E = float>
  StridedKv<E> view(std::size_t layer) {
    const std::size_t first = layer * shape.kv_heads * tokens * shape.head_dim;
    return {keys.data() + first, values.data() + first,
            KvShape{.kv_heads = 2, .head_dim = 16, .allocated_rows = tokens, .head_rows = rows[layer]},
            layout::head_token_dim};
  }
  QueryWindow<float> observation(std::size_t layer, std::size_t count = tokens) const {
    return {queries.data() + layer * shape.query_heads * tokens * shape.head_dim,
            {.query_heads = 4, .queries = count, .head_dim = 16}};
  }
  void note(const AnyCompressor& compressor, std::span<const std::size_t> changed) {
    for (const std::size_t layer : changed) {
      for (std::size_t head = 0; head < 2; ++head) {
        rows[layer][head] = compressor.retained(layer).rows(head);
      }
    }
  }
  void sequence(AnyCompressor& compressor) {
    for (auto& heads : rows) {
      heads = {tokens, tokens};
    }
    const auto views = [&](std::size_t layer) { return view(layer); };
    compressor.begin(tokens);
    for (std::size_t layer = 0; layer < shape.layers; ++layer) {
      note(compressor, compressor.arrive(layer, views, observation(layer)));
    }
    note(compressor, compressor.finish(views));
  }
  bool operator==(const Cache&) const = default;
};

MethodSettings settings() {
  const std::vector<std::uint32_t> heads = {0, 1, 2, 3};
  return {
      .budget = Budget::tokens_per_layer(24),
      .heads = HeadRanking(std::vector<std::vector<std::uint32_t>>(3, heads)),
      .scores = HeadScores(3, 4, std::vector<std::vector<double>>(12, {0.5})),
      .statistics = reference::query_statistics(shape),
      .output_weights = reference::output_weights(shape),
      .kv_scores = HeadScores(3, shape.kv_heads, std::vector<std::vector<double>>(3 * shape.kv_heads, {0.5})),
      .model_heads = 4};
}

template <class F>
std::string message_of(F&& f) {
  try {
    f();
  } catch (const ArgumentError& error) {
    return error.what();
  }
  return "nothing was thrown";
}

#define EXPECT_SAYS(statement, part) \
  EXPECT_NE(message_of([&] { statement; }).find(part), std::string::npos) << message_of([&] { statement; })

TEST(AnyCompressor, AllocatesNothingFromTheSecondSequenceOn) {
  for (const MethodInfo& method : methods) {
    if (method.repeats) {
      continue;  // it has no arrive()
    }
    SCOPED_TRACE(method.name);
    Cache cache;
    AnyCompressor compressor{AnyPlan{shape, method.name, settings()}};
    cache.sequence(compressor);
    const std::size_t before = reference::allocations;
    cache.sequence(compressor);
    EXPECT_EQ(reference::allocations - before, 0U);
    EXPECT_GT(compressor.memory_bytes(), 0U);
  }
}

TEST(AnyCompressor, KeepsAllWhereTheMethodIsFull) {
  Cache cache;
  const Cache original = cache;
  AnyCompressor compressor{AnyPlan{shape, Method::full}};
  cache.sequence(compressor);
  EXPECT_EQ(cache, original);
  EXPECT_EQ(compressor.retained(2).rows(), tokens);
  EXPECT_EQ(compressor.retained(2).next_position(), tokens);
  EXPECT_EQ(compressor.plan().needs(), Needs::nothing);
  EXPECT_SAYS(compressor.score(0, cache.view(0)), "method full keeps every row");
  compressor.begin_turn(tokens + 5);
  EXPECT_EQ(compressor.held(tokens + 5).rows(1), tokens + 5);
}

TEST(AnyCompressor, LeavesAllAsItWasWhereMemoryRunsOut) {
  for (const MethodInfo& method : methods) {
    if (method.repeats) {
      continue;  // it has no arrive()
    }
    SCOPED_TRACE(method.name);
    Cache expected;
    AnyCompressor first{AnyPlan{shape, method.name, settings()}};
    expected.sequence(first);
    std::size_t failed = 0;
    for (std::size_t fail = 1;; fail += 3) {
      Cache cache;
      const Cache original = cache;
      AnyCompressor compressor{AnyPlan{shape, method.name, settings()}};
      compressor.begin(tokens);
      const auto views = [&](std::size_t layer) { return cache.view(layer); };
      reference::failing_allocation = reference::allocations + fail;
      bool threw = false;
      try {
        const auto changed = compressor.arrive(0, views, cache.observation(0));
        reference::failing_allocation = 0;
        cache.note(compressor, changed);
      } catch (const std::bad_alloc&) {
        threw = true;
      }
      reference::failing_allocation = 0;
      if (!threw) {
        break;
      }
      ++failed;
      ASSERT_EQ(cache, original);
      cache.sequence(compressor);
      ASSERT_EQ(cache, expected);
    }
    EXPECT_GT(failed, 0U);
  }
}

TEST(AnyCompressor, RepeatsAreShownAsTheCompressorTakesThem) {
  constexpr std::size_t context = 80;  // the rows behind it repeat it
  const auto run = [&](auto& compressor, Cache& cache, auto&& shown) {
    compressor.begin(context);
    for (std::size_t layer = 0; layer < shape.layers; ++layer) {
      compressor.observe(layer, cache.view(layer), {.first = 0, .last = context}, shown(layer));
      cache.rows[layer] = {context, context};
    }
    compressor.finish([&](std::size_t layer) { return cache.view(layer); });
  };
  Cache by_name;
  AnyCompressor any{AnyPlan{shape, "kvzip", settings()}};
  EXPECT_EQ(any.plan().needs(), Needs::repeats);
  EXPECT_EQ(any.plan().reach(), Reach::all_layers);
  EXPECT_EQ(any.plan().window(), 1U);
  any.begin(context);
  const auto views = [&](std::size_t layer) { return by_name.view(layer); };
  EXPECT_SAYS(any.arrive(0, views, by_name.observation(0)), "method kvzip is shown tokens that repeat");
  EXPECT_SAYS(any.score(0, by_name.view(0), by_name.observation(0)), "call observe()");
  EXPECT_SAYS(any.observe(0, by_name.view(0), {.first = 0, .last = context}, {}),
              "by its queries: give a QueryWindow");
  AnyCompressor other{AnyPlan{shape, "snapkv", settings()}};
  other.begin(context);
  EXPECT_SAYS(other.observe(0, by_name.view(0), {.first = 0, .last = context}, by_name.observation(0, 20)),
              "method snapkv does not ask for the context to be repeated");
  run(any, by_name, [&](std::size_t layer) { return AnyObservation(by_name.observation(layer, 20)); });

  Cache by_type;
  const Plan plan{shape, score::KvZip{}, select::WholeModel{}, budget::Uniform{Budget::tokens_per_layer(24)}};
  Compressor compressor{plan};
  run(compressor, by_type, [&](std::size_t layer) { return by_type.observation(layer, 20); });
  EXPECT_EQ(by_name.keys, by_type.keys);
  std::size_t kept = 0;
  for (std::size_t layer = 0; layer < shape.layers; ++layer) {
    for (std::size_t head = 0; head < 2; ++head) {
      const auto& a = any.retained(layer).positions(head);
      const auto& b = compressor.retained(layer).positions(head);
      EXPECT_TRUE(std::equal(a.begin(), a.end(), b.begin(), b.end()));
      kept += a.size();
    }
  }
  EXPECT_EQ(kept, 24U * 2 * shape.layers);
}

TEST(AnyCompressor, StepsDoWhatArriveDoes) {
  for (const MethodInfo& method : methods) {
    const AnyPlan plan{shape, method.method, settings()};
    if (plan.reach() != Reach::own_layer || method.method == Method::full) {
      continue;
    }
    SCOPED_TRACE(method.name);
    Cache whole;
    AnyCompressor compressor{plan};
    whole.sequence(compressor);
    Cache parts;
    Cache elsewhere;
    AnyCompressor by_steps{plan};
    by_steps.begin(tokens);
    for (std::size_t layer = 0; layer < shape.layers; ++layer) {
      const AnyScores scores = by_steps.score(layer, parts.view(layer), parts.observation(layer));
      EXPECT_EQ(scores.rows(), scores.granularity() == Granularity::layer ? 1U : 2U);
      const Selection selection = by_steps.select(layer, scores);
      AnyCompressor copy = by_steps;
      copy.gather(layer, parts.view<const float>(layer), selection, elsewhere.view(layer));
      by_steps.compact(layer, parts.view(layer), selection);
      const std::array changed{layer};
      parts.note(by_steps, changed);
      elsewhere.note(copy, changed);
    }
    EXPECT_EQ(parts, whole);
    for (std::size_t layer = 0; layer < shape.layers; ++layer) {
      for (std::size_t head = 0; head < 2; ++head) {
        const float* a = elsewhere.view(layer).key_run(head, 0).base;
        EXPECT_TRUE(std::equal(a, a + whole.rows[layer][head] * 16, whole.view(layer).key_run(head, 0).base));
      }
    }
  }
}

TEST(AnyCompressor, TakesWhatShowsTheWindow) {
  Cache cache;
  const std::vector<float> attention(4 * 8 * tokens, 0.01F);
  const AttentionShape attention_shape{.query_heads = 4, .queries = 8, .tokens = tokens};
  const AttentionMatrix matrix{attention.data(), attention_shape};
  const AttentionSums sums{attention.data(), attention_shape};
  const auto views = [&](std::size_t layer) { return cache.view(layer); };
  AnyCompressor snapkv{AnyPlan{shape, "snapkv", settings()}};
  snapkv.begin(tokens);
  EXPECT_EQ(snapkv.select(0, sums).rows().size(), 24U);
  EXPECT_EQ(snapkv.score(1, matrix).tokens(0), tokens - 8);
  snapkv.arrive(0, views, sums);
  snapkv.arrive(1, views, matrix);
  EXPECT_EQ(snapkv.retained(0).rows(), 24U);
  EXPECT_EQ(snapkv.retained(1).rows(), 24U);
  EXPECT_SAYS(snapkv.arrive(2, views), "method snapkv needs the window's attention");
  EXPECT_SAYS(snapkv.select(2, cache.observation(2)), "nor the keys that complete queries");
  AnyCompressor cake{AnyPlan{shape, "cake", settings()}};
  cake.begin(tokens);
  EXPECT_SAYS(cake.arrive(0, views, sums), "method cake needs the window's rows apart");
  AnyCompressor rkv{AnyPlan{shape, "rkv", settings()}};
  EXPECT_EQ(rkv.plan().needs(), Needs::window_queries);
  rkv.begin(tokens);
  EXPECT_SAYS(rkv.arrive(0, views), "method rkv compares logits");
  EXPECT_SAYS(rkv.arrive(0, views, matrix), "give the window's queries, a QueryWindow");
  EXPECT_SAYS(rkv.score(0, cache.view(0), sums), "method rkv compares logits");
  EXPECT_SAYS(rkv.select(0, matrix), "method rkv reads the keys");
  AnyCompressor knorm{AnyPlan{shape, "knorm", settings()}};
  knorm.begin(tokens);
  EXPECT_SAYS(knorm.select(2, sums), "method knorm reads the keys");
  AnyCompressor expected{AnyPlan{shape, "expected-attention", settings()}};
  expected.begin(tokens);
  EXPECT_SAYS(expected.select(2, sums), "method expected-attention reads keys and values");
  knorm.arrive(2, views);
  EXPECT_EQ(knorm.retained(2).rows(), 24U);
}

TEST(AnyCompressor, SaysWhatDoesNotFit) {
  Cache cache;
  EXPECT_SAYS((AnyPlan{shape, "snapvk"}), "method is 'snapvk', must be one of full, compresskv");
  EXPECT_SAYS((AnyPlan{shape, "compresskv"}), "needs a head ranking");
  EXPECT_SAYS((AnyPlan{shape, "snapkv", {.budget = Budget::tokens_per_layer(2)}}), "the window alone is 8");
  EXPECT_SAYS((AnyPlan{shape, "cake", settings(), {.share_rows = [](auto, auto, auto) {}}}),
              "it takes no share_rows");
  AnyCompressor compressor{AnyPlan{shape, "knorm", settings()}};
  compressor.begin(tokens);
  bool asked = false;
  const auto views = [&](std::size_t layer) {
    asked = true;
    return cache.view(layer);
  };
  EXPECT_SAYS(compressor.arrive(3, views), "layer is 3, the model has layers 0 to 2");
  EXPECT_FALSE(asked);
  const auto read_only = [&](std::size_t layer) { return cache.view<const float>(layer); };
  EXPECT_SAYS(compressor.arrive(0, read_only), "the view's elements are const");
  AnyCompressor cur{AnyPlan{shape, "cur", settings()}};
  cur.begin(tokens);
  EXPECT_EQ(cur.plan().needs(), Needs::keys_and_values);
  EXPECT_SAYS(cur.select(0, AnyObservation(cache.observation(0))),
              "method cur reads keys and values: give the layer's view as well");
  EXPECT_SAYS(compressor.select(0, AnyObservation(cache.observation(0))), "method knorm reads the keys: ");
  AnyCompressor tova{AnyPlan{shape, "tova", settings()}};
  tova.begin(tokens);
  EXPECT_SAYS(tova.select(0, compressor.score(0, cache.view(0))), "scores are those of KV heads");
  std::vector<half> halves(2 * tokens * 16);
  const StridedKv other{halves, halves, KvShape{.kv_heads = 2, .rows = tokens, .head_dim = 16},
                        layout::head_token_dim};
  EXPECT_SAYS(
      compressor.gather(0, cache.view(0), compressor.select(0, compressor.score(0, cache.view(0))), other),
      "of float16 and float16, the source of float32 and float32");
  std::vector<BlockQ8_0> blocks(2 * tokens);
  AnyCompressor quantised{
      AnyPlan{{.layers = 1, .query_heads = 4, .kv_heads = 2, .head_dim = 32}, Method::full}};
  quantised.begin(tokens);
  const StridedKv q8{blocks, blocks, KvShape{.kv_heads = 2, .rows = tokens, .head_dim = 32},
                     layout::head_token_dim};
  EXPECT_SAYS(quantised.rerotate(0, q8, {}), "keys are Q8_0: only plain keys can be turned");
  compressor.arrive(0, views);
  const std::array first{std::size_t{0}};
  cache.note(compressor, first);
  EXPECT_EQ(compressor.rerotate(0, cache.view(0), {}).next_position(), 24U);
}

TEST(AnyCompressor, CopiesGoOnOnTheirOwn) {
  Cache cache;
  AnyCompressor compressor{AnyPlan{shape, "random", settings()}};
  cache.sequence(compressor);
  AnyCompressor beam = compressor;
  beam.truncate(50);
  EXPECT_EQ(compressor.retained(0).next_position(), tokens);
  EXPECT_EQ(beam.retained(0).next_position(), 50U);
  AnyCompressor other{AnyPlan{shape, "full"}};
  other = beam;
  EXPECT_EQ(other.plan().method().name, "random");
  EXPECT_EQ(other.retained(0).next_position(), 50U);
  AnyCompressor moved = std::move(beam);
  EXPECT_EQ(moved.retained(0).next_position(), 50U);
}

TEST(AnyCompressor, EnginesShareRowsOutTheirOwnWay) {
  Cache cache;
  const auto first_layer_more = [](ShareRows own, const budget::Allowance& allowance,
                                   std::span<std::size_t> capacities) {
    own(allowance, capacities);
    capacities[0] += 10;
  };
  AnyCompressor compressor{AnyPlan{shape, "streaming", settings(), {.share_rows = first_layer_more}}};
  cache.sequence(compressor);
  EXPECT_EQ(compressor.retained(0).rows(), 34U);
  EXPECT_EQ(compressor.retained(1).rows(), 24U);
}

TEST(AnyCompressor, PlansForSomeLayersAreThoseOfAModelOfTheseAlone) {
  const std::vector<std::vector<std::uint32_t>> heads = {{3, 1, 0, 2}, {0, 1, 2, 3}, {2, 1, 0, 3}};
  std::vector<std::vector<double>> runs;
  for (int i = 0; i < 12; ++i) {
    runs.push_back({0.1 * ((i * 7) % 12), 0.3});
  }
  const std::vector<double> errors = {0.2, 0.3, 0.5};
  MethodSettings all = settings();
  all.heads = HeadRanking(heads);
  all.scores = HeadScores(3, 4, runs);
  all.errors = LayerErrors(errors, {{.name = "set", .errors = errors}});
  all.heads_per_layer = 2;
  all.hold_layers = 2;
  all.model_heads = 12;
  MethodSettings two = all;
  two.hold_layers = 1;
  two.model_heads = 8;
  two.heads = HeadRanking({heads[0], heads[2]});
  runs.erase(runs.begin() + 4, runs.begin() + 8);
  two.scores = HeadScores(2, 4, runs);
  two.statistics = reference::query_statistics(shape).of_layers(std::array<std::size_t, 2>{0, 2});
  two.output_weights = all.output_weights->of_layers(std::array<std::size_t, 2>{0, 2});
  two.errors = LayerErrors({0.2, 0.5}, {{.name = "set", .errors = {0.2, 0.5}}});
  ModelShape less = shape;
  less.layers = 2;
  const std::array<std::size_t, 2> layers = {0, 2};
  for (const char* method : {"full", "compresskv", "compresskv-grouped", "snapkv", "carried", "model-wide",
                             "expected-attention", "criticalkv"}) {
    const AnyPlan plan = AnyPlan{shape, method, all}.of_layers(layers);
    EXPECT_EQ(plan.shape().layers, 2U);
    EXPECT_EQ(plan.method().name, method);
    std::vector<std::vector<std::uint32_t>> kept;
    for (const AnyPlan& from : {plan, AnyPlan{less, method, two}}) {
      Cache cache;
      AnyCompressor compressor{from};
      compressor.begin(tokens);
      const auto views = [&](std::size_t layer) { return cache.view(layers[layer]); };
      const auto note = [&](std::span<const std::size_t> changed) {
        for (const std::size_t layer : changed) {
          for (std::size_t head = 0; head < 2; ++head) {
            cache.rows[layers[layer]][head] = compressor.retained(layer).rows(head);
          }
        }
      };
      for (std::size_t layer = 0; layer < 2; ++layer) {
        note(compressor.arrive(layer, views, cache.observation(layers[layer])));
      }
      note(compressor.finish(views));
      std::vector<std::uint32_t>& positions = kept.emplace_back();
      for (std::size_t layer = 0; layer < 2; ++layer) {
        const Retained& retained = compressor.retained(layer);
        for (std::size_t list = 0; list < retained.lists(); ++list) {
          const auto some = retained.positions(list);
          positions.insert(positions.end(), some.begin(), some.end());
        }
      }
    }
    EXPECT_EQ(kept[0], kept[1]) << method;
  }
  const AnyPlan plan{shape, "snapkv", all};
  EXPECT_SAYS(plan.of_layers({}), "layers are none, the model has 3");
  const std::array<std::size_t, 2> beyond = {1, 3};
  EXPECT_SAYS(plan.of_layers(beyond), "layers[1] is 3, must be below the model's 3");
  const std::array<std::size_t, 2> twice = {1, 1};
  EXPECT_SAYS(plan.of_layers(twice), "layers[1] is 1");
}

/// Every task on a thread of its own.
struct Threads {
  std::size_t tasks = 0;
  template <class Task>
  void parallel_for(std::size_t count, Task&& task) {
    tasks += count;
    std::vector<std::jthread> threads;
    for (std::size_t i = 0; i < count; ++i) {
      threads.emplace_back([&task, i] { task(i); });
    }
  }
};

TEST(AnyCompressor, RunsOnTheEnginesThreads) {
  Threads threads;
  Cache alone;
  Cache together;
  AnyCompressor serial{AnyPlan{shape, "snapkv", settings()}};
  AnyCompressor parallel{AnyPlan{shape, "snapkv", settings()}, threads};
  alone.sequence(serial);
  together.sequence(parallel);
  EXPECT_GT(threads.tasks, 0U);
  EXPECT_EQ(alone, together);
}

TEST(AnyCompressor, RanksReduceScores) {
  Cache cache;
  AnyCompressor compressor{AnyPlan{shape, "knorm", settings()}};
  compressor.begin(tokens);
  const auto views = [&](std::size_t layer) { return cache.view(layer); };
  const auto rising = [](std::span<float> scores) { std::iota(scores.begin(), scores.end(), 0.0F); };
  compressor.arrive(0, views, {}, rising);
  EXPECT_EQ(compressor.retained(0).position(0), tokens - 24);
}

}  // namespace
}  // namespace compresskv
