// One row of logits: 2^(logit - max) with its sum, and the weighted sum of rows that ends the softmax.

#include <cmath>

#include "common.hpp"
#include "compresskv/kernel/softmax.hpp"

namespace bench {
namespace {

float plain_exp2_row(std::span<float> row) {
  const float max = *std::max_element(row.begin(), row.end());
  float sum = 0.0F;
  for (float& value : row) {
    value = std::exp2(value - max);
    sum += value;
  }
  return sum;
}

// The row is overwritten, and the next iteration takes the result as its logits: they stay in (0, 1], where
// every value takes the same steps as any other logit.
template <class Kernel>
void run_exp2_row(benchmark::State& state, Kernel&& kernel) {
  const std::size_t tokens = argument(state, 0);
  Buffer<float> row = random_buffer<float>(tokens, 1, 8.0F);
  for (auto _ : state) {
    benchmark::DoNotOptimize(kernel(std::span<float>(row)));
    benchmark::ClobberMemory();
  }
  report(state, tokens * sizeof(float));
}

void exp2_row(benchmark::State& state) {
  const auto kernel = [](std::span<float> row) {
    return compresskv::kernel::exp2_row(row.data(), row.size()).sum;
  };
  Buffer<float> got = random_buffer<float>(1003, 1, 8.0F);
  Buffer<float> expected = got;
  kernel(got);
  plain_exp2_row(expected);
  expect_close(state, got, expected, 1e-6F);
  run_exp2_row(state, kernel);
}

void plain_exp2_row(benchmark::State& state) {
  run_exp2_row(state, [](std::span<float> row) { return plain_exp2_row(row); });
}

void add_scaled(benchmark::State& state) {
  const std::size_t tokens = argument(state, 0);
  const Buffer<float> row = random_buffer<float>(tokens, 1);
  Buffer<float> sums = zeros<float>(tokens);
  for (auto _ : state) {
    compresskv::kernel::add_scaled(row.data(), 0.5F, tokens, sums.data());
    benchmark::ClobberMemory();
  }
  report(state, tokens * sizeof(float));
}

void plain_add_scaled(benchmark::State& state) {
  const std::size_t tokens = argument(state, 0);
  const Buffer<float> row = random_buffer<float>(tokens, 1);
  Buffer<float> sums = zeros<float>(tokens);
  for (auto _ : state) {
    for (std::size_t t = 0; t < tokens; ++t) {
      sums[t] += 0.5F * row[t];
    }
    benchmark::ClobberMemory();
  }
  report(state, tokens * sizeof(float));
}

void shapes(benchmark::internal::Benchmark* registered) {
  with_minimum(registered);
  registered->ArgName("tokens")->Arg(2048)->Arg(8192)->Arg(32768);
}

BENCHMARK(exp2_row)->Apply(shapes);
BENCHMARK(plain_exp2_row)->Apply(shapes);
BENCHMARK(add_scaled)->Apply(shapes);
BENCHMARK(plain_add_scaled)->Apply(shapes);

}  // namespace
}  // namespace bench
