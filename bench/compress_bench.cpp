// The call that an engine makes for a layer at the end of its prefill, on one thread, and its three steps
// alone. Every iteration gets a layer that is fresh and cold (see LayerRing); only the call is timed. Beside
// it, up to 32,768 tokens, memcpy of the keys that it reads. `model` is one of bench::Model; `k` heads score
// with a window of `window` queries. `kv_heads` is how many KV heads the scoring heads read: 3 is the
// commonest in the published ranking of Llama-3.1-8B, 4 the most. The bytes are those of the distinct keys
// read.

#include "common.hpp"

namespace bench {
namespace {

auto plan_for(const compresskv::ModelShape& shape, const std::vector<std::uint32_t>& heads,
              std::size_t observers) {
  const std::vector<std::vector<std::uint32_t>> ranking(shape.layers, heads);
  return compresskv::Plan{
      shape,
      compresskv::score::SemanticRetrieval{
          compresskv::HeadRanking(ranking),
          {.heads_per_layer = heads.size(), .window = observers, .pool_width = pool_width}},
      compresskv::select::SharedTopK{},
      compresskv::budget::Uniform{compresskv::Budget::tokens_per_layer(capacity)}};
}

using PlanType = decltype(plan_for(llama_8b, {}, 1));

/// Everything that one benchmark of a layer needs.
template <class T>
struct Fixture {
  explicit Fixture(const benchmark::State& state)
      : shape(model_shapes[argument(state, 0)]),
        tokens(argument(state, 1)),
        kv_heads(argument(state, 2)),
        heads(argument(state, 3)),
        observers(argument(state, 4)),
        plan(plan_for(shape, heads_over(kv_heads, heads, shape), observers)),
        compressor(plan),
        ring(fresh_layers<T>(tokens, shape)),
        // Logits some 3 apart: a few tokens get most of the attention, as in a model.
        query_values(random_buffer<T>(shape.query_heads * observers * shape.head_dim, 2, 8.0F)),
        queries(query_values.data(),
                {.query_heads = shape.query_heads, .queries = observers, .head_dim = shape.head_dim}) {
    // The first sequence allocates the scratch memory; what is measured are those after it.
    compressor.begin(tokens);
    compressor.compress(0, ring.view(ring.next()), queries);
  }

  std::size_t key_bytes() const { return bench::key_bytes<T>(tokens, kv_heads, shape.head_dim); }
  void report(benchmark::State& state) const {
    report_roofline<T>(state, key_bytes(),
                       static_cast<double>(2 * heads * observers * tokens * shape.head_dim));
  }

  const compresskv::ModelShape& shape;
  std::size_t tokens;
  std::size_t kv_heads;
  std::size_t heads;
  std::size_t observers;
  PlanType plan;
  compresskv::Compressor<PlanType> compressor;
  LayerRing<T>& ring;
  Buffer<T> query_values;
  compresskv::QueryWindow<T> queries;
};

template <class T>
void compress(benchmark::State& state) {
  Fixture<T> fixture(state);
  std::size_t rows = 0;
  for (auto _ : state) {
    const auto kv = fixture.ring.view(fixture.ring.next());
    fixture.compressor.begin(fixture.tokens);
    timed(state, [&] { rows = fixture.compressor.compress(0, kv, fixture.queries).rows(); });
  }
  if (rows != capacity) {
    state.SkipWithError("the layer does not keep what its capacity says");
  }
  fixture.report(state);
}

template <class T>
void score(benchmark::State& state) {
  Fixture<T> fixture(state);
  fixture.compressor.begin(fixture.tokens);
  for (auto _ : state) {
    const auto kv = fixture.ring.view(fixture.ring.next());
    timed(state, [&] { benchmark::DoNotOptimize(fixture.compressor.score(0, kv, fixture.queries)); });
  }
  fixture.report(state);
}

template <class T>
void select(benchmark::State& state) {
  Fixture<T> fixture(state);
  fixture.compressor.begin(fixture.tokens);
  const auto scores = fixture.compressor.score(0, fixture.ring.view(fixture.ring.next()), fixture.queries);
  for (auto _ : state) {
    timed(state, [&] { benchmark::DoNotOptimize(&fixture.compressor.select(0, scores)); });
  }
  report(state, fixture.key_bytes());
}

template <class T>
void compact(benchmark::State& state) {
  Fixture<T> fixture(state);
  fixture.compressor.begin(fixture.tokens);
  const auto scores = fixture.compressor.score(0, fixture.ring.view(fixture.ring.next()), fixture.queries);
  const compresskv::Selection selection = fixture.compressor.select(0, scores);
  for (auto _ : state) {
    const auto kv = fixture.ring.view(fixture.ring.next());
    fixture.compressor.begin(fixture.tokens);
    timed(state, [&] { benchmark::DoNotOptimize(&fixture.compressor.compact(0, kv, selection)); });
  }
  report(state, fixture.key_bytes());
}

template <class T>
void memcpy_keys(benchmark::State& state) {
  const compresskv::ModelShape& shape = model_shapes[argument(state, 0)];
  const std::size_t tokens = argument(state, 1);
  const std::size_t kv_heads = argument(state, 2);
  LayerRing<T>& ring = fresh_layers<T>(tokens, shape);
  const std::size_t head = tokens * shape.head_dim;
  Buffer<T> copy = zeros<T>(kv_heads * head);
  for (auto _ : state) {
    const auto& layer = ring.next();
    timed(state, [&] {
      for (std::size_t i = 0; i < kv_heads; ++i) {
        std::memcpy(static_cast<void*>(copy.data() + i * head), layer.keys.data() + i * head,
                    head * sizeof(T));
      }
    });
  }
  report(state, key_bytes<T>(tokens, kv_heads, shape.head_dim));
}

constexpr std::int64_t k = heads_per_layer;
constexpr std::int64_t w = window;

void of_llama(benchmark::internal::Benchmark* registered) {
  with_minimum(registered);
  registered->ArgNames({"model", "tokens", "kv_heads", "k", "window"})->UseManualTime();
  registered->ArgsProduct({{llama_3_1_8b}, {2048, 8192, 32768}, {3}, {k}, {w}});
}

void of_models(benchmark::internal::Benchmark* registered) {
  of_llama(registered);
  registered->ArgsProduct({{llama_3_1_8b}, {2048, 8192, 32768}, {1, 4}, {k}, {w}});
  registered->ArgsProduct({{llama_3_1_70b, smollm2_135m}, {2048, 8192, 32768}, {3}, {k}, {w}});
}

/// What the time grows with: tokens, heads (and the KV heads that they read) and the window.
void growth(benchmark::internal::Benchmark* registered) {
  of_models(registered);
  registered->ArgsProduct({{llama_3_1_8b, llama_3_1_70b}, {65536, 131072}, {3}, {k}, {w}});
  registered->ArgsProduct({{llama_3_1_8b}, {32768}, {1}, {1, 2}, {w}});
  registered->ArgsProduct({{llama_3_1_8b}, {32768}, {4}, {8, 16}, {w}});
  registered->ArgsProduct({{llama_3_1_8b}, {32768}, {3}, {k}, {16, 32, 64}});
}

BENCHMARK_TEMPLATE(compress, float)->Apply(of_models);
BENCHMARK_TEMPLATE(compress, half)->Apply(of_models);
BENCHMARK_TEMPLATE(compress, bfloat16)->Apply(growth);
BENCHMARK_TEMPLATE(score, float)->Apply(of_llama);
BENCHMARK_TEMPLATE(score, half)->Apply(of_llama);
BENCHMARK_TEMPLATE(score, bfloat16)->Apply(of_llama);
BENCHMARK_TEMPLATE(select, float)->Apply(of_llama);
BENCHMARK_TEMPLATE(compact, float)->Apply(of_llama);
BENCHMARK_TEMPLATE(compact, half)->Apply(of_llama);
BENCHMARK_TEMPLATE(compact, bfloat16)->Apply(of_llama);
BENCHMARK_TEMPLATE(memcpy_keys, float)->Apply(of_models);
BENCHMARK_TEMPLATE(memcpy_keys, half)->Apply(of_models);
BENCHMARK_TEMPLATE(memcpy_keys, bfloat16)->Apply(of_models);

}  // namespace
}  // namespace bench
