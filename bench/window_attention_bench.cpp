// Logits, softmax and sums over the window's rows for the layer's four scoring heads, which share one KV head
// or read up to four. The bytes are those of the distinct keys read; `of_bound` is the share of what reading
// them, or the arithmetic, allows on this machine.

#include "common.hpp"
#include "compresskv/kernel/window_attention.hpp"

namespace bench {
namespace {

template <class T>
void window_attention(benchmark::State& state) {
  const std::size_t tokens = argument(state, 0);
  const std::size_t kv_heads = argument(state, 1);
  const std::vector<std::uint32_t> heads = heads_over(kv_heads);
  LayerRing<T>& ring = fresh_layers<T>(tokens);
  const Buffer<T> queries = random_buffer<T>(llama_8b.query_heads * window * llama_8b.head_dim, 2, 8.0F);
  const compresskv::QueryWindow<T> observation(
      queries.data(),
      {.query_heads = llama_8b.query_heads, .queries = window, .head_dim = llama_8b.head_dim});
  const std::vector<std::size_t> rows(llama_8b.kv_heads, tokens);
  const compresskv::Retained retained;
  compresskv::Workspace workspace;
  compresskv::SerialExecutor executor;
  float total = 0.0F;
  const auto attend = [&](const compresskv::StridedKv<T>& kv) {
    const compresskv::kernel::LayerInput<compresskv::StridedKv<T>, compresskv::QueryWindow<T>> input{
        .shape = llama_8b,
        .layer = 0,
        .rows = rows,
        .window = window,
        .retained = retained,
        .kv = kv,
        .observation = observation};
    total = 0.0F;
    compresskv::kernel::window_attention(
        input, heads, workspace, executor,
        [&](std::uint32_t, std::span<const float> sums) { total += sums[sums.size() / 2]; });
  };
  attend(ring.view(ring.next()));  // allocates the workspace
  for (auto _ : state) {
    const auto kv = ring.view(ring.next());
    timed(state, [&] { attend(kv); });
  }
  // A row of attention sums to one, so no token can have more than one a row.
  if (!(total > 0.0F && total < static_cast<float>(heads_per_layer * window))) {
    state.SkipWithError("the attention of a token is out of bounds");
  }
  report_roofline<T>(state, key_bytes<T>(tokens, kv_heads),
                     static_cast<double>(2 * heads_per_layer * window * tokens * llama_8b.head_dim));
}

void shapes(benchmark::internal::Benchmark* registered) {
  with_minimum(registered);
  registered->ArgNames({"tokens", "kv_heads"})
      ->ArgsProduct({{2048, 8192, 32768}, {1, 3, 4}})
      ->UseManualTime();
}

BENCHMARK_TEMPLATE(window_attention, float)->Apply(shapes);
BENCHMARK_TEMPLATE(window_attention, half)->Apply(shapes);
BENCHMARK_TEMPLATE(window_attention, bfloat16)->Apply(shapes);

}  // namespace
}  // namespace bench
