// expect: a ranking says who is better, not by how much: give the raw head scores that calibration writes
#include "scorer.hpp"

// The raw scores weigh the heads: a bare ranking has none.
const ckv::score::Carried carried{ckv::HeadRanking{{{0, 1}}}, {.heads_per_layer = 1}};
