// The same command line as the cases beside this file, on what they do wrong, done right.
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

int main() {}
