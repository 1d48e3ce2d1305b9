// What a user's engine does, at its smallest: a cache of 64 tokens in which one retrieval head looks at token
// 20, compressed to 16 rows. It exits 0 only when that token is still there.

#include <compresskv/compresskv.hpp>
#include <cstddef>
#include <cstdio>
#include <vector>

namespace ckv = compresskv;

int main() {
  constexpr std::size_t tokens = 64;
  constexpr std::size_t needle = 20;
  const ckv::ModelShape shape{.layers = 1, .query_heads = 4, .kv_heads = 2, .head_dim = 8};
  const ckv::KvShape layer{.kv_heads = 2, .rows = tokens, .head_dim = 8};
  const ckv::QueryShape window{.query_heads = 4, .queries = 8, .head_dim = 8};

  std::vector<float> keys(2 * tokens * 8);
  std::vector<float> values(2 * tokens * 8);
  std::vector<float> queries(4 * 8 * 8);
  keys[needle * 8] = 10.0F;
  for (std::size_t query = 0; query < 8; ++query) {
    queries[(1 * 8 + query) * 8] = 10.0F;  // head 1, which reads KV head 0
  }

  const ckv::Plan plan{
      shape, ckv::score::SemanticRetrieval{ckv::HeadRanking{{{1, 3}}}, {.heads_per_layer = 1, .window = 8}},
      ckv::select::SharedTopK{}, ckv::budget::Uniform{ckv::Budget::tokens_per_layer(16)}};
  ckv::Compressor compressor{plan};
  compressor.begin(tokens);
  const ckv::StridedKv kv{keys.data(), values.data(), layer, ckv::layout::head_token_dim};
  const ckv::Retained& kept = compressor.compress(0, kv, ckv::QueryWindow{queries.data(), window});

  const auto row = kept.row(needle);
  if (kept.rows() != 16 || kept.next_position() != tokens || !row || keys[*row * 8] != 10.0F) {
    std::puts("the compressed cache lost the token that the retrieval head looks at");
    return 1;
  }
  std::printf("compresskv %d.%d.%d\n", COMPRESSKV_VERSION_MAJOR, COMPRESSKV_VERSION_MINOR,
              COMPRESSKV_VERSION_PATCH);
}
