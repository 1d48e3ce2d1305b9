// What the run-time door costs: `AnyCompressor::arrive` beside `Compressor::compress`, one layer of
// Llama-3.1-8B, taking turns in one process so that both see the same machine. `door_percent` is the median
// of the pairs' ratios, less 1; `pairs_spread` half the distance of its quartiles, by which chance moves a
// pair.

#include <algorithm>
#include <chrono>
#include <compresskv/runtime/any_compressor.hpp>
#include <vector>

#include "common.hpp"

namespace bench {
namespace {

constexpr std::size_t pairs = 400;

double nanoseconds(auto&& call) {
  const auto start = std::chrono::steady_clock::now();
  call();
  return std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - start).count();
}

template <class T>
void door(benchmark::State& state) {
  const compresskv::ModelShape& shape = model_shapes[llama_3_1_8b];
  const std::size_t tokens = argument(state, 0);
  const compresskv::HeadRanking ranking(
      std::vector(shape.layers, heads_over(3, static_cast<std::size_t>(heads_per_layer), shape)));
  const auto observers = static_cast<std::size_t>(window);
  const compresskv::MethodSettings settings{.budget = compresskv::Budget::tokens_per_layer(capacity),
                                            .heads = ranking,
                                            .heads_per_layer = static_cast<std::size_t>(heads_per_layer),
                                            .window = observers,
                                            .pool_width = pool_width};
  const compresskv::Plan plan{
      shape,
      compresskv::score::SemanticRetrieval{
          ranking,
          {.heads_per_layer = settings.heads_per_layer, .window = observers, .pool_width = pool_width}},
      compresskv::select::SharedTopK{}, compresskv::budget::Uniform{settings.budget}};
  compresskv::Compressor compressor{plan};
  compresskv::AnyCompressor any{compresskv::AnyPlan{shape, "compresskv", settings}};
  LayerRing<T>& ring = fresh_layers<T>(tokens, shape);
  const Buffer<T> values = random_buffer<T>(shape.query_heads * observers * shape.head_dim, 2, 8.0F);
  const compresskv::QueryWindow<T> queries(
      values.data(), {.query_heads = shape.query_heads, .queries = observers, .head_dim = shape.head_dim});

  const auto by_template = [&] {
    const auto kv = ring.view(ring.next());
    compressor.begin(tokens);
    return nanoseconds([&] { benchmark::DoNotOptimize(compressor.compress(0, kv, queries).rows()); });
  };
  const auto by_door = [&] {
    const auto kv = ring.view(ring.next());
    any.begin(tokens);
    const auto views = [&](std::size_t) { return kv; };
    return nanoseconds([&] { benchmark::DoNotOptimize(any.arrive(0, views, queries).size()); });
  };
  by_template();
  by_door();
  for (auto _ : state) {
    std::vector<double> ratios;
    double total = 0.0;
    for (std::size_t i = 0; i < pairs; ++i) {
      // The order alternates, and over the rounds of the ring each side gets each of its layers.
      double direct = 0.0;
      double through = 0.0;
      if ((i + i / 4) % 2 == 0) {
        direct = by_template();
        through = by_door();
      } else {
        through = by_door();
        direct = by_template();
      }
      ratios.push_back(through / direct);
      total += direct;
    }
    std::sort(ratios.begin(), ratios.end());
    state.counters["compress_us"] = total / pairs / 1e3;
    state.counters["door_percent"] = 100.0 * (ratios[pairs / 2] - 1.0);
    state.counters["pairs_spread"] = 50.0 * (ratios[pairs * 3 / 4] - ratios[pairs / 4]);
  }
}

BENCHMARK_TEMPLATE(door, float)->ArgName("tokens")->Arg(2048)->Iterations(1)->Unit(benchmark::kMillisecond);
BENCHMARK_TEMPLATE(door, bfloat16)
    ->ArgName("tokens")
    ->Arg(2048)
    ->Iterations(1)
    ->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace bench
