// The call that an engine makes for a layer at the end of its prefill, on one thread, and its three steps
// alone. Every iteration gets a layer that is fresh and cold (see LayerRing); only the call is timed. Beside
// it memcpy of the keys that it reads. `kv_heads` is how many KV heads the four scoring heads read: 3 is the
// commonest in the published ranking of Llama-3.1-8B, 4 the most. The bytes are those of the distinct keys
// read.

#include "common.hpp"

namespace bench {
namespace {

auto plan_for(std::size_t kv_heads) {
  const std::vector<std::vector<std::uint32_t>> ranking(llama_8b.layers, heads_over(kv_heads));
  return compresskv::Plan{
      llama_8b,
      compresskv::score::SemanticRetrieval{
          compresskv::HeadRanking(ranking),
          {.heads_per_layer = heads_per_layer, .window = window, .pool_width = pool_width}},
      compresskv::select::SharedTopK{},
      compresskv::budget::Uniform{compresskv::Budget::tokens_per_layer(capacity)}};
}

using PlanType = decltype(plan_for(1));

/// Everything that one benchmark of a layer needs.
template <class T>
struct Fixture {
  explicit Fixture(const benchmark::State& state)
      : tokens(argument(state, 0)),
        kv_heads(argument(state, 1)),
        plan(plan_for(kv_heads)),
        compressor(plan),
        ring(fresh_layers<T>(tokens)),
        // Logits some 3 apart: a few tokens get most of the attention, as in a model.
        query_values(random_buffer<T>(llama_8b.query_heads * window * llama_8b.head_dim, 2, 8.0F)),
        queries(query_values.data(),
                {.query_heads = llama_8b.query_heads, .queries = window, .head_dim = llama_8b.head_dim}) {
    // The first sequence allocates the scratch memory; what is measured are those after it.
    compressor.begin(tokens);
    compressor.compress(0, ring.view(ring.next()), queries);
  }

  std::size_t tokens;
  std::size_t kv_heads;
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
  report(state, key_bytes<T>(fixture.tokens, fixture.kv_heads));
}

template <class T>
void score(benchmark::State& state) {
  Fixture<T> fixture(state);
  fixture.compressor.begin(fixture.tokens);
  for (auto _ : state) {
    const auto kv = fixture.ring.view(fixture.ring.next());
    timed(state, [&] { benchmark::DoNotOptimize(fixture.compressor.score(0, kv, fixture.queries)); });
  }
  report(state, key_bytes<T>(fixture.tokens, fixture.kv_heads));
}

template <class T>
void select(benchmark::State& state) {
  Fixture<T> fixture(state);
  fixture.compressor.begin(fixture.tokens);
  const auto scores = fixture.compressor.score(0, fixture.ring.view(fixture.ring.next()), fixture.queries);
  for (auto _ : state) {
    timed(state, [&] { benchmark::DoNotOptimize(&fixture.compressor.select(0, scores)); });
  }
  report(state, key_bytes<T>(fixture.tokens, fixture.kv_heads));
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
  report(state, key_bytes<T>(fixture.tokens, fixture.kv_heads));
}

template <class T>
void memcpy_keys(benchmark::State& state) {
  const std::size_t tokens = argument(state, 0);
  const std::size_t kv_heads = argument(state, 1);
  LayerRing<T>& ring = fresh_layers<T>(tokens);
  const std::size_t head = tokens * llama_8b.head_dim;
  Buffer<T> copy = zeros<T>(kv_heads * head);
  for (auto _ : state) {
    const auto& layer = ring.next();
    timed(state, [&] {
      for (std::size_t i = 0; i < kv_heads; ++i) {
        std::memcpy(static_cast<void*>(copy.data() + i * head), layer.keys.data() + 2 * i * head,
                    key_bytes<T>(tokens));
      }
    });
  }
  report(state, key_bytes<T>(tokens, kv_heads));
}

void shapes(benchmark::internal::Benchmark* registered) {
  with_minimum(registered);
  registered->ArgNames({"tokens", "kv_heads"})
      ->ArgsProduct({{2048, 8192, 32768}, {1, 3, 4}})
      ->UseManualTime();
}

BENCHMARK_TEMPLATE(compress, float)->Apply(shapes);
BENCHMARK_TEMPLATE(compress, half)->Apply(shapes);
BENCHMARK_TEMPLATE(compress, bfloat16)->Apply(shapes);
BENCHMARK_TEMPLATE(score, float)->Apply(shapes);
BENCHMARK_TEMPLATE(score, half)->Apply(shapes);
BENCHMARK_TEMPLATE(score, bfloat16)->Apply(shapes);
BENCHMARK_TEMPLATE(select, float)->Apply(shapes);
BENCHMARK_TEMPLATE(compact, float)->Apply(shapes);
BENCHMARK_TEMPLATE(compact, half)->Apply(shapes);
BENCHMARK_TEMPLATE(compact, bfloat16)->Apply(shapes);
BENCHMARK_TEMPLATE(memcpy_keys, float)->Apply(shapes);
BENCHMARK_TEMPLATE(memcpy_keys, half)->Apply(shapes);
BENCHMARK_TEMPLATE(memcpy_keys, bfloat16)->Apply(shapes);

}  // namespace
}  // namespace bench
