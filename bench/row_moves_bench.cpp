// Moving 1024 rows of every KV head of a layer to its front, keys and values, in place: rows that stand alone
// and rows in stretches of eight. Beside it a loop over raw pointers, and memcpy of as many bytes in one
// piece. The bytes are those of the rows moved, counted once.

#include "common.hpp"
#include "compresskv/kernel/row_moves.hpp"

namespace bench {
namespace {

constexpr std::size_t head_dim = llama_8b.head_dim;

template <class T>
constexpr std::size_t moved_bytes = 2 * llama_8b.kv_heads* capacity* head_dim * sizeof(T);

template <class T>
void raw_moves(T* keys, T* values, std::size_t tokens, std::span<const std::uint32_t> rows) {
  for (std::size_t head = 0; head < llama_8b.kv_heads; ++head) {
    for (T* base : {keys, values}) {
      T* first = base + head * tokens * head_dim;
      for (std::size_t i = 0; i < rows.size(); ++i) {
        std::memmove(static_cast<void*>(first + i * head_dim), first + rows[i] * head_dim,
                     head_dim * sizeof(T));
      }
    }
  }
}

template <class T, class Move>
void run_moves(benchmark::State& state, Move&& move) {
  const std::size_t tokens = argument(state, 0);
  const std::vector<std::uint32_t> rows = ascending_rows(tokens, capacity, argument(state, 1), 3);
  LayerRing<T>& ring = fresh_layers<T>(tokens);
  for (auto _ : state) {
    auto& layer = ring.next();
    timed(state, [&] { move(ring, layer, tokens, std::span<const std::uint32_t>(rows)); });
  }
  report(state, moved_bytes<T>);
}

template <class T>
void copy_rows(benchmark::State& state) {
  run_moves<T>(state, [](LayerRing<T>& ring, auto& layer, std::size_t, std::span<const std::uint32_t> rows) {
    const auto kv = ring.view(layer);
    for (std::size_t head = 0; head < llama_8b.kv_heads; ++head) {
      compresskv::kernel::copy_rows(kv, kv, head, rows);
    }
  });
}

/// `[token][kv_head][dim]`: the rows of a head lie eight rows apart.
template <class T>
void copy_rows_token_head_dim(benchmark::State& state) {
  run_moves<T>(state,
               [](LayerRing<T>&, auto& layer, std::size_t tokens, std::span<const std::uint32_t> rows) {
                 const compresskv::StridedKv<T> kv(
                     layer.keys.data(), layer.values.data(),
                     compresskv::KvShape{.kv_heads = llama_8b.kv_heads, .rows = tokens, .head_dim = head_dim},
                     compresskv::layout::token_head_dim);
                 for (std::size_t head = 0; head < llama_8b.kv_heads; ++head) {
                   compresskv::kernel::copy_rows(kv, kv, head, rows);
                 }
               });
}

template <class T>
void raw_loop(benchmark::State& state) {
  run_moves<T>(state,
               [](LayerRing<T>&, auto& layer, std::size_t tokens, std::span<const std::uint32_t> rows) {
                 raw_moves(layer.keys.data(), layer.values.data(), tokens, rows);
               });
}

template <class T>
void memcpy_bytes(benchmark::State& state) {
  SliceRing<T> source(moved_bytes<T> / sizeof(T), 1);
  SliceRing<T> target(moved_bytes<T> / sizeof(T), 2);
  for (auto _ : state) {
    std::memcpy(static_cast<void*>(target.next().data()), source.next().data(), moved_bytes<T>);
    benchmark::ClobberMemory();
  }
  report(state, moved_bytes<T>);
}

void shapes(benchmark::internal::Benchmark* registered) {
  with_minimum(registered);
  registered->ArgNames({"tokens", "stretch"})->ArgsProduct({{2048, 8192}, {1, 8}})->UseManualTime();
}

BENCHMARK_TEMPLATE(copy_rows, float)->Apply(shapes);
BENCHMARK_TEMPLATE(copy_rows, bfloat16)->Apply(shapes);
BENCHMARK_TEMPLATE(copy_rows_token_head_dim, float)->Apply(shapes);
BENCHMARK_TEMPLATE(copy_rows_token_head_dim, bfloat16)->Apply(shapes);
BENCHMARK_TEMPLATE(raw_loop, float)->Apply(shapes);
BENCHMARK_TEMPLATE(raw_loop, bfloat16)->Apply(shapes);
BENCHMARK_TEMPLATE(memcpy_bytes, float)->Apply(with_minimum);
BENCHMARK_TEMPLATE(memcpy_bytes, bfloat16)->Apply(with_minimum);

}  // namespace
}  // namespace bench
