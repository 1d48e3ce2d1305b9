// Attention of one decoded token for one query head: what a compressed cache (1024 rows) saves against a full
// one. Beside it memcpy of the same keys and values. The bytes are those of keys and values.

#include <cmath>

#include "common.hpp"
#include "compresskv/kernel/decode_attention.hpp"

namespace bench {
namespace {

constexpr std::size_t head_dim = llama_8b.head_dim;

template <class T>
compresskv::StridedKv<T> one_head(std::span<T> keys_then_values, std::size_t rows) {
  return {keys_then_values.data(), keys_then_values.data() + rows * head_dim,
          compresskv::KvShape{.kv_heads = 1, .rows = rows, .head_dim = head_dim},
          compresskv::layout::head_token_dim};
}

template <class T>
std::vector<float> plain_attention(const T* keys, const T* values, std::size_t rows, const float* query,
                                   float scale) {
  std::vector<double> weights(rows);
  double sum = 0.0;
  for (std::size_t t = 0; t < rows; ++t) {
    double logit = 0.0;
    for (std::size_t e = 0; e < head_dim; ++e) {
      logit +=
          static_cast<double>(query[e]) * static_cast<double>(compresskv::to_float(keys[t * head_dim + e]));
    }
    weights[t] = std::exp(logit * static_cast<double>(scale));
    sum += weights[t];
  }
  std::vector<float> out(head_dim);
  for (std::size_t e = 0; e < head_dim; ++e) {
    double value = 0.0;
    for (std::size_t t = 0; t < rows; ++t) {
      value += weights[t] / sum * static_cast<double>(compresskv::to_float(values[t * head_dim + e]));
    }
    out[e] = static_cast<float>(value);
  }
  return out;
}

template <class T>
void decode_attention(benchmark::State& state) {
  const std::size_t rows = argument(state, 0);
  SliceRing<T> layers(2 * rows * head_dim, 1);
  const Buffer<float> query = random_buffer<float>(head_dim, 2);
  Buffer<float> scratch = zeros<float>(2 * head_dim);
  Buffer<float> attention = zeros<float>(rows);
  Buffer<float> out = zeros<float>(head_dim);
  const float scale = 1.0F / std::sqrt(static_cast<float>(head_dim));
  const auto attend = [&](std::span<T> slice) {
    compresskv::kernel::decode_attention(one_head(slice, rows), 0, query.data(), scale, scratch, attention,
                                         out.data());
  };
  const std::span<T> slice = layers.next();
  attend(slice);
  expect_close(state, out,
               plain_attention(slice.data(), slice.data() + rows * head_dim, rows, query.data(), scale),
               1e-5F);
  for (auto _ : state) {
    attend(layers.next());
    benchmark::ClobberMemory();
  }
  report(state, 2 * key_bytes<T>(rows));
}

template <class T>
void memcpy_rows(benchmark::State& state) {
  const std::size_t rows = argument(state, 0);
  SliceRing<T> layers(2 * rows * head_dim, 1);
  Buffer<T> copy = zeros<T>(2 * rows * head_dim);
  for (auto _ : state) {
    std::memcpy(static_cast<void*>(copy.data()), layers.next().data(), 2 * key_bytes<T>(rows));
    benchmark::ClobberMemory();
  }
  report(state, 2 * key_bytes<T>(rows));
}

void shapes(benchmark::internal::Benchmark* registered) {
  with_minimum(registered);
  registered->ArgName("tokens")->Arg(1024)->Arg(2048)->Arg(8192)->Arg(32768);
}

BENCHMARK_TEMPLATE(decode_attention, float)->Apply(shapes);
BENCHMARK_TEMPLATE(decode_attention, half)->Apply(shapes);
BENCHMARK_TEMPLATE(decode_attention, bfloat16)->Apply(shapes);
BENCHMARK_TEMPLATE(memcpy_rows, float)->Apply(shapes);
BENCHMARK_TEMPLATE(memcpy_rows, bfloat16)->Apply(shapes);

}  // namespace
}  // namespace bench
