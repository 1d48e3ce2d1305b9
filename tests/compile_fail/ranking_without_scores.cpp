// expect: use of deleted function|call to deleted constructor
#include "scorer.hpp"

// The raw scores weigh the heads: a bare ranking has none.
const ckv::score::Carried carried{ckv::HeadRanking{{{0, 1}}}, {.heads_per_layer = 1}};
