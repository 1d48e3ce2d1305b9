// first: the scores of this scorer travel from layer to layer: HeadMean takes one
#include "scorer.hpp"

using CaseScorer = Scorer<ckv::Granularity::kv_head, ckv::Needs::nothing, ckv::Reach::all_layers>;

const ckv::score::HeadMean mean{CaseScorer{}};
