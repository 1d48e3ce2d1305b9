// What bench/peers/methods.py calls: a method by its name on one float32 layer that Python owns.

#include <compresskv/core/openmp_executor.hpp>
#include <compresskv/runtime/any_compressor.hpp>
#include <compresskv/view/attention_matrix.hpp>
#include <compresskv/view/query_window.hpp>
#include <compresskv/view/strided_kv.hpp>
#include <cstddef>
#include <utility>
#include <vector>

namespace {

using namespace compresskv;

/// Of a layer of Llama-3.1-8B.
constexpr ModelShape shape{.layers = 32, .query_heads = 32, .kv_heads = 8, .head_dim = 128};

/// Queries that are spread alike in all directions: what it takes to compute with them is what counts here.
QueryStatistics statistics() {
  QueryStatistics::Head head{.count = 1, .mean = std::vector<float>(shape.head_dim, 0.125F)};
  head.modulus.assign(shape.head_dim / 2, 1.0F);
  for (std::size_t row = 0; row < shape.head_dim; ++row) {
    head.covariance.resize(head.covariance.size() + row, 0.0F);
    head.covariance.push_back(1.0F);
  }
  return {shape.layers, shape.query_heads, shape.head_dim, Rotary{},
          std::vector<QueryStatistics::Head>(shape.layers * shape.query_heads, head)};
}

MethodSettings settings(std::size_t capacity, bool measured) {
  MethodSettings chosen{.budget = Budget::tokens_per_layer(capacity)};
  if (measured) {
    chosen.statistics = statistics();
  }
  return chosen;
}

struct NamedMethod {
  NamedMethod(const char* name, std::size_t row_count, std::size_t capacity, int threads)
      : rows(row_count),
        executor{threads},
        compressor(AnyPlan(shape, name, settings(capacity, method_named(name).needs_statistics)), executor) {}

  StridedKv<float> view(float* keys, float* values) const {
    return {keys,
            values,
            {.kv_heads = shape.kv_heads, .rows = rows, .head_dim = shape.head_dim},
            layout::head_token_dim};
  }
  QueryWindow<float> queries(const float* data, std::size_t count) const {
    return {data, {.query_heads = shape.query_heads, .queries = count, .head_dim = shape.head_dim}};
  }

  std::size_t arrive(float* keys, float* values, const AnyObservation& shown) {
    compressor.begin(rows);
    compressor.arrive(
        0, [&](std::size_t) { return view(keys, values); }, shown);
    return compressor.retained(0).bytes_freed();
  }

  std::size_t rows;
  OpenMpExecutor executor;
  AnyCompressor compressor;
};

}  // namespace

extern "C" {

void* methods_make(const char* name, std::size_t rows, std::size_t capacity, int threads) {
  return new NamedMethod(name, rows, capacity, threads);
}
void methods_free(void* method) { delete static_cast<NamedMethod*>(method); }

/// Bytes that it frees.
std::size_t methods_compress(void* method, float* keys, float* values, const float* queries,
                             std::size_t count) {
  auto& m = *static_cast<NamedMethod*>(method);
  return m.arrive(keys, values, m.queries(queries, count));
}

/// The same by the attention of all tokens, `[query_head][query][token]`.
std::size_t methods_compress_by_attention(void* method, float* keys, float* values, const float* attention) {
  auto& m = *static_cast<NamedMethod*>(method);
  return m.arrive(keys, values,
                  AttentionMatrix<float>(
                      attention, {.query_heads = shape.query_heads, .queries = m.rows, .tokens = m.rows}));
}

/// The last `fed` tokens repeat the first `last`.
void methods_observe(void* method, float* keys, float* values, const float* queries, std::size_t fed,
                     std::size_t last) {
  auto& m = *static_cast<NamedMethod*>(method);
  m.compressor.begin(m.rows - fed);
  m.compressor.observe(0, m.view(keys, values), {.first = 0, .last = last}, m.queries(queries, fed));
}
}
