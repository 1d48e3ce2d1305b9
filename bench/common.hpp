#pragma once

#include <benchmark/benchmark.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <ctime>
#include <limits>
#include <memory>
#include <new>
#include <span>
#include <string>
#include <vector>

#include "compresskv/compresskv.hpp"
#include "compresskv/kernel/code_path.hpp"
#include "machine.hpp"

/// What the benchmarks share: shapes, seeded inputs, memory larger than the caches, counters.
namespace bench {

using compresskv::bfloat16;
using compresskv::half;

/// Models whose layers are measured. Those of Mistral-7B have the shape of Llama-3.1-8B's, those of Qwen3-8B
/// as well: their numbers stand for all three.
enum Model : std::int64_t { llama_3_1_8b, llama_3_1_70b, smollm2_135m };
inline constexpr std::array<compresskv::ModelShape, 3> model_shapes{{
    {.layers = 32, .query_heads = 32, .kv_heads = 8, .head_dim = 128},
    {.layers = 80, .query_heads = 64, .kv_heads = 8, .head_dim = 128},
    {.layers = 30, .query_heads = 9, .kv_heads = 3, .head_dim = 64},
}};

/// The layer that benchmarks of one kernel work on, and the method's settings in the paper.
inline constexpr compresskv::ModelShape llama_8b = model_shapes[llama_3_1_8b];
inline constexpr std::size_t window = 8;
inline constexpr std::size_t heads_per_layer = 4;
inline constexpr std::size_t capacity = 1024;
inline constexpr std::size_t pool_width = 5;

/// splitmix64: the same numbers on every platform, which the standard distributions do not promise.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}

  std::uint64_t next() {
    std::uint64_t z = state_ += 0x9E3779B97F4A7C15U;
    z = (z ^ (z >> 30U)) * 0xBF58476D1CE4E5B9U;
    z = (z ^ (z >> 27U)) * 0x94D049BB133111EBU;
    return z ^ (z >> 31U);
  }
  /// Evenly spread over [-1, 1).
  float uniform() { return static_cast<float>(next() >> 40U) * 0x1p-23F - 1.0F; }
  std::size_t below(std::size_t bound) { return next() % bound; }

 private:
  std::uint64_t state_;
};

/// Starts on a cache line, as the caches of engines do, and leaves new memory unwritten.
template <class T>
struct LineAllocator {
  using value_type = T;
  static constexpr std::align_val_t line{64};

  LineAllocator() = default;
  template <class U>
  LineAllocator(const LineAllocator<U>&) {}

  T* allocate(std::size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), line)); }
  void deallocate(T* memory, std::size_t) { ::operator delete(memory, line); }
  template <class U>
  void construct(U* place) {
    ::new (static_cast<void*>(place)) U;
  }
  friend bool operator==(const LineAllocator&, const LineAllocator&) { return true; }
};

template <class T>
using Buffer = std::vector<T, LineAllocator<T>>;

template <class T>
void fill(std::span<T> values, std::uint64_t seed, float amplitude = 1.0F) {
  Random random(seed);
  for (T& value : values) {
    value = static_cast<T>(amplitude * random.uniform());
  }
}

/// Zeros: memory that was written once, so that no page fault is measured.
template <class T>
Buffer<T> zeros(std::size_t count) {
  Buffer<T> values(count);
  std::fill(values.begin(), values.end(), T(0));
  return values;
}

template <class T>
Buffer<T> random_buffer(std::size_t count, std::uint64_t seed, float amplitude = 1.0F) {
  Buffer<T> values(count);
  fill(std::span<T>(values), seed, amplitude);
  return values;
}

/// Bytes that a working set must exceed to come from memory each time: twice the last-level cache.
inline std::size_t beyond_caches() {
  std::size_t largest = 16U << 20U;  // where the system does not tell
  for (const auto& cache : benchmark::CPUInfo::Get().caches) {
    largest = std::max(largest, static_cast<std::size_t>(cache.size));
  }
  return 2 * largest;
}

/// Makes the caches forget what was in them.
inline void sweep_caches() {
  static std::vector<std::uint64_t> memory(beyond_caches() / sizeof(std::uint64_t));
  for (std::uint64_t& word : memory) {
    ++word;
  }
  benchmark::ClobberMemory();
}

/// Equal slices of read-only data, together beyond the caches: each call of `next()` gives the one that was
/// used longest ago.
template <class T>
class SliceRing {
 public:
  SliceRing(std::size_t elements, std::uint64_t seed, float amplitude = 1.0F)
      : elements_(elements), slices_(beyond_caches() / (elements * sizeof(T)) + 1) {
    memory_ = Buffer<T>(elements * slices_);
    fill(std::span<T>(memory_).first(elements), seed, amplitude);
    for (std::size_t i = 1; i < slices_; ++i) {
      std::copy_n(memory_.begin(), elements, memory_.begin() + static_cast<std::ptrdiff_t>(i * elements));
    }
  }

  std::span<T> next() {
    last_ = (last_ + 1) % slices_;
    return std::span<T>(memory_).subspan(last_ * elements_, elements_);
  }

 private:
  std::size_t elements_;
  std::size_t slices_;
  std::size_t last_ = 0;
  Buffer<T> memory_;
};

/// Whole layers, `[kv_head][token][dim]`, all with the same contents. Compaction overwrites the first rows of
/// each head: once all layers are used they are restored and the caches swept, so that each call of `next()`
/// gives a layer that is fresh and cold. Call it outside of the timed region.
template <class T>
class LayerRing {
 public:
  struct Layer {
    Buffer<T> keys;
    Buffer<T> values;
  };

  LayerRing(const compresskv::ModelShape& shape, std::size_t tokens) : shape_(shape), tokens_(tokens) {
    const std::size_t elements = shape.kv_heads * tokens * shape.head_dim;
    layers_.resize(std::clamp<std::size_t>(most_bytes / (2 * elements * sizeof(T)), 1, 8));
    layers_[0].keys = random_buffer<T>(elements, 1);
    layers_[0].values = layers_[0].keys;  // only moved, never computed with
    std::fill(layers_.begin() + 1, layers_.end(), layers_[0]);
    const std::size_t row = shape.head_dim;
    for (std::size_t head = 0; head < shape.kv_heads; ++head) {
      const T* first = layers_[0].keys.data() + head * tokens * row;
      first_rows_.insert(first_rows_.end(), first, first + std::min(capacity, tokens) * row);
    }
  }

  bool holds(const compresskv::ModelShape& shape, std::size_t tokens) const {
    return tokens_ == tokens && shape_.kv_heads == shape.kv_heads && shape_.head_dim == shape.head_dim;
  }

  /// Puts back what was overwritten and makes the caches forget all of it.
  void restore() {
    const std::size_t count = std::min(capacity, tokens_) * shape_.head_dim;
    for (Layer& layer : layers_) {
      for (std::size_t head = 0; head < shape_.kv_heads; ++head) {
        const T* from = first_rows_.data() + head * count;
        std::copy_n(from, count, layer.keys.data() + head * tokens_ * shape_.head_dim);
        std::copy_n(from, count, layer.values.data() + head * tokens_ * shape_.head_dim);
      }
    }
    sweep_caches();
    next_ = 0;
  }

  Layer& next() {
    if (next_ == layers_.size()) {
      restore();
    }
    return layers_[next_++];
  }

  compresskv::StridedKv<T> view(Layer& layer) const {
    return {layer.keys.data(), layer.values.data(),
            compresskv::KvShape{.kv_heads = shape_.kv_heads, .rows = tokens_, .head_dim = shape_.head_dim},
            compresskv::layout::head_token_dim};
  }

 private:
  static constexpr std::size_t most_bytes = 256U << 20U;

  compresskv::ModelShape shape_;
  std::size_t tokens_;
  std::vector<Layer> layers_;
  std::size_t next_ = 0;
  Buffer<T> first_rows_;  // [kv_head][row][dim]
};

/// The ring for layers of `tokens`, fresh and cold. It is kept for the next benchmark of the same shape:
/// filling it takes far longer than what is measured.
template <class T>
LayerRing<T>& fresh_layers(std::size_t tokens, const compresskv::ModelShape& shape = llama_8b) {
  static std::unique_ptr<LayerRing<T>> ring;
  if (!ring || !ring->holds(shape, tokens)) {
    ring.reset();  // before the next is there: two may not fit
    ring = std::make_unique<LayerRing<T>>(shape, tokens);
  }
  ring->restore();
  return *ring;
}

/// `count` rows of `tokens`, ascending, in stretches of `stretch` neighbours; any set of stretches is as
/// likely.
inline std::vector<std::uint32_t> ascending_rows(std::size_t tokens, std::size_t count, std::size_t stretch,
                                                 std::uint64_t seed) {
  Random random(seed);
  std::vector<std::uint32_t> rows;
  std::size_t wanted = count / stretch;
  const std::size_t blocks = tokens / stretch;
  for (std::size_t block = 0; block < blocks && wanted > 0; ++block) {
    if (random.below(blocks - block) < wanted) {
      --wanted;
      for (std::size_t i = 0; i < stretch; ++i) {
        rows.push_back(static_cast<std::uint32_t>(block * stretch + i));
      }
    }
  }
  return rows;
}

/// `count` query heads that read `kv_heads` different KV heads, as evenly as possible.
inline std::vector<std::uint32_t> heads_over(std::size_t kv_heads, std::size_t count = heads_per_layer,
                                             const compresskv::ModelShape& shape = llama_8b) {
  std::vector<std::uint32_t> heads;
  for (std::size_t i = 0; i < count; ++i) {
    const std::size_t kv_head = i % kv_heads * (shape.kv_heads / kv_heads);
    heads.push_back(static_cast<std::uint32_t>(kv_head * shape.group() + i / kv_heads));
  }
  std::sort(heads.begin(), heads.end());
  return heads;
}

/// Bytes of the keys of `kv_heads` KV heads.
template <class T>
constexpr std::size_t key_bytes(std::size_t tokens, std::size_t kv_heads = 1,
                                std::size_t head_dim = llama_8b.head_dim) {
  return kv_heads * tokens * head_dim * sizeof(T);
}

/// The least time of nine runs.
template <class Work>
double quickest_seconds(Work&& work) {
  double best = std::numeric_limits<double>::infinity();
  for (int i = 0; i < 9; ++i) {
    const auto start = std::chrono::steady_clock::now();
    benchmark::DoNotOptimize(work());
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return best;
}

/// What this machine reads from memory in a second, measured in this process.
inline double read_bytes_per_second() {
  static const double found = [] {
    constexpr std::size_t slice = 1U << 22U;
    SliceRing<float> memory(slice, 1);
    return slice * sizeof(float) /
           quickest_seconds([&] { return machine::read(memory.next().data(), slice); });
  }();
  return found;
}

/// Seconds that reading `bytes` of keys of type `T`, and `flops` operations on them, take at the least on
/// this machine: the longer of the two, which is the roofline.
template <class T>
double bound_seconds(std::size_t bytes, double flops) {
  static const double flops_per_second =
      1e8 / quickest_seconds([] { return machine::multiply_add(1e8, std::is_same_v<T, bfloat16>); });
  return std::max(static_cast<double>(bytes) / read_bytes_per_second(), flops / flops_per_second);
}

/// Seconds in `timed` since the last `report`.
inline double& timed_seconds() {
  static double seconds = 0.0;
  return seconds;
}

/// Times `work()` and hands the seconds to a benchmark that uses manual time. The counter `best_cpu_us` is
/// the least processor time that one iteration took: what other programs take from the machine is not in it.
template <class Work>
void timed(benchmark::State& state, Work&& work) {
  const auto start = std::chrono::steady_clock::now();
  const std::clock_t cpu_start = std::clock();
  work();
  benchmark::ClobberMemory();
  const double cpu_us = 1e6 * static_cast<double>(std::clock() - cpu_start) / CLOCKS_PER_SEC;
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  state.SetIterationTime(seconds);
  timed_seconds() += seconds;
  benchmark::Counter& best = state.counters.try_emplace("best_cpu_us", cpu_us).first->second;
  best.value = std::min(best.value, cpu_us);
}

/// Bytes a second from `bytes` an iteration, and the instructions in use as the label.
inline void report(benchmark::State& state, std::size_t bytes) {
  timed_seconds() = 0.0;
  state.SetBytesProcessed(state.iterations() * static_cast<std::int64_t>(bytes));
  state.SetLabel(std::string(compresskv::kernel::name(compresskv::kernel::code_path())));
}

/// The same with operations a second, and the share of the roofline that is reached in `timed`.
template <class T>
void report_roofline(benchmark::State& state, std::size_t bytes, double flops) {
  const double bound = static_cast<double>(state.iterations()) * bound_seconds<T>(bytes, flops);
  const double share = bound / timed_seconds();
  if (!(share > 0.0 && share < 1.5)) {
    state.SkipWithError("the share of the roofline is out of bounds");
  }
  state.counters["of_bound"] = share;
  state.counters["flops"] = benchmark::Counter(flops, benchmark::Counter::kIsIterationInvariantRate);
  report(state, bytes);
}

/// Fails the benchmark where a result is not what a plain loop gives.
inline void expect_close(benchmark::State& state, std::span<const float> got, std::span<const float> expected,
                         float tolerance) {
  for (std::size_t i = 0; i < expected.size(); ++i) {
    if (!(std::abs(got[i] - expected[i]) <= tolerance)) {
      state.SkipWithError(("value " + std::to_string(i) + " is " + std::to_string(got[i]) +
                           ", a plain loop gives " + std::to_string(expected[i]))
                              .c_str());
      return;
    }
  }
}

inline std::size_t argument(const benchmark::State& state, std::size_t index) {
  return static_cast<std::size_t>(state.range(index));
}

/// With repetitions, the quickest is reported as well: on a machine that does other work it is the one that
/// was disturbed least.
inline void with_minimum(benchmark::internal::Benchmark* registered) {
  registered->Unit(benchmark::kMicrosecond)->ComputeStatistics("min", [](const std::vector<double>& values) {
    return *std::min_element(values.begin(), values.end());
  });
}

}  // namespace bench
