// An engine's own cache as a view: six members and two types are all that compresskv asks for.
//
// This cache grows by slabs of 64 tokens wherever memory was free; within a slab each token is one record
// that holds, for each KV head, its key in half precision and beside it its value in bfloat16.

#include <compresskv/compresskv.hpp>
#include <cstdio>
#include <memory>
#include <vector>

namespace ckv = compresskv;

constexpr std::size_t kv_heads = 2, head_dim = 64, slab_tokens = 64;

struct HeadRecord {
  ckv::half key[head_dim];
  ckv::bfloat16 value[head_dim];
};
struct Slab {
  HeadRecord records[slab_tokens][kv_heads];
};
struct SlabCache {
  std::vector<std::unique_ptr<Slab>> slabs;
  std::size_t tokens = 0;
};

class SlabKv {
 public:
  using key_element = ckv::half;
  using value_element = ckv::bfloat16;

  explicit SlabKv(SlabCache& cache) : cache_(&cache) {}

  std::size_t kv_heads() const { return ::kv_heads; }
  std::size_t head_dim() const { return ::head_dim; }
  std::size_t rows(std::size_t) const { return cache_->tokens; }
  std::size_t run_count(std::size_t) const { return (cache_->tokens + slab_tokens - 1) / slab_tokens; }
  ckv::Run<ckv::half> key_run(std::size_t head, std::size_t i) const {
    return run(cache_->slabs[i]->records[0][head].key, i);
  }
  ckv::Run<ckv::bfloat16> value_run(std::size_t head, std::size_t i) const {
    return run(cache_->slabs[i]->records[0][head].value, i);
  }

 private:
  template <class T>
  ckv::Run<T> run(T* base, std::size_t i) const {
    const auto token = static_cast<std::ptrdiff_t>(kv_heads() * sizeof(HeadRecord) / sizeof(T));
    return {base, std::min(slab_tokens, cache_->tokens - i * slab_tokens), token, ::head_dim, ::head_dim};
  }

  SlabCache* cache_;
};
static_assert(ckv::models_kv_view<SlabKv>());

int main() {
  SlabCache cache;
  cache.tokens = 1000;
  for (std::size_t i = 0; i < SlabKv{cache}.run_count(0); ++i)
    cache.slabs.push_back(std::make_unique<Slab>());
  const std::size_t needle = 333;  // one key that the queries look for
  cache.slabs[needle / slab_tokens]->records[needle % slab_tokens][1].key[0] = ckv::half(8.0F);
  std::vector<float> queries(4 * 8 * head_dim);
  for (std::size_t i = 0; i < queries.size(); i += head_dim) queries[i] = 8.0F;

  const ckv::Plan plan{
      ckv::ModelShape{.layers = 1, .query_heads = 4, .kv_heads = kv_heads, .head_dim = head_dim},
      ckv::score::SemanticRetrieval{ckv::HeadRanking{{{3, 2, 1, 0}}}, {.heads_per_layer = 2}},
      ckv::select::SharedTopK{}, ckv::budget::Uniform{ckv::Budget::tokens_per_layer(64)}};
  ckv::Compressor compressor{plan};
  compressor.begin(cache.tokens);
  const auto& kept = compressor.compress(
      0, SlabKv{cache},
      ckv::QueryWindow{queries.data(), {.query_heads = 4, .queries = 8, .head_dim = head_dim}});
  cache.tokens = kept.rows();
  cache.slabs.resize(SlabKv{cache}.run_count(0));  // the rows lie in the first slabs now
  std::printf("%zu rows in %zu slabs; token 333 still there\n", kept.rows(), cache.slabs.size());
  return kept.row(needle) ? 0 : 1;
}
