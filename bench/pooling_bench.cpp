// Pooling of one head's scores, width 5, added to the layer's. Beside it the same five terms with the borders
// set apart.

#include "common.hpp"
#include "compresskv/kernel/pooling.hpp"

namespace bench {
namespace {

using compresskv::kernel::Pool;

void plain_average(std::span<const float> in, std::span<float> out) {
  const auto border = [&](std::size_t t) {
    float sum = 0.0F;
    for (std::size_t j = t < 2 ? 0 : t - 2; j < std::min(t + 3, in.size()); ++j) {
      sum += in[j];
    }
    out[t] += sum / 5.0F;
  };
  border(0);
  border(1);
  for (std::size_t t = 2; t + 2 < in.size(); ++t) {
    out[t] += (in[t - 2] + in[t - 1] + in[t] + in[t + 1] + in[t + 2]) / 5.0F;
  }
  border(in.size() - 2);
  border(in.size() - 1);
}

template <class Kernel>
void run_pooling(benchmark::State& state, Kernel&& kernel) {
  const std::size_t tokens = argument(state, 0);
  const Buffer<float> in = random_buffer<float>(tokens, 1);
  Buffer<float> out = zeros<float>(tokens);
  for (auto _ : state) {
    kernel(std::span<const float>(in), std::span<float>(out));
    benchmark::ClobberMemory();
  }
  report(state, tokens * sizeof(float));
}

void average_pooling(benchmark::State& state) {
  const auto kernel = [](std::span<const float> in, std::span<float> out) {
    compresskv::kernel::add_pooled(in, Pool::average, pool_width, out);
  };
  const Buffer<float> in = random_buffer<float>(101, 1);
  Buffer<float> got = random_buffer<float>(101, 2);
  Buffer<float> expected = got;
  kernel(in, got);
  plain_average(in, expected);
  expect_close(state, got, expected, 1e-6F);
  run_pooling(state, kernel);
}

void max_pooling(benchmark::State& state) {
  run_pooling(state, [](std::span<const float> in, std::span<float> out) {
    compresskv::kernel::add_pooled(in, Pool::max, pool_width, out);
  });
}

void plain_average_pooling(benchmark::State& state) {
  run_pooling(state, [](std::span<const float> in, std::span<float> out) { plain_average(in, out); });
}

void shapes(benchmark::internal::Benchmark* registered) {
  with_minimum(registered);
  registered->ArgName("tokens")->Arg(2048)->Arg(8192)->Arg(32768);
}

BENCHMARK(average_pooling)->Apply(shapes);
BENCHMARK(max_pooling)->Apply(shapes);
BENCHMARK(plain_average_pooling)->Apply(shapes);

}  // namespace
}  // namespace bench
