// The rows that a layer of capacity 1024 keeps. Scores all equal are the case where ties decide everything;
// beside them a full sort of the indices by (score, index).

#include <numeric>

#include "common.hpp"
#include "compresskv/kernel/top_k.hpp"

namespace bench {
namespace {

constexpr std::size_t kept = capacity - window;

void sorted_top_k(std::span<const float> scores, std::span<std::uint32_t> order,
                  std::span<std::uint32_t> out) {
  std::iota(order.begin(), order.end(), 0U);
  std::sort(order.begin(), order.end(), [&](std::uint32_t a, std::uint32_t b) {
    return scores[a] != scores[b] ? scores[a] > scores[b] : a < b;
  });
  std::copy_n(order.begin(), out.size(), out.begin());
  std::sort(out.begin(), out.end());
}

void run_top_k(benchmark::State& state, const std::vector<Buffer<float>>& scores) {
  Buffer<float> scratch = zeros<float>(scores[0].size());
  std::vector<std::uint32_t> out(kept);
  std::vector<std::uint32_t> order(scores[0].size());
  std::vector<std::uint32_t> expected(kept);
  compresskv::kernel::top_k(scores[0], scratch, out);
  sorted_top_k(scores[0], order, expected);
  if (out != expected) {
    state.SkipWithError("a full sort keeps other rows");
  }
  std::size_t next = 0;
  for (auto _ : state) {
    compresskv::kernel::top_k(scores[next], scratch, out);
    benchmark::ClobberMemory();
    next = (next + 1) % scores.size();
  }
  report(state, scratch.size() * sizeof(float));
}

/// Several inputs in turn: the branch predictor learns one short input by heart.
std::vector<Buffer<float>> random_scores(std::size_t tokens) {
  std::vector<Buffer<float>> scores;
  for (std::uint64_t seed = 1; seed <= 32; ++seed) {
    scores.push_back(random_buffer<float>(tokens, seed));
  }
  return scores;
}

void top_k(benchmark::State& state) { run_top_k(state, random_scores(argument(state, 0))); }

void top_k_of_equals(benchmark::State& state) {
  Buffer<float> scores(argument(state, 0));
  std::fill(scores.begin(), scores.end(), 0.25F);
  run_top_k(state, {scores});
}

void full_sort(benchmark::State& state) {
  const std::vector<Buffer<float>> scores = random_scores(argument(state, 0));
  std::vector<std::uint32_t> order(scores[0].size());
  std::vector<std::uint32_t> out(kept);
  std::size_t next = 0;
  for (auto _ : state) {
    sorted_top_k(scores[next], order, out);
    benchmark::ClobberMemory();
    next = (next + 1) % scores.size();
  }
  report(state, order.size() * sizeof(float));
}

void shapes(benchmark::internal::Benchmark* registered) {
  with_minimum(registered);
  registered->ArgName("tokens")->Arg(2048)->Arg(8192)->Arg(32768);
}

BENCHMARK(top_k)->Apply(shapes);
BENCHMARK(top_k_of_equals)->Apply(shapes);
BENCHMARK(full_sort)->Apply(shapes);

}  // namespace
}  // namespace bench
