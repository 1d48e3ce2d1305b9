// The same command line as the cases beside this file, on what they do wrong, done right.
#include <array>
#include <span>
#include <vector>

#include "kv.hpp"
#include "scorer.hpp"

using CaseScorer = Scorer<ckv::Granularity::layer, ckv::Needs::nothing, ckv::Reach::own_layer>;

const ckv::Plan own_scorer{shape, CaseScorer{}, ckv::select::SharedTopK{}, uniform};
const ckv::Plan plan{shape, ckv::score::SemanticRetrieval{ckv::HeadRanking{{{0, 1}}}, {.heads_per_layer = 1}},
                     ckv::select::SharedTopK{}, uniform};

void all_of_it(const ckv::StridedKv<float>& kv, const ckv::StridedKv<const float>& read_only,
               const ckv::QueryWindow<float>& queries, const ckv::AttentionMatrix<float>& attention,
               const ckv::AttentionSums& sums, const ckv::StridedKv<ckv::BlockQ8_0>& quantised,
               const ckv::PagedKv<float>& paged, const ckv::Selection& selection) {
  ckv::Compressor compressor{plan, ckv::SerialExecutor{}};
  compressor.compress(0, kv, queries);
  compressor.compress(0, kv, attention);
  compressor.score(0, read_only, queries);
  compressor.score(0, attention);
  compressor.compact(0, kv, selection);
  compressor.gather(0, read_only, selection, kv);
  compressor.compress(0, quantised, queries);
  compressor.compress(0, paged, sums);
  compressor.rerotate(0, kv, ckv::kernel::Rotary{});
  ckv::Compressor other{own_scorer};
  other.compress(0, kv);
}

static_assert(ckv::models_kv_view<Kv>());

// What is kept may come from variables, in whatever holds elements side by side.
void kept(std::vector<float>& keys, std::span<float> values, const std::vector<std::int32_t>& table,
          std::array<std::int32_t, 8>& references, const std::vector<std::size_t>& head_rows,
          const std::vector<float>& sinks, std::vector<std::int8_t>& data,
          const std::vector<std::uint32_t>& positions) {
  const ckv::KvShape strided{.kv_heads = 2, .head_dim = 8, .allocated_rows = 16, .head_rows = head_rows};
  ckv::StridedKv of_both{keys, values, strided, ckv::layout::head_token_dim};
  ckv::StridedKv of_spans{std::span(keys), std::span<const float>(values), strided, ckv::layout::Strides{},
                          ckv::layout::head_dim_token};
  ckv::StridedKv of_pointers{keys.data(), values.data(), strided, {}};
  const ckv::PagedShape paged{.kv_heads = 2, .head_dim = 8, .block_rows = 4, .head_rows = head_rows};
  ckv::PagedKv of_pools{keys, values.data(), paged, table, ckv::layout::token_head_dim, references};
  ckv::PagedKv of_span{keys.data(),
                       values,
                       paged,
                       std::span(table),
                       ckv::layout::Strides{},
                       ckv::layout::head_dim_token,
                       std::span(references)};
  const ckv::RecentQueries<float> recent{
      ckv::QueryShape{.query_heads = 2, .queries = 8, .head_dim = 8, .sinks = sinks}};
  recent.view();
  ckv::QueryWindow of_queries{keys.data(), ckv::QueryShape{}};
  ckv::QueryWindow<float> strided_queries{nullptr, {}, {}};
  ckv::AttentionMatrix of_weights{keys.data(), ckv::AttentionShape{}};
  ckv::AttentionMatrix<float> none{nullptr, {}};
  const ckv::Int8Rows rows{data, keys, values};
  ckv::Int8Kv of_int8{rows, {data, keys, values}, strided, ckv::layout::head_token_dim};
  ckv::Compressor compressor{plan};
  compressor.begin(64, {.positions = positions});
}

int main() {}
