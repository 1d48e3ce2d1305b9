// first: the scores of this scorer travel from layer to layer, token by token
#include "scorer.hpp"

using CaseScorer = Scorer<ckv::Granularity::layer, ckv::Needs::nothing, ckv::Reach::earlier_layers>;

const ckv::score::ChunkKv chunks{CaseScorer{}};
