// Logits of the window's queries with all keys of one KV head: 8 queries where one head scores, 32 where all
// four heads of the group do. Beside them what bounds the kernel from both sides: a plain loop, and memcpy of
// the same keys.

#include <cmath>
#include <vector>

#include "common.hpp"
#include "compresskv/kernel/logits.hpp"

namespace bench {
namespace {

constexpr std::size_t head_dim = llama_8b.head_dim;

template <class T>
compresskv::Run<const T> run_of(std::span<const T> keys) {
  return {.base = keys.data(),
          .rows = keys.size() / head_dim,
          .row_stride = static_cast<std::ptrdiff_t>(head_dim),
          .chunk = head_dim,
          .chunk_stride = static_cast<std::ptrdiff_t>(head_dim)};
}

/// Elements apart by the number of rows: `[dim][token]`.
template <class T>
compresskv::Run<const T> transposed_run_of(std::span<const T> keys) {
  const auto rows = static_cast<std::ptrdiff_t>(keys.size() / head_dim);
  return {
      .base = keys.data(), .rows = keys.size() / head_dim, .row_stride = 1, .chunk = 1, .chunk_stride = rows};
}

template <class T>
void plain_logits(const T* keys, std::size_t rows, const float* queries, std::size_t count, float scale,
                  float* out) {
  for (std::size_t t = 0; t < rows; ++t) {
    for (std::size_t q = 0; q < count; ++q) {
      float sum = 0.0F;
      for (std::size_t e = 0; e < head_dim; ++e) {
        sum += queries[q * head_dim + e] * compresskv::to_float(keys[t * head_dim + e]);
      }
      out[q * rows + t] = sum * scale;
    }
  }
}

template <class T, class RunOf, class Kernel>
void run_logits(benchmark::State& state, RunOf&& as_run, Kernel&& kernel) {
  const std::size_t tokens = argument(state, 0);
  const std::size_t count = argument(state, 1);
  SliceRing<T> keys(tokens * head_dim, 1);
  const Buffer<float> queries = random_buffer<float>(count * head_dim, 2);
  Buffer<float> out = zeros<float>(count * tokens);
  const float scale = 1.0F / std::sqrt(static_cast<float>(head_dim));
  for (auto _ : state) {
    kernel(as_run(std::span<const T>(keys.next())), queries, count, scale, out);
    benchmark::ClobberMemory();
  }
  report(state, key_bytes<T>(tokens));
  state.counters["flops"] = benchmark::Counter(static_cast<double>(2 * count * tokens * head_dim),
                                               benchmark::Counter::kIsIterationInvariantRate);
}

const auto library_kernel = [](const auto& run, const Buffer<float>& queries, std::size_t count, float scale,
                               Buffer<float>& out) {
  using namespace compresskv::kernel;
  // Packing the queries is part of the work.
  Buffer<float> buffer(key_buffer_size<std::remove_cvref_t<decltype(*run.base)>>(head_dim));
  Buffer<float> packed = zeros<float>(PackedQueries::size(count, head_dim));
  for (std::size_t q = 0; q < count; ++q) {
    PackedQueries::pack(q, queries.data() + q * head_dim, head_dim, packed.data());
  }
  compresskv::kernel::logits(run, 0, run.rows, {.data = packed.data(), .count = count, .head_dim = head_dim},
                             scale, buffer.data(), out.data(), run.rows);
};

const auto plain_kernel = [](const auto& run, const Buffer<float>& queries, std::size_t count, float scale,
                             Buffer<float>& out) {
  plain_logits(run.base, run.rows, queries.data(), count, scale, out.data());
};

template <class T>
void logits(benchmark::State& state) {
  const Buffer<T> keys = random_buffer<T>(64 * head_dim, 1);
  const Buffer<float> queries = random_buffer<float>(8 * head_dim, 2);
  Buffer<float> got(8 * 64);
  Buffer<float> expected(8 * 64);
  library_kernel(run_of(std::span<const T>(keys)), queries, 8, 1.0F, got);
  plain_kernel(run_of(std::span<const T>(keys)), queries, 8, 1.0F, expected);
  // A hundred products below 1: their order changes the last few of 24 bits.
  expect_close(state, got, expected, 1e-4F);
  run_logits<T>(state, run_of<T>, library_kernel);
}

template <class T>
void transposed_logits(benchmark::State& state) {
  run_logits<T>(state, transposed_run_of<T>, library_kernel);
}

template <class T>
void plain_loop(benchmark::State& state) {
  run_logits<T>(state, run_of<T>, plain_kernel);
}

template <class T>
void memcpy_keys(benchmark::State& state) {
  const std::size_t tokens = argument(state, 0);
  SliceRing<T> keys(tokens * head_dim, 1);
  Buffer<T> copy = zeros<T>(tokens * head_dim);
  for (auto _ : state) {
    std::memcpy(static_cast<void*>(copy.data()), keys.next().data(), key_bytes<T>(tokens));
    benchmark::ClobberMemory();
  }
  report(state, key_bytes<T>(tokens));
}

void shapes(benchmark::internal::Benchmark* registered) {
  with_minimum(registered);
  registered->ArgNames({"tokens", "queries"})->ArgsProduct({{2048, 8192, 32768}, {8, 32}});
}

/// A length whose rows of logits do not lie a power of two apart, as hardly any real prompt's do.
void odd_shapes(benchmark::internal::Benchmark* registered) {
  shapes(registered);
  registered->ArgsProduct({{32000 - 16}, {8, 32}});
}

void short_shapes(benchmark::internal::Benchmark* registered) {
  with_minimum(registered);
  registered->ArgNames({"tokens", "queries"})->ArgsProduct({{2048}, {8, 32}});
}

void copy_shapes(benchmark::internal::Benchmark* registered) {
  with_minimum(registered);
  registered->ArgName("tokens")->Arg(2048)->Arg(8192)->Arg(32768);
}

BENCHMARK_TEMPLATE(logits, float)->Apply(odd_shapes);
BENCHMARK_TEMPLATE(logits, half)->Apply(odd_shapes);
BENCHMARK_TEMPLATE(logits, bfloat16)->Apply(odd_shapes);
BENCHMARK_TEMPLATE(transposed_logits, float)->Apply(short_shapes);
BENCHMARK_TEMPLATE(transposed_logits, bfloat16)->Apply(short_shapes);
BENCHMARK_TEMPLATE(plain_loop, float)->Apply(short_shapes);
BENCHMARK_TEMPLATE(plain_loop, bfloat16)->Apply(short_shapes);
BENCHMARK_TEMPLATE(memcpy_keys, float)->Apply(copy_shapes);
BENCHMARK_TEMPLATE(memcpy_keys, half)->Apply(copy_shapes);
BENCHMARK_TEMPLATE(memcpy_keys, bfloat16)->Apply(copy_shapes);

}  // namespace
}  // namespace bench
