// What bench/peers/peers.py calls: the library and its limits on this machine, on memory that Python owns.
// One function an operation, so that Python times both sides of a ratio in turn and in one way.

#include <omp.h>

#include <array>
#include <cmath>
#include <compresskv/compresskv.hpp>
#include <compresskv/core/openmp_executor.hpp>
#include <compresskv/kernel/decode_attention.hpp>
#include <compresskv/kernel/row_moves.hpp>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <span>
#include <string>
#include <vector>

#include "../machine.hpp"

namespace {

using namespace compresskv;
using compresskv::bfloat16;
using compresskv::half;

/// A layer of Llama-3.1-8B, `[kv_head][token][dim]`.
constexpr ModelShape shape{.layers = 32, .query_heads = 32, .kv_heads = 8, .head_dim = 128};
constexpr std::size_t window = 8;
constexpr std::size_t capacity = 1024;

/// One method on one element type and length.
struct Layer {
  virtual ~Layer() = default;
  virtual std::size_t compress(void* keys, void* values, const void* queries) = 0;
  virtual float attention(void* keys, void* values, const void* queries) = 0;
  virtual float logits(void* keys, void* values, const void* queries, bool view) = 0;
  virtual void moves(void* keys, void* values, bool raw) = 0;
  virtual float decode(void* keys, void* values, const float* query, std::size_t rows) = 0;
  virtual double extra_memory() const = 0;
};

template <class T, class P>
class LayerOf : public Layer {
 public:
  LayerOf(P plan, std::vector<std::uint32_t> heads, std::size_t tokens, int threads)
      : heads_(std::move(heads)),
        tokens_(tokens),
        executor_{threads},
        plan_(std::move(plan)),
        compressor_(plan_, executor_),
        rows_(shape.kv_heads, tokens),
        logits_(window * tokens),
        attention_(static_cast<std::size_t>(threads) * tokens) {
    // Every 32nd row or so, none beside another.
    for (std::size_t i = 0; i < capacity; ++i) {
      moved_.push_back(static_cast<std::uint32_t>(i * (tokens / capacity) + i % 3));
    }
  }

  std::size_t compress(void* keys, void* values, const void* queries) override {
    compressor_.begin(tokens_);
    return compressor_.compress(0, view(keys, values), observation(queries)).rows();
  }

  float attention(void* keys, void* values, const void* queries) override {
    float total = 0.0F;
    const auto kv = view(keys, values);
    const auto observed = observation(queries);
    kernel::window_attention(input(kv, observed), heads_, workspace_, executor_,
                             [&](std::uint32_t, std::span<const float> sums) { total += sums.back(); });
    return total;
  }

  /// The first head's logits: through the view, or over the memory that it stands for.
  float logits(void* keys, void* values, const void* queries, bool through_view) override {
    const auto kv = view(keys, values);
    const auto observed = observation(queries);
    const auto memory = workspace_.take(Workspace::Slot::queries,
                                        kernel::PackedQueries::size(window, shape.head_dim) + shape.head_dim);
    float* const buffer =
        workspace_.take(Workspace::Slot::key_rows, kernel::key_buffer_size<T>(shape.head_dim)).data();
    const kernel::PackedQueries block =
        kernel::detail::pack_queries(input(kv, observed), std::array{0U}, window, 0, window, memory);
    const float scale = observed.scale();
    constexpr std::size_t tile = kernel::detail::tokens_per_tile;
    for (std::size_t first = 0; first < tokens_; first += tile) {
      const std::size_t count = std::min(tile, tokens_ - first);
      if (through_view) {
        kernel::detail::logits_of_rows(kv, 0, first, count, block, scale, buffer, logits_.data(), tokens_);
      } else {
        raw_logits(static_cast<const T*>(keys), first, count, block, scale, buffer);
      }
    }
    return logits_[tokens_ / 2];
  }

  void moves(void* keys, void* values, bool raw) override {
    const auto kv = view(keys, values);
    for (std::size_t head = 0; head < shape.kv_heads; ++head) {
      if (!raw) {
        kernel::copy_rows(kv, kv, head, moved_);
        continue;
      }
      for (void* memory : {keys, values}) {
        T* base = static_cast<T*>(memory) + head * tokens_ * shape.head_dim;
        for (std::size_t i = 0; i < moved_.size(); ++i) {
          std::memmove(static_cast<void*>(base + i * shape.head_dim), base + moved_[i] * shape.head_dim,
                       shape.head_dim * sizeof(T));
        }
      }
    }
  }

  /// What the compressor holds, as a share of the model's cache.
  double extra_memory() const override {
    return static_cast<double>(compressor_.memory_bytes()) /
           static_cast<double>(shape.layers * 2 * shape.kv_heads * tokens_ * shape.head_dim * sizeof(T));
  }

  /// One decoded token: all query heads over the first `rows` rows of their KV head.
  float decode(void* keys, void* values, const float* query, std::size_t rows) override {
    const StridedKv<T> kv(static_cast<T*>(keys), static_cast<T*>(values),
                          KvShape{.kv_heads = shape.kv_heads, .rows = rows, .head_dim = shape.head_dim},
                          layout::Strides{.head = tokens_ * shape.head_dim, .row = shape.head_dim});
    std::vector<float> out(shape.query_heads * shape.head_dim);
    std::vector<float> scratch(static_cast<std::size_t>(executor_.threads) * 2 * shape.head_dim);
    executor_.parallel_for(shape.query_heads, [&](std::size_t head) {
      const auto thread = static_cast<std::size_t>(omp_get_thread_num());
      kernel::decode_attention(kv, head / shape.group(), query + head * shape.head_dim, 0.088F,
                               std::span(scratch).subspan(thread * 2 * shape.head_dim, 2 * shape.head_dim),
                               std::span(attention_).subspan(thread * tokens_, rows),
                               out.data() + head * shape.head_dim);
    });
    return out[0];
  }

 private:
  StridedKv<T> view(void* keys, void* values) const {
    return {static_cast<T*>(keys), static_cast<T*>(values),
            KvShape{.kv_heads = shape.kv_heads, .rows = tokens_, .head_dim = shape.head_dim},
            layout::head_token_dim};
  }
  QueryWindow<T> observation(const void* queries) const {
    return {static_cast<const T*>(queries),
            QueryShape{.query_heads = shape.query_heads, .queries = window, .head_dim = shape.head_dim}};
  }

  kernel::LayerInput<StridedKv<T>, QueryWindow<T>> input(const StridedKv<T>& kv,
                                                         const QueryWindow<T>& observed) const {
    return {.shape = shape,
            .layer = 0,
            .rows = rows_,
            .window = window,
            .retained = retained_,
            .kv = kv,
            .observation = observed};
  }

  /// The same kernel over a pointer and a stride that no view has given.
  void raw_logits(const T* keys, std::size_t first, std::size_t count, const kernel::PackedQueries& block,
                  float scale, float* buffer) {
    const kernel::detail::ContiguousKeys<T> rows{
        .first = keys + first * shape.head_dim,
        .stride = shape.head_dim,
        .count = count,
        .rows_to_end = tokens_ - first,
        .prefetch_rows = kernel::detail::prefetch_distance / (shape.head_dim * sizeof(T))};
    kernel::detail::dot(rows, block, scale, buffer, logits_.data() + first, tokens_);
  }

  std::vector<std::uint32_t> heads_;
  std::size_t tokens_;
  OpenMpExecutor executor_;
  P plan_;
  Compressor<P, OpenMpExecutor> compressor_;
  std::vector<std::size_t> rows_;
  Retained retained_;
  Workspace workspace_;
  std::vector<float> logits_;
  std::vector<float> attention_;
  std::vector<std::uint32_t> moved_;
};

template <class T>
std::unique_ptr<Layer> make(const std::string& method, std::vector<std::uint32_t> heads, std::size_t tokens,
                            int threads) {
  const budget::Uniform budget{Budget::tokens_per_layer(capacity)};
  if (method == "snapkv") {
    Plan plan{shape, score::SnapKv{{.window = window, .pool_width = 5}}, select::GroupedTopK{}, budget};
    return std::make_unique<LayerOf<T, decltype(plan)>>(plan, heads, tokens, threads);
  }
  const std::vector<std::vector<std::uint32_t>> ranking(shape.layers, heads);
  Plan plan{shape,
            score::SemanticRetrieval{HeadRanking(ranking),
                                     {.heads_per_layer = heads.size(), .window = window, .pool_width = 5}},
            select::SharedTopK{}, budget};
  return std::make_unique<LayerOf<T, decltype(plan)>>(plan, heads, tokens, threads);
}

}  // namespace

extern "C" {

/// `type`: 0 float, 1 half, 2 bfloat16. `heads` choose where the method has such.
void* peers_make(const char* method, int type, std::size_t tokens, int threads, const std::uint32_t* heads,
                 std::size_t count) {
  const std::vector<std::uint32_t> chosen(heads, heads + count);
  if (type == 0) {
    return make<float>(method, chosen, tokens, threads).release();
  }
  return type == 1 ? make<half>(method, chosen, tokens, threads).release()
                   : make<bfloat16>(method, chosen, tokens, threads).release();
}
void peers_free(void* layer) { delete static_cast<Layer*>(layer); }

std::size_t peers_compress(void* layer, void* keys, void* values, const void* queries) {
  return static_cast<Layer*>(layer)->compress(keys, values, queries);
}
float peers_attention(void* layer, void* keys, void* values, const void* queries) {
  return static_cast<Layer*>(layer)->attention(keys, values, queries);
}
float peers_logits(void* layer, void* keys, void* values, const void* queries, int view) {
  return static_cast<Layer*>(layer)->logits(keys, values, queries, view != 0);
}
void peers_moves(void* layer, void* keys, void* values, int raw) {
  static_cast<Layer*>(layer)->moves(keys, values, raw != 0);
}
float peers_decode(void* layer, void* keys, void* values, const float* query, std::size_t rows) {
  return static_cast<Layer*>(layer)->decode(keys, values, query, rows);
}

double peers_extra_memory(const void* layer) { return static_cast<const Layer*>(layer)->extra_memory(); }

const char* peers_code_path() { return kernel::name(kernel::code_path()).data(); }

/// Whether that path is one; else nothing has changed.
int peers_force(const char* path) {
  const auto wanted = kernel::code_path_named(path);
  if (!wanted || !kernel::supported(*wanted)) {
    return 0;
  }
  kernel::force_code_path(*wanted);
  return 1;
}

/// Reads `count` pieces of memory once, `bytes` each.
float peers_read(const void* const* pieces, std::size_t count, std::size_t bytes, int threads) {
  std::vector<float> sums(count * 16);
  OpenMpExecutor{threads}.parallel_for(count * 16, [&](std::size_t i) {
    const std::size_t part = bytes / 16 / sizeof(float);
    sums[i] = machine::read(static_cast<const float*>(pieces[i / 16]) + i % 16 * part, part);
  });
  return std::accumulate(sums.begin(), sums.end(), 0.0F);
}

/// About `flops` operations, as fast as they can be with the instructions that `logits` would use.
float peers_flops(double flops, int pairs, int threads) {
  std::vector<float> sums(static_cast<std::size_t>(threads));
  OpenMpExecutor{threads}.parallel_for(
      sums.size(), [&](std::size_t i) { sums[i] = machine::multiply_add(flops / threads, pairs != 0); });
  return sums[0];
}
}
