// first: this allocator gives each KV head a capacity of its own: it goes with a selector that takes them
#include <vector>

#include "scorer.hpp"

const ckv::HeadScores scores(1, 1, std::vector<std::vector<double>>{{1.0}});
const ckv::Plan plan{shape, ckv::score::StreamingLlm{}, ckv::select::SharedTopK{},
                     ckv::budget::WholeHeads{scores, ckv::Budget::tokens_per_layer(10)}};
